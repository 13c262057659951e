"""The fleet: nodes, devices, replicas and their lifecycle, and the backends that run processes on them."""
