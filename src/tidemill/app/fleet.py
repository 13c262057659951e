"""The fleet as the platform runs it.

Replicas of our own and upstreams, and both as the gateways shall know them.
"""

import asyncio
import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.engine_http import get, post, status_of
from tidemill.app.nodes import find_devices
from tidemill.app.probes import UpstreamProbe, root_of
from tidemill.app.recipes import recipes_of
from tidemill.engines.protocol import Counters
from tidemill.engines.registry import engine_of
from tidemill.errors import ConfigError
from tidemill.fleet.local import LocalBackend
from tidemill.fleet.ray import RayBackend
from tidemill.fleet.replica import Replica
from tidemill.fleet.replicas import ReplicaSet
from tidemill.gateway.routing.models import ModelCost, ModelSpec, ReplicaSpec
from tidemill.tides.state import Objective

log = structlog.get_logger()

Sample = tuple[str, str | None, Counters]
"""What an engine has counted: its replica, its incarnation, and the totals."""
Keep = Callable[[list[Sample]], object]


class Fleet:
    """The engines of all configured models."""

    def __init__(self, config: Config, config_dir: Path, data: DataDir, changed: Callable[[], None]) -> None:
        self._config = config
        self._keys = {name: api_key(name, model) for name, model in config.models.items()}
        self.upstreams: dict[str, UpstreamProbe] = {}
        for name, model in config.models.items():
            for index, url in enumerate(model.addresses):
                engine = engine_of(model.engine)
                probe = UpstreamProbe(
                    f"{name}/{index}",
                    url,
                    engine.auth_headers(self._keys[name]),
                    engine.probes,
                    every_s=model.probe_seconds,
                    changed=changed,
                    get=status_of,
                )
                self.upstreams[probe.name] = probe
        self.backend = backend_of(config, data)
        self.replicas = ReplicaSet(
            self.backend,
            recipes_of(config, config_dir),
            get=get,
            post=post,
            logs=data.path.resolve() / "logs",
            changed=changed,
            on_drained=self._on_drained,
        )
        self.keep: Keep | None = None
        """Stores what a replica has counted before it ends."""

    @property
    def local(self) -> Mapping[str, Replica]:
        """The replicas of our own, by name."""
        return self.replicas.replicas

    async def start(self) -> None:
        """Start all of it; returns before it is ready. Raises ConfigError when devices are declared wrongly."""
        if isinstance(self.backend, LocalBackend):
            self.backend.devices = await asyncio.to_thread(find_devices, self._config)
        await self.replicas.open()
        for probe in self.upstreams.values():
            probe.start()

    async def stop(self) -> None:
        """End the engines at once."""
        await asyncio.gather(self.replicas.close(), *(probe.stop() for probe in self.upstreams.values()))

    def specs(self) -> list[ModelSpec]:
        """The models as they stand now."""
        return [self._spec(name, model) for name, model in self._config.models.items()]

    def _spec(self, name: str, model: ModelConfig) -> ModelSpec:
        own = name in self.replicas.recipes
        engines = self.replicas.of(name)
        if own:
            replicas = [
                ReplicaSpec(engine.name, engine.base_url, engine.ready, engine.incarnation, engine.batch_only)
                for engine in engines
            ]
        else:
            probes = [self.upstreams[f"{name}/{index}"] for index in range(len(model.addresses))]
            replicas = [ReplicaSpec(probe.name, probe.base_url, probe.ready) for probe in probes]
        cost = model.cost.price() if model.cost is not None else None
        low, _ = model.replica_bounds
        return ModelSpec(
            name=name,
            engine=model.engine,
            replicas=tuple(replicas),
            upstream_model=model.upstream_model or name,
            api_key=self._keys[name],
            owned=own or model.on_disconnect == "abort",
            context=model.context or model.kind.default_context,
            max_output_tokens=model.max_output_tokens,
            drain_seconds=model.drain_seconds,
            ttft_timeout_seconds=model.ttft_timeout_seconds,
            hedge_seconds=model.hedge_seconds,
            idle_timeout_seconds=model.idle_timeout_seconds,
            slots=model.slots if own else None,
            max_concurrent=max_concurrent(model, ready=sum(each.ready and not each.batch_only for each in replicas)),
            max_queued=model.max_queued,
            queue_seconds=model.queue_seconds,
            lacks=next((engine.lacks for engine in engines if engine.ready), engines[0].lacks if engines else ()),
            embeds=model.kind.embeds or bool(model.embeddings),
            ranks=model.kind.ranks or model.reranking,
            aliases=model.aliases,
            fallbacks=model.fallbacks,
            overflow=model.overflow,
            split=tuple(model.split.items()),
            cost=ModelCost(self._config.currency, cost) if cost is not None and any(cost.rates.values()) else None,
            allow_loss=model.allow_loss,
            objective=objective_of(model),
            wakes=own and low == 0 and not any(engine.stuck for engine in engines),  # else nobody would be answered
            wake_seconds=model.wake_seconds,
            priority_scheduling=model.kind.launcher is not None and model.launch.priority_scheduling,
        )

    async def counters(self) -> list[Sample]:
        """The token counters of every engine that has them: (replica, incarnation, totals)."""
        found = []
        for spec in self.specs():
            for replica in spec.replicas:
                if replica.ready:
                    found += await self._count(spec, replica.name, replica.base_url, replica.incarnation)
        return found

    async def _count(self, spec: ModelSpec, replica: str, base_url: str, incarnation: str) -> list[Sample]:
        engine = engine_of(spec.engine)
        page = await get(root_of(base_url), b"/metrics", 5.0, engine.auth_headers(spec.api_key))
        counters = engine.counters(page.decode(errors="replace")) if page is not None else None
        return [(replica, incarnation or None, counters)] if counters is not None else []

    async def _on_drained(self, replica: Replica) -> None:
        """Read the counters of a replica that is about to end.

        Else its records could not be reconciled.
        """
        if self.keep is None:
            return
        spec = self._spec(replica.model, self._config.models[replica.model])
        samples = await self._count(spec, replica.name, replica.base_url, replica.incarnation)
        if samples:
            await asyncio.to_thread(self.keep, samples)


