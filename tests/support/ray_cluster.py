"""A Ray cluster of several nodes in this machine."""

import signal
from typing import Any

from tidemill.fleet.shim import descendants, send


class Cluster:
    """A Ray cluster: a head without devices, and two nodes of two CPU slots, `east` and `west`."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = {name: self.add(name) for name in ("east", "west")}
        self.address = self._cluster.address

    def add(self, name: str) -> Any:
        return self._cluster.add_node(num_cpus=2, labels={"tidemill.name": name}, object_store_memory=80_000_000)

    def lose(self, name: str) -> None:
        """All processes of a node are killed at once, as when its power fails."""
        node = self.nodes.pop(name)
        raylet = node.all_processes["raylet"][0].process.pid
        for pid in (raylet, *descendants(raylet)):
            send(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def shut_down(self) -> None:
        self._cluster.shutdown()
