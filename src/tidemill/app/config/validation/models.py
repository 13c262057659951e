"""`[models.NAME]`: a model that is served, whoever runs its engine."""

import re
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from tidemill.app.config.fleet import OWN_ENGINES, Filler, LaunchConfig, ObjectiveConfig, replica_bounds
from tidemill.app.config.reading import taken
from tidemill.app.config.routes import CostConfig, check_replicas
from tidemill.errors import ConfigError
from tidemill.ledger.money import parse_amount

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[models.NAME]`: a model, and what runs it."""

    engine: Literal["llamacpp", "vllm", "sglang", "openai"]

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
    def replica_bounds(self) -> tuple[int, int]:
        """The fewest and the most replicas of an engine of our own."""
        return replica_bounds(self)

    @property
    def slots(self) -> int | None:
        """Requests that a replica of our own works on at a time; None: not known."""
        if self.engine == "llamacpp":
            return self.parallel
        return None if self.launch.max_sequences is None else self.launch.max_sequences * self.launch.dp


def check_model(name: str, model: ModelConfig) -> None:
    """All that a model says by itself. Raises ConfigError."""
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"models.{name}: is not a model name.",
            hint="Use letters, digits and . _ : / @ + -, at most 128 of them.",
        )
    check_replicas(name, model, _is_address)
    for key in ("parallel", "max_output_tokens", "context", "batch_parallel"):
        value = getattr(model, key)
        if value is not None and not 1 <= value <= 16_777_216:
            raise ConfigError(f"models.{name}.{key}: {value} is out of range; it is at least 1.")
    if not 0 <= model.threads <= 1024:
        raise ConfigError(f"models.{name}.threads: {model.threads} is out of range; 0 takes all cores.")
    for key in ("drain_seconds", "ttft_timeout_seconds", "idle_timeout_seconds"):
        if not 0 < getattr(model, key) <= 86_400:
            raise ConfigError(f"models.{name}.{key}: is more than 0 and at most 86400 seconds.")
    _check_hedge(name, model)
    for key, low in (("max_concurrent", 0), ("max_queued", 1)):
        value = getattr(model, key)
        if value is not None and not low <= value <= 1_000_000:
            raise ConfigError(f"models.{name}.{key}: {value} is out of range; it is from {low} to 1000000.")
    if not 0 < model.queue_seconds <= 3600:
        raise ConfigError(f"models.{name}.queue_seconds: is more than 0 and at most 3600 seconds.")
    for key in ("upstream_model", "api_key_env"):
        if getattr(model, key) == "":
            raise ConfigError(f"models.{name}.{key}: is empty.", hint="Remove it, or write a name.")
    cost = taken(f"models.{name}.cost_per_hour", lambda: parse_amount(model.cost_per_hour))
    if cost < 0:
        raise ConfigError(f"models.{name}.cost_per_hour: a cost is zero or more.")


def _check_hedge(name: str, model: ModelConfig) -> None:
    if model.hedge_seconds is None:
        return
    if not 0.01 <= model.hedge_seconds <= 3600:
        raise ConfigError(f"models.{name}.hedge_seconds: is from 0.01 to 3600 seconds.")
    if model.engine not in OWN_ENGINES and model.on_disconnect != "abort":
        raise ConfigError(
            f"models.{name}.hedge_seconds: an upstream bills both answers.",
            hint='Leave it out; where the upstream is an engine of your own, say on_disconnect = "abort".',
        )


def _is_address(text: str) -> bool:
    """Whether an HTTP client can go there. The gateway processes would find out too, but only once they start."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
