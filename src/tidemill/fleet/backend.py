"""Backends run processes on nodes.

Those of one machine (`fleet.local`), or of a Ray cluster (`fleet.ray`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from tidemill.errors import Unavailable


class Device(msgspec.Struct, frozen=True):
    """One device of a node."""

    id: str
    """`NODE/INDEX`."""
    node: str
    index: int
    """The node's own number of it: what CUDA_VISIBLE_DEVICES counts, or the core of a CPU slot."""
    kind: str
    memory_bytes: int = 0


class Node(msgspec.Struct, frozen=True):
    """A machine of the fleet as a backend sees it now."""

    name: str
    host: str
    """Where its processes can be reached from this machine."""
    devices: tuple[Device, ...]
    up: bool = True
    why: str = ""
    """Why it is not up."""


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One process to be started on one node."""

    name: str
    """For logs, and in the list of processes: `smollm2/0`, `job-7k3m/0`."""
    argv: tuple[str, ...]
    """`{port}` in it is replaced by a port that is free on the node, `{host}` by the address to listen on."""
    env: Mapping[str, str] = {}
    """On top of the node's own; which devices it may see is set by the backend."""
    devices: tuple[Device, ...] = ()
    """All of one node. CPU slots pin it to these cores; GPUs are made visible to it, and no others."""
    node: str = ""
    """Where it runs; empty: the node of its devices."""
    cwd: Path | None = None
    log: Path | None = None
    """Where its output goes, appended; a path on the node that it runs on."""
    idle_class: bool = False
    """The operating system gives it only what nobody else wants of its cores (SCHED_IDLE)."""
    end_file: Path | None = None
    """Where its end is written down as JSON (`ProcessEnd`), so that it is known also after this process has died."""
    stop_signal: str = "TERM"
    orphan_grace_s: float = 5.0
    """What it gets to end in when this process has died; then it is killed."""
    oom_score_adj: int = 100
    """How readily the kernel kills it when memory runs out, up to 1000 (proc(5)); of idle class at least 800."""


class ProcessEnd(msgspec.Struct, frozen=True):
    """How a process ended."""

    code: int | None
    """Its exit code, negative for a signal; None when its node was lost with it."""
    at: float
    """Unix time, seconds."""
    why: str = ""
    """`exited`, `stopped`, `killed`, `node lost`, or what prevented it from being started."""


class Process(Protocol):
    """A process that was started. All methods may be called at any time, also after its end."""

    @property
    def launch(self) -> ProcessSpec: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def host(self) -> str:
        """Where its node can be reached."""
        ...

    @property
    def port(self) -> int | None:
        """What `{port}` became; None when the launch had none."""
        ...

    @property
    def started_at(self) -> float:
        """Unix time, seconds."""
        ...

    async def wait(self) -> ProcessEnd:
        """Its end; returns at once when it is over. Several may wait."""
        ...

    async def stop(self, grace_s: float, signal: str | None = None) -> ProcessEnd:
        """Signal its whole process group, and kill what is left after `grace_s`.

        The signal is `launch.stop_signal`, or another.
        """
        ...

    def kill(self) -> None:
        """End the whole process group now."""
        ...


class CannotStart(Unavailable):
    """The process could not be started: the program is not there, the node is gone, no memory. Says which."""


class Backend(Protocol):
    """Where processes run."""

    kind: str
    """`local`, `ray`."""

    async def open(self) -> None:
        """Connect. Raises Unavailable."""
        ...

    async def nodes(self) -> Sequence[Node]:
        """The nodes as they are now, those that were lost included until `forget_s` after."""
        ...

    async def start(self, launches: Sequence[ProcessSpec]) -> Sequence[Process]:
        """Start all of them or none (a gang). Raises CannotStart."""
        ...

    async def close(self) -> None:
        """End everything that was started."""
        ...
