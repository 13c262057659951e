"""The planner: the policies of `tidemill.tides` over a fleet that is only described, on a clock that runs faster."""
