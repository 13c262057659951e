"""Tides: the planner of the fleet and its scheduling policies, as pure functions.

A snapshot and a clock go in, decisions come out; the simulator asks too.
"""
