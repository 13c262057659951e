"""One kind of engine: all that the platform knows of it, as a row of `engines.registry`."""

from collections.abc import Callable
from dataclasses import dataclass

from tidemill.engines.launch import EngineControl, Launcher
from tidemill.engines.protocol import Engine


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What the configuration says of how an engine is spoken to."""

    owned: bool = False
    """Of one that somebody else runs: it belongs to the operator (see `Engine.owned`)."""
    priority_scheduling: bool = False
    """It was started so that it orders requests by priority."""


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """How engines of one kind are spoken to, watched and started."""

    name: str
    """The value of `engine` in the configuration."""
    engine: Callable[[EngineOptions], Engine]
    control: EngineControl | None = None
    """How it is watched, as a process of the platform; None: somebody else runs it, at a `base_url`."""
    launcher: Launcher | None = None
    """Makes the command line out of `[models.NAME.launch]`."""
    default_context: int | None = None
    """Tokens of a request where the configuration does not say; None: not known."""
    embeds: bool = True
    """It may give embeddings without being told so in the configuration."""

    ranks: bool = True
    """It may rank documents without being told so in the configuration."""

    @property
    def runs_here(self) -> bool:
        """It is a process of the platform."""
        return self.control is not None

    @property
    def embedded(self) -> bool:
        """It runs in a child process with the platform's own code: one file of weights, on CPU slots."""
        return self.control is not None and self.launcher is None
