"""The fleet: nodes, devices, replicas, and the backends that run processes on them."""
