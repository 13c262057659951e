"""`[models.NAME]`: a model that is served, whoever runs its engine."""

from typing import TYPE_CHECKING, Literal

import msgspec

from tidemill.app.config.schema.prices import CostConfig
from tidemill.engines.kind import EngineKind
from tidemill.engines.registry import ENGINES

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[tuple(ENGINES)]
    """The kinds of `engines.registry`."""

Filler = Literal["inside", "beside"]


class ObjectiveConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[models.NAME.objective]`: how fast a model shall answer, for which share of its requests."""

    ttft_seconds: float = 2.0
    """Time to first token."""
    tpot_seconds: float = 0.1
    """Time per output token after the first."""
    percentile: float = 0.95


class LaunchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[models.NAME.launch]`: how vLLM or SGLang is started. What is not set is left to the engine."""

    command: tuple[str, ...] = ()
    """What is run: `["vllm"]`, `["python", "-m", "sglang.launch_server"]` when not set."""
    tp: int = 1
    pp: int = 1
    dp: int = 1
    expert_parallel: bool = False
    quantization: str | None = None
    dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    kv_cache_dtype: Literal["auto", "fp8_e4m3", "fp8_e5m2"] = "auto"
    memory_share: float | None = None
    """Of each device's memory, 0 to 1."""
    max_sequences: int | None = None
    """Requests worked on at a time, by each of `dp` copies."""
    prefill_chunk: int | None = None
    prefix_cache: bool = True
    priority_scheduling: bool = True
    """People's requests go before the lines of batches inside the engine."""
    trust_remote_code: bool = False
    revision: str | None = None
    extra_args: tuple[str, ...] = ()
    """Appended as they are."""
    env: dict[str, str] = {}
    """Set in the engine's environment."""


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[models.NAME]`: a model, and what runs it."""

    engine: EngineName

    # llamacpp
    path: str | None = None
    """llamacpp: a GGUF file, relative to the configuration file; none: the embedded model. vllm, sglang: a folder
    with the weights, or their name on a hub; NAME when not set."""
    parallel: int = 8
    """Requests that a replica works on at a time."""
    threads: int = 0
    """CPU threads of a replica; 0: the cores, shared among the replicas."""
    embeddings: Literal["", "model", "mean", "cls", "last"] = ""
    """It gives embeddings, too: how a text's vectors become one; `model`: as its file says. Empty: it gives none."""
    reranking: bool = False
    """llamacpp: it ranks documents, too, instead of giving embeddings."""
    replicas: int = 1
    """How many engines run it, each a process of its own."""

    # engines of our own (docs/fleet.md)
    devices: int | None = None
    """What a replica takes, all of one node; of llamacpp its share of the CPU slots when not set."""
    kinds: tuple[str, ...] = ()
    """Kinds of devices that it runs on, the best first; any when not set."""
    min_replicas: int | None = None
    """The fewest that there are; 0: none while nobody asks. `replicas` when not set."""
    max_replicas: int | None = None
    """The most that there are; `replicas` when not set."""
    objective: ObjectiveConfig = ObjectiveConfig()
    scale_down_seconds: float = 300.0
    """How long less must have been enough before a replica is given up."""
    sleepers: int = 0
    """Replicas that are given up and sleep in the machine's memory instead of ending, at most so many at a time; vllm
    and sglang, on this machine."""
    wake_seconds: float = 120.0
    """How long a request waits for a model that has no replica."""
    filler: Filler | None = None
    """Where lines of batches run: `inside` the replicas, or `beside` them in one that gets what they leave; of
    llamacpp beside, of the others inside when not set."""
    priority: int = 0
    """Of models that both need a device, the higher gets it."""
    version: str = ""
    """What its weights are called."""
    launch: LaunchConfig = LaunchConfig()
    """vllm, sglang: how the engine is started."""

    # openai
    base_url: str | None = None
    base_urls: tuple[str, ...] = ()
    """In place of `base_url`, for several replicas of one model."""
    probe_seconds: float = 10.0
    """How often an upstream is asked whether it is well; 0: never."""
    cost: CostConfig | None = None
    api_key_env: str | None = None
    """The environment variable that holds the upstream's API key."""
    upstream_model: str | None = None
    """The model's name at the upstream, when it differs."""
    on_disconnect: Literal["drain", "abort"] = "drain"
    """When a client leaves: read the upstream's answer to its end (it bills it anyway), or abort it."""
    drain_seconds: float = 30.0
    """How long an upstream is read to the end for a client that left."""

    # both
    aliases: tuple[str, ...] = ()
    """Other names that tenants may ask for it by."""
    fallbacks: tuple[str, ...] = ()
    """Models that answer when this one cannot, in this order."""
    overflow: bool = False
    """They answer also when all replicas of this one have as many requests as they work on at a time."""
    split: dict[str, float] = {}
    """Models that get a share of its requests, in percent."""
    allow_loss: bool = False
    """Sell it below cost where a fallback or an arm of the split costs more than the tenant pays."""
    context: int | None = None
    """Tokens that one request may use, prompt and answer together."""
    max_output_tokens: int = 4096
    """The answer's limit when the client sets none."""
    ttft_timeout_seconds: float = 300.0
    """How long an engine may take until its answer begins."""
    hedge_seconds: float | None = None
    """A streamed answer that has not begun after so long is asked for at a second replica as well; of engines of one's
    own. When not set: never."""
    idle_timeout_seconds: float = 60.0
    """How long an engine may be silent within an answer."""
    max_concurrent: int | None = None
    """Requests that it works on at a time; more wait here, in order. 0: as many as come. When not set: of llamacpp
    `parallel` times `replicas` (unless it overflows), of an upstream as many as come."""
    max_queued: int = 1024
    """Requests that may wait."""
    queue_seconds: float = 60.0
    """How long a request may wait."""
    batch_parallel: int | None = None
    """Lines of batches that are worked on at a time; half of `parallel` when not set, of an upstream 8."""
    cost_per_hour: str = "0"
    """What a replica costs the operator an hour, in the installation's currency (for the margin)."""

    @property
    def kind(self) -> EngineKind:
        """What the platform knows of its engine."""
        return ENGINES[self.engine]

    @property
    def replica_bounds(self) -> tuple[int, int]:
        """The fewest and the most replicas of an engine of our own."""
        low = self.replicas if self.min_replicas is None else self.min_replicas
        high = max(self.replicas, low) if self.max_replicas is None else self.max_replicas
        return low, high

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the replicas of an upstream listen."""
        return self.base_urls or ((self.base_url,) if self.base_url else ())

    @property
    def bills_tokens(self) -> bool:
        """True if somebody else bills the operator for each token: a vendor's API, not an engine of one's own."""
        return not self.kind.runs_here and self.on_disconnect == "drain"

    @property
    def slots(self) -> int | None:
        """Requests that a replica of our own works on at a time; None: not known."""
        if self.kind.embedded:
            return self.parallel
        return None if self.launch.max_sequences is None else self.launch.max_sequences * self.launch.dp