def backend_of(config: Config, data: DataDir) -> LocalBackend | RayBackend:
    """Where engines and jobs run. Raises ConfigError when Ray is asked for and not installed."""
    if config.fleet.backend == "ray":
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("fleet.backend: Ray is not installed.", hint="Install tidemill[ray].")
        return RayBackend(config.fleet.ray_address, log_fd=lambda: data.log_file("ray"))
    return LocalBackend(
        (),
        owner=hashlib.blake2b(str(data.path.resolve()).encode(), digest_size=8).hexdigest(),
        secret=[model.api_key_env for model in config.models.values() if model.api_key_env is not None],
        log_bytes=config.fleet.log_mib * 2**20,
    )


def objective_of(model: ModelConfig) -> Objective:
    """What the model's latency is measured against."""
    given = model.objective
    return Objective(given.ttft_seconds, given.tpot_seconds, given.percentile)


def max_concurrent(model: ModelConfig, *, ready: int) -> int | None:
    """How many requests a model works on at a time, before the gateways let the next wait; None: no bound."""
    if model.max_concurrent is not None:
        return model.max_concurrent or None
    slots = model.slots
    return slots * max(ready, 1) if slots is not None and not model.overflow else None


def api_key(name: str, model: ModelConfig) -> str | None:
    """The API key of an upstream. Raises ConfigError when its environment variable is not set."""
    if model.api_key_env is None:
        return None
    key = os.environ.get(model.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"models.{name}.api_key_env: the environment variable {model.api_key_env} is not set.",
            hint="Set it before `tidemill up`, or remove the key.",
        )
    return key
