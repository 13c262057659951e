"""The control plane: what an operator sees and changes.

It is for programs (`api/`), and later for people (`console/`).
"""
