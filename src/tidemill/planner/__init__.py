"""The planner: the policies of `tidemill.tides` over a fleet that is only described.

Its clock runs faster.
"""
