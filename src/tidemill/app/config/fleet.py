"""What the configuration says of the fleet: nodes, devices, and how models share them. See docs/fleet.md."""

from typing import TYPE_CHECKING, Literal

import msgspec

from tidemill.errors import ConfigError

if TYPE_CHECKING:
    from tidemill.app.config.models import ModelConfig
    from tidemill.app.config.platform import Config

OWN_ENGINES = ("llamacpp", "vllm", "sglang")
"""Engines that are processes of ours; all others are somebody else's."""
GPU_ENGINES = ("vllm", "sglang")
MAX_REPLICAS = 64
MAX_DEVICES = 4096

Filler = Literal["inside", "beside"]


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


def replica_bounds(model: "ModelConfig") -> tuple[int, int]:
    """The fewest and the most replicas that a model has."""
    low = model.replicas if model.min_replicas is None else model.min_replicas
    high = max(model.replicas, low) if model.max_replicas is None else model.max_replicas
    return low, high


def check_fleet(config: "Config") -> None:
    """All that the fleet needs to fit together. Raises ConfigError."""
    fleet = config.fleet
    for key, low, high in (
        ("start_seconds", 1, 86_400),
        ("health_seconds", 2, 3_600),
        ("drain_seconds", 0, 86_400),
        ("log_mib", 1, 65_536),
    ):
        value = getattr(fleet, key)
        if not low <= value <= high:
            raise ConfigError(f"fleet.{key}: {value:g} is out of range; it is from {low} to {high}.")
    for name, node in config.nodes.items():
        for entry in node.devices:
            if not 1 <= entry.count <= MAX_DEVICES:
                raise ConfigError(f"nodes.{name}.devices: a count of {entry.count}; it is from 1 to {MAX_DEVICES}.")
            if not 0 <= entry.memory_gib <= 65_536:
                raise ConfigError(f"nodes.{name}.devices: memory_gib is from 0 to 65536.")
    for name, model in config.models.items():
        if model.sleepers and fleet.backend == "ray":
            raise ConfigError(
                f"models.{name}.sleepers: Ray keeps the devices of a process that sleeps to itself.",
                hint="Remove the key.",
            )
        if model.engine in OWN_ENGINES:
            _check_own(f"models.{name}", model)
        else:
            _check_foreign(f"models.{name}", model)


_OF_OWN: dict[str, object] = {
    "devices": None,
    "kinds": (),
    "min_replicas": None,
    "max_replicas": None,
    "filler": None,
    "version": "",
    "sleepers": 0,
}
"""Keys of engines of our own, and what they are when nobody has set them."""


def _check_foreign(key: str, model: "ModelConfig") -> None:
    _check_launch(key, model)
    for field, unset in _OF_OWN.items():
        if getattr(model, field) != unset:
            raise ConfigError(
                f"{key}.{field}: the engine {model.engine} is somebody else's to run.", hint="Remove the key."
            )


def _check_own(key: str, model: "ModelConfig") -> None:
    low, high = replica_bounds(model)
    if not 0 <= low <= MAX_REPLICAS:
        raise ConfigError(f"{key}.min_replicas: {low} is out of range; it is from 0 to {MAX_REPLICAS}.")
    if not max(low, 1) <= high <= MAX_REPLICAS:
        raise ConfigError(
            f"{key}.max_replicas: {high} is out of range; it is from {max(low, 1)}, which it has at least,"
            f" to {MAX_REPLICAS}."
        )
    if model.devices is not None and not 1 <= model.devices <= MAX_DEVICES:
        raise ConfigError(f"{key}.devices: {model.devices} is out of range; it is from 1 to {MAX_DEVICES}.")
    for field, least, most in (("scale_down_seconds", 0, 86_400), ("wake_seconds", 1, 3_600)):
        value = getattr(model, field)
        if not least <= value <= most:
            raise ConfigError(f"{key}.{field}: {value:g} is out of range; it is from {least} to {most} seconds.")
    if not -1_000 <= model.priority <= 1_000:
        raise ConfigError(f"{key}.priority: {model.priority} is out of range; it is from -1000 to 1000.")
    if not 0 <= model.sleepers <= MAX_REPLICAS:
        raise ConfigError(f"{key}.sleepers: {model.sleepers} is out of range; it is from 0 to {MAX_REPLICAS}.")
    if model.sleepers and model.engine not in GPU_ENGINES:
        raise ConfigError(f"{key}.sleepers: only vllm and sglang can sleep.", hint="Remove the key.")
    if len(model.version) > 100 or not model.version.isprintable():
        raise ConfigError(f"{key}.version: is at most 100 printable characters.")
    _check_launch(key, model)
    objective = model.objective
    for field, value in (("ttft_seconds", objective.ttft_seconds), ("tpot_seconds", objective.tpot_seconds)):
        if not 0 < value <= 3_600:
            raise ConfigError(f"{key}.objective.{field}: is more than 0 and at most 3600 seconds.")
    if not 0 < objective.percentile < 1:
        raise ConfigError(f"{key}.objective.percentile: is between 0 and 1, such as 0.95.")


def _check_launch(key: str, model: "ModelConfig") -> None:
    launch = model.launch
    if model.engine not in GPU_ENGINES:
        if launch != LaunchConfig():
            raise ConfigError(f"{key}.launch: is for the engines {' and '.join(GPU_ENGINES)}.", hint="Remove it.")
        return
    for field in ("tp", "pp", "dp", "max_sequences", "prefill_chunk"):
        value = getattr(launch, field)
        if value is not None and not 1 <= value <= 1_000_000:
            raise ConfigError(f"{key}.launch.{field}: {value} is out of range; it is at least 1.")
    if launch.memory_share is not None and not 0 < launch.memory_share <= 1:
        raise ConfigError(f"{key}.launch.memory_share: is more than 0 and at most 1, such as 0.9.")
    needed = launch.tp * launch.pp * launch.dp
    if model.devices is not None and model.devices != needed:
        raise ConfigError(
            f"{key}.devices: {model.devices}, but tp x pp x dp is {needed}.", hint="Leave `devices` out, or change one."
        )
