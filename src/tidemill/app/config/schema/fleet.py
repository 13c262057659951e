"""`[fleet]` and `[nodes.NAME]`: how engines and jobs are run, and on which devices. See docs/fleet.md."""

from typing import Literal

import msgspec


class FleetConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[fleet]`: how engines and jobs are run."""

    backend: Literal["local", "ray"] = "local"
    """Processes of this machine, or of a Ray cluster that stands already."""
    ray_address: str = "auto"
    """What `ray.init` takes: `auto` on a machine of the cluster, else the head's HOST:PORT."""
    start_seconds: float = 1800.0
    """What an engine gets to become ready in; then it is killed and started again."""
    health_seconds: float = 20.0
    """An engine whose health page is silent for so long hangs: it is killed and started again."""
    drain_seconds: float = 300.0
    """What a replica that is given up, or rolled, gets to finish its requests in."""
    log_mib: int = 16
    """A log of an engine or a job that is longer is moved aside, and a second one takes its place."""


class DevicesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of `[nodes.NAME] devices`: devices of one kind."""

    kind: str
    count: int = 1
    memory_gib: float = 0.0
    """Of each; 0: what the catalogue says, of a CPU slot its share of the machine's memory."""


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[nodes.NAME]`: a machine of the fleet. `local` is this one."""

    devices: tuple[DevicesConfig, ...] = ()
    """In place of what is found."""
