"""The control plane: what an operator sees and changes, for programs (`api/`) and later for people (`console/`)."""
