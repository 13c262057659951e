"""Tidemill turns a fleet of GPUs into a model cloud.

Serve, fill the trough, meter once, bill by contract.
"""

__version__ = "0.1.0"
