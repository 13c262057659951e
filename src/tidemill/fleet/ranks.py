"""Work on the devices of several nodes: one process for each part, and where they meet."""

import random
import socket
from collections.abc import Sequence

from tidemill.fleet.backend import Device, Node


def by_node(devices: Sequence[Device]) -> list[tuple[Device, ...]]:
    """The devices of each node, nodes in the order in which they come."""
    parts: dict[str, list[Device]] = {}
    for device in devices:
        parts.setdefault(device.node, []).append(device)
    return [tuple(part) for part in parts.values()]


def host_of(device: Device, nodes: Sequence[Node]) -> str:
    """Where the others find the process that runs on this device."""
    return next((node.host for node in nodes if node.name == device.node), "127.0.0.1")


def free_port() -> int:
    """A port that was free here a moment ago; on another machine, likely."""
    with socket.socket() as probe:
        try:
            probe.bind(("", 0))
        except OSError:
            return random.randrange(20_000, 30_000)
        port: int = probe.getsockname()[1]
        return port
