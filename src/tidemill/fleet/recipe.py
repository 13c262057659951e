"""How replicas of a model are made: what the fleet needs to know of one, whatever its engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from tidemill.engines.launch import CommandLine, EngineControl, MultiNode
from tidemill.fleet.backend import Device


class WeightsVersion(msgspec.Struct, frozen=True):
    """Which weights a replica runs."""

    name: str = ""
    """As the operator calls it; may be empty."""
    path: str = ""
    """A file, a directory, or a name on a hub: what the engine takes for its weights."""


# `{port}` and `{host}` in the command are filled in where it runs (`fleet.backend.ProcessSpec`). The devices are those
# of one process; the last argument says which one that is, of a replica over several nodes.
MakeCommand = Callable[[WeightsVersion, Sequence[Device], MultiNode | None], CommandLine]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model's replicas."""

    model: str
    engine: str
    """Its kind, as `engines.registry` has it."""
    command: MakeCommand
    control: EngineControl
    version: WeightsVersion = field(default_factory=WeightsVersion)
    """What the configuration says; a roll may have put another in its place (`ReplicaSet.version`)."""
    devices: int | None = None
    """That a replica takes, of one that `spans` in equal parts of several nodes where one is too small; None: its share
    of the CPU slots, `max_replicas` to a node, without being pinned."""
    kinds: tuple[str, ...] = ()
    """The best first; empty: any."""
    spans: bool = False
    """Its engine can work over several nodes, as one process on each."""
    min_replicas: int = 1
    max_replicas: int = 1
    start_s: float = 1800.0
    """What an engine gets to become ready in, seconds; then it is killed and started again."""
    health_s: float = 20.0
    """How long its health page may be silent, seconds; then it is taken to hang."""
    drain_s: float = 300.0
    """What a replica that is given up gets to finish its requests in, seconds."""

    @property
    def shares(self) -> bool:
        """Its replicas, of a fixed number, share the CPU slots with whatever else runs there: nothing is to be
        planned for it."""
        return self.devices is None and self.min_replicas == self.max_replicas
