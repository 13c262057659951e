"""Models and the replicas that serve them."""

import asyncio
import difflib

import msgspec

from tidemill.engines.llamacpp import LlamaCppEngine
from tidemill.engines.openai import OpenAIEngine
from tidemill.engines.protocol import Engine
from tidemill.errors import Unavailable
from tidemill.gateway.errors import ModelNotFound
from tidemill.gateway.upstream import Address, Pool
from tidemill.ledger.costing import BusyClock


class ReplicaSpec(msgspec.Struct, frozen=True):
    """One replica, as the supervisor announces it."""

    name: str
    base_url: str
    ready: bool
    life: str = ""
    """Changes each time the engine is started anew; it names the engine's own counters (see meter.reconcile)."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as the supervisor announces it to the gateway processes."""

    name: str
    engine: str
    replicas: tuple[ReplicaSpec, ...]
    upstream_model: str
    api_key: str | None
    owned: bool
    context: int | None
    max_output_tokens: int
    drain_seconds: float
    ttft_timeout_seconds: float
    idle_timeout_seconds: float


class NoReplica(Unavailable):
    """No replica of the model is ready."""

    code = "model_not_ready"


class Replica:
    """A replica in use: its connections, and how its time is shared among requests."""

    def __init__(self, spec: ReplicaSpec, api_key: str | None, loop: asyncio.AbstractEventLoop) -> None:
        self.spec = spec
        self.pool = Pool(Address(spec.base_url, api_key), loop)
        self.clock = BusyClock()

    @property
    def label(self) -> str:
        """The name that usage records carry: the replica and its life."""
        return f"{self.spec.name}#{self.spec.life}" if self.spec.life else self.spec.name


class Route:
    """A model: how its engine is spoken to, and its replicas."""

    def __init__(self, spec: ModelSpec, loop: asyncio.AbstractEventLoop) -> None:
        self.spec = spec
        self.engine: Engine = LlamaCppEngine() if spec.engine == "llamacpp" else OpenAIEngine(owned=spec.owned)
        self.replicas = [Replica(replica, spec.api_key, loop) for replica in spec.replicas]

    @property
    def ready(self) -> bool:
        return any(replica.spec.ready for replica in self.replicas)

    def pick(self) -> Replica:
        """The ready replica with the fewest requests in flight. Raises NoReplica."""
        ready = [replica for replica in self.replicas if replica.spec.ready]
        if not ready:
            raise NoReplica(f"The model {self.spec.name!r} is starting.", hint="Try again in a few seconds.")
        return min(ready, key=lambda replica: replica.clock.active)

    def update(self, spec: ModelSpec, loop: asyncio.AbstractEventLoop) -> None:
        """Take over what the supervisor announces; a replica that lives on keeps its connections."""
        known = {(replica.spec.name, replica.spec.life, replica.spec.base_url): replica for replica in self.replicas}
        replicas = []
        for each in spec.replicas:
            replica = known.pop((each.name, each.life, each.base_url), None)
            if replica is None:
                replica = Replica(each, spec.api_key, loop)
            replica.spec = each
            replicas.append(replica)
        for gone in known.values():
            gone.pool.close_idle()
        self.spec = spec
        self.replicas = replicas


class Routes:
    """All models of this gateway process."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.by_name: dict[str, Route] = {}

    def update(self, specs: list[ModelSpec]) -> None:
        """Replace what is known by what the supervisor announces."""
        routes = {}
        for spec in specs:
            route = self.by_name.get(spec.name)
            if route is None or route.spec.engine != spec.engine:
                route = Route(spec, self._loop)
            else:
                route.update(spec, self._loop)
            routes[spec.name] = route
        self.by_name = routes

    def find(self, name: str) -> Route:
        """The route of a model. Raises ModelNotFound with the nearest name."""
        route = self.by_name.get(name)
        if route is None:
            near = difflib.get_close_matches(name[:128], self.by_name, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "GET /v1/models lists the models."
            raise ModelNotFound(f"There is no model {name[:128]!r}.", hint=hint, param="model")
        return route

    def sweep(self, now: float) -> None:
        for route in self.by_name.values():
            for replica in route.replicas:
                replica.pool.sweep(now)
