"""What the platform and its bridge to a Ray cluster (`fleet.ray_bridge`) say to each other.

JSON, a line each.
"""

from typing import Any, Literal

import msgspec


class RayNode(msgspec.Struct, frozen=True):
    """A node as Ray tells of it."""

    id: str
    name: str
    address: str
    alive: bool
    resources: dict[str, float]
    labels: dict[str, str] = {}


class RayPart(msgspec.Struct, frozen=True):
    """One process of a gang: on which node, with which of Ray's resources, and the shim's order."""

    key: str
    """The platform's name for the process."""
    name: str
    node_id: str
    resources: dict[str, float]
    order: dict[str, Any]


class RayCommand(msgspec.Struct, frozen=True, kw_only=True):
    """What the platform asks for."""

    do: Literal["start", "tell", "kill"]
    ticket: int = 0
    parts: tuple[RayPart, ...] = ()
    key: str = ""
    line: str = ""


class RayStarted(msgspec.Struct, frozen=True):
    """A process that runs."""

    pid: int
    port: int | None
    at: float


class RayMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the bridge says."""

    say: Literal["nodes", "started", "failed", "ended", "unreachable"]
    nodes: tuple[RayNode, ...] = ()
    ticket: int = 0
    started: tuple[RayStarted, ...] = ()
    """In the order of the command's parts."""
    why: str = ""
    key: str = ""
    node_id: str = ""
    """Where the process ran that has ended."""
    code: int | None = None
    at: float = 0.0
