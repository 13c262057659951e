"""The engines by their kind: the one table.

A new engine is a file of its own and a row here (docs/decisions/0022-engines-own-their-dialect.md).
"""

from tidemill.engines import llamacpp, openai, sglang, vllm
from tidemill.engines.anthropic import engine as anthropic
from tidemill.engines.kind import EngineKind, EngineOptions
from tidemill.engines.launch import Launcher
from tidemill.engines.protocol import Engine

ENGINES: dict[str, EngineKind] = {
    each.name: each for each in (llamacpp.KIND, vllm.KIND, sglang.KIND, openai.KIND, anthropic.KIND)
}
"""In the order in which the configuration's errors list them."""

LAUNCHERS: dict[str, Launcher] = {name: each.launcher for name, each in ENGINES.items() if each.launcher is not None}
"""The engines that are started by a command line of their own."""

SLEEPERS = tuple(name for name, each in ENGINES.items() if each.control is not None and each.control.sleep)
"""The engines that can give their devices' memory back and take it again."""


def engine_of(kind: str, *, owned: bool = False, priority_scheduling: bool = False) -> Engine:
    """How to speak to an engine; `owned` counts for one that somebody else runs (see `Engine.owned`)."""
    return ENGINES[kind].engine(EngineOptions(owned=owned, priority_scheduling=priority_scheduling))
