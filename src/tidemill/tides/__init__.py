"""Tides: the policies of the house, pure.

A snapshot and a clock go in, decisions come out; the simulator asks too.
"""
