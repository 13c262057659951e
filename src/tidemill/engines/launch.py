"""How a GPU engine is started: what shall run, as a struct, and the command line that it becomes.

`engines.vllm` and `engines.sglang` write the command lines. The tests hold each against the engine's own parser,
recorded in tests/engines/contracts/. Which devices the process sees is set by the fleet's backend, not here.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

from tidemill.engines.catalogue.models import KvPrecision, WeightPrecision
from tidemill.engines.memory import ReplicaLayout
from tidemill.errors import ConfigError

HOST_PLACEHOLDER = "{host}"
PORT_PLACEHOLDER = "{port}"
"""What a backend of the fleet fills in on the node."""
SHORTEST_ABBREVIATION = 4
"""Characters of a flag, with its dashes."""


class MultiNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A replica over several nodes: one process on each, started by the same command but for `rank`."""

    nodes: int
    rank: int
    """0 is the head: it alone serves HTTP."""
    master: str
    """The head's address."""
    port: int = 29501


class EngineLaunch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What shall run. Whatever is None is left to the engine."""

    model: str
    """A folder on the node, or a hub id."""
    served_name: str
    host: str = HOST_PLACEHOLDER
    port: int | None = None
    """None: the backend chooses one."""
    tp: int = 1
    pp: int = 1
    dp: int = 1
    """Attention in so many copies, with one scheduler each (mixtures of experts)."""
    expert_parallel: bool = False
    """The experts lie whole on the devices, spread over tp x dp, instead of being cut."""
    quantization: str | None = None
    """A method by the engine's name; None: as the model's config.json says."""
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: Literal["auto", "fp8_e4m3", "fp8_e5m2"] = "auto"
    max_context: int | None = None
    max_sequences: int | None = None
    """Worked on at a time, by each copy of attention."""
    memory_share: float | None = None
    """Of each device's memory, 0 to 1."""
    prefix_cache: bool = True
    priority_scheduling: bool = False
    """Requests with a lower `priority` first."""
    sleep_mode: bool = False
    """The engine can give its devices' memory back and take it again, without being restarted."""
    prefill_chunk: int | None = None
    """Tokens of one step; None: the engine's own choice."""
    trust_remote_code: bool = False
    revision: str | None = None
    drain_seconds: int | None = None
    """How long open requests may go on after SIGTERM, where the engine can be told."""
    multi_node: MultiNode | None = None
    extra_args: tuple[str, ...] = ()
    """Appended as they are."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1")
        if self.memory_share is not None and not 0 < self.memory_share <= 1:
            raise ValueError("memory_share is more than 0 and at most 1")
        if self.multi_node is not None and not 0 <= self.multi_node.rank < self.multi_node.nodes:
            raise ValueError("rank is from 0 to the number of nodes less one")

    @property
    def port_text(self) -> str:
        return PORT_PLACEHOLDER if self.port is None else str(self.port)

    @property
    def world(self) -> int:
        """Devices of the replica."""
        return self.tp * self.pp * self.dp


class CommandLine(msgspec.Struct, frozen=True):
    """A process to start: its command line, and what its environment needs besides the node's own."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = {}


class EngineControl(msgspec.Struct, frozen=True):
    """Where an engine is watched and steered, below its address (not below /v1)."""

    ready: str
    """GET: 200 once it takes requests."""
    metrics: str = "/metrics"
    drain_signal: str = "TERM"
    """The signal upon which it takes nothing new, ends what is open, and exits."""
    sleep: str = ""
    """POST: give the devices' memory back."""
    wake: str = ""
    """POST: take it again."""
    running: str = ""
    """Gauge on the metrics page: requests that are worked on."""
    waiting: str = ""
    """Gauge: requests that wait."""
    kv_used: str = ""
    """Gauge: share of the KV cache in use, 0 to 1."""
    template: str = ""
    """GET: what the model's chat template has a place for (`engines.capabilities.template_lacks`)."""
    batches_beside: bool = False
    """Batches get a replica beside each ordinary one where the configuration doesn't say; else they go inside."""


class Launcher(Protocol):
    """The command line of an engine, as `engines.vllm.command`. Raises ConfigError."""

    def __call__(self, launch: EngineLaunch, program: tuple[str, ...] = ...) -> CommandLine: ...


def launch_for(
    layout: ReplicaLayout,
    *,
    model: str,
    served_name: str,
    precision: WeightPrecision,
    native: WeightPrecision,
    kv: KvPrecision = "bf16",
    context: int | None = None,
    sequences: int | None = None,
) -> EngineLaunch:
    """The launch that a layout found by `engines.fit` asks for.

    Only fp8 can be made while loading; int8 and int4 need weights that were quantised before, whose config.json says
    so, hence `model` must be such a copy.
    """
    return EngineLaunch(
        model=model,
        served_name=served_name,
        tp=layout.tp,
        pp=layout.pp,
        dp=layout.dp,
        expert_parallel=layout.dp > 1,
        quantization="fp8" if precision == "fp8" and native != "fp8" else None,
        kv_cache_dtype="fp8_e4m3" if kv == "fp8" else "auto",
        max_context=context,
        max_sequences=-(-sequences // layout.dp) if sequences is not None else None,
        prefix_cache=True,
        priority_scheduling=True,
    )


def refuse_own(launch: EngineLaunch, taken: Mapping[str, str]) -> None:
    """Extra arguments must not say again what a key says. `taken`: flag -> key. Raises ConfigError."""
    for argument in launch.extra_args:
        flag = argument.partition("=")[0].replace("_", "-")
        # The engines' parsers also take a flag by its beginning.
        short = flag.startswith("--") and len(flag) >= SHORTEST_ABBREVIATION
        meant = flag if flag in taken else next((each for each in taken if short and each.startswith(flag)), None)
        if meant is not None:
            raise ConfigError(f"extra_args: {flag} is set by `{taken[meant]}`.", hint="Remove it, and set the key.")


def pairs(*items: tuple[str, object | None]) -> list[str]:
    """`--flag value` of each that has a value."""
    return [text for flag, value in items if value is not None for text in (flag, str(value))]
