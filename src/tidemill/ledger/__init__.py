"""Money, prices, rating, double entry, invoices, costing.

Pure: values in, values out; no I/O, no clock.
"""
