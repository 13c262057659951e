"""Batch inference: lines of input files, sent through the data plane in the tenant's name."""
