"""The fleet: nodes, devices, replicas and their life, and the backends that run processes on them."""
