"""Tidemill turns a fleet of GPUs into a model cloud: serve, fill the trough, meter once, bill by contract."""

__version__ = "0.1.0"
