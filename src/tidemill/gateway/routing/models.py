"""Models and the replicas that serve them, as this gateway process knows them."""

import asyncio
from collections.abc import Collection

import msgspec

from tidemill.engines.protocol import Engine
from tidemill.engines.registry import ENGINES, engine_of
from tidemill.gateway.errors import ModelNotFound, NoReplica
from tidemill.gateway.routing.cold_start import Activator
from tidemill.gateway.routing.demand import DemandCounter, DemandReport, ModelSeen, ReplicaUse
from tidemill.gateway.routing.prefix_index import Keys
from tidemill.gateway.routing.replica import ReplicaSpec, RoutedReplica
from tidemill.gateway.routing.shared_state import SharedReplicaState
from tidemill.http.client import EngineAddress
from tidemill.ledger.pricing import Price
from tidemill.suggestions import did_you_mean
from tidemill.tides.state import Objective

__all__ = ["ModelCost", "ModelRoute", "ModelRoutes", "ModelSpec", "NoReplica", "ReplicaSpec", "RoutedReplica"]


class ModelCost(msgspec.Struct, frozen=True):
    """What an upstream charges the operator."""

    currency: str
    price: Price


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
    hedge_seconds: float | None = None
    """A stream that has not begun after so long is asked for at a second replica as well (`gateway.proxy.hedge`)."""
    slots: int | None = None
    """Requests that a replica works on at a time, where that is known; more wait there."""
    max_concurrent: int | None = None
    """Requests that all replicas work on at a time; more wait in the gateways (`gateway.admission.fair_queue`)."""
    max_queued: int = 1024
    queue_seconds: float = 60.0
    aliases: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    """Models that answer for this one when it cannot, in this order."""
    overflow: bool = False
    """They do so also when all replicas of this one are full."""
    split: tuple[tuple[str, float], ...] = ()
    """Models that get a share of this one's requests, and the share in percent."""
    lacks: tuple[str, ...] = ()
    """Parameters that the model's chat template has no place for, where the engine tells."""
    embeds: bool = True
    """It gives embeddings, as far as is known; an upstream answers for itself."""
    ranks: bool = True
    """It ranks documents, likewise."""
    cost: ModelCost | None = None
    """None: no token of it costs anything by itself."""
    allow_loss: bool = False
    """Another model may answer for this one also when that costs more than the tenant pays."""
    objective: Objective = Objective()
    wakes: bool = False
    """A request for it that finds no replica waits for one to be started (`gateway.routing.cold_start`)."""
    wake_seconds: float = 120.0
    """How long."""
    priority_scheduling: bool = False
    """Its engine was told to take people's requests before the lines of batches."""


HEDGE_SHARE = 0.05
"""Of a model's requests at most so many are asked twice: when all replicas are slow, twice the work helps nobody."""
HEDGE_BURST = 10.0
"""So many may be at once."""


class HedgeBudget:
    """The budget of hedges of a model."""

    def __init__(self) -> None:
        self._left = HEDGE_BURST

    def earn(self) -> None:
        """Add the share of a hedge that one request earns."""
        self._left = min(self._left + HEDGE_SHARE, HEDGE_BURST)

    def spend(self) -> bool:
        """Spend one hedge; False if none is left."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class ModelRoute:
    """A model's route: how to speak to its engine, and its replicas."""

    def __init__(self, spec: ModelSpec, loop: asyncio.AbstractEventLoop) -> None:
        self.spec = spec
        self.engine: Engine = engine_of(spec.engine, owned=spec.owned, priority_scheduling=spec.priority_scheduling)
        self.demand = DemandCounter(spec.objective)
        self.hedges = HedgeBudget()
        self._take([self._replica(replica, spec, loop) for replica in spec.replicas])

    def _replica(self, replica: ReplicaSpec, spec: ModelSpec, loop: asyncio.AbstractEventLoop) -> RoutedReplica:
        return RoutedReplica(replica, EngineAddress(replica.base_url, self.engine.auth_headers(spec.api_key)), loop)

    def _take(self, replicas: list[RoutedReplica]) -> None:
        self.replicas = replicas
        """All of them."""
        self.ordinary = [replica for replica in replicas if not replica.spec.batch_only]
        """Those that people's requests may go to."""
        self.batch_only = [replica for replica in replicas if replica.spec.batch_only]

    def open_to(self, filler: bool) -> list[RoutedReplica]:
        """The replicas that a request may go to.

        A batch's line (`filler`) keeps to those that are lent to batches, as long as there is one.
        """
        return self.batch_only if filler and self.batch_only and self.lends else self.ordinary

    @property
    def lends(self) -> bool:
        """True if a replica is lent to batches now."""
        return any(replica.spec.ready for replica in self.batch_only)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def ready(self) -> bool:
        return any(replica.spec.ready for replica in self.ordinary)

    @property
    def asleep(self) -> bool:
        """True if the model has no replica, and a waiting request starts one."""
        return self.spec.wakes and not self.ready

    @property
    def state(self) -> str:
        """`ready`, `asleep` (the next request wakes it) or `starting`."""
        if self.ready:
            return "ready"
        return "asleep" if self.spec.wakes else "starting"

    @property
    def wake_seconds(self) -> float:
        return self.spec.wake_seconds

    @property
    def max_waiting(self) -> int:
        return self.spec.max_queued

    @property
    def active(self) -> int:
        """Requests in flight from this gateway process, except at replicas lent to batches."""
        return sum(replica.clock.active for replica in self.ordinary)

    @property
    def decides(self) -> bool:
        """True if a request's replica depends on the replicas' state."""
        return len(self.ordinary) > 1 or self.spec.overflow

    @property
    def only_replica(self) -> RoutedReplica | None:
        """The single replica for interactive requests; None if one must be selected."""
        spec = self.spec
        if len(self.ordinary) != 1 or spec.overflow or spec.split:
            return None
        replica = self.ordinary[0]
        if not replica.spec.ready:
            return None
        return replica if replica.breaker.calm else None

    def pick(self) -> RoutedReplica:
        """A ready replica with the fewest requests in flight, for small work beside the requests.

        Raises NoReplica.
        """
        ready = [replica for replica in self.ordinary if replica.spec.ready]
        if not ready:
            raise self.no_replica(0.0)
        return min(ready, key=lambda replica: replica.clock.active)

    def no_replica(self, now: float) -> NoReplica:
        """The error when no replica is left, with the time until one may be ready."""
        starting = not self.ready and ENGINES[self.spec.engine].runs_here
        what = "is starting" if starting else "cannot be reached now"
        waits = [replica.breaker.opens_in(now) for replica in self.ordinary if replica.spec.ready]
        return NoReplica(f"The model {self.spec.name!r} {what}.", retry_after_s=max(1, round(min(waits, default=1.0))))

    def update(self, spec: ModelSpec, loop: asyncio.AbstractEventLoop) -> None:
        """Apply the supervisor's announcement; a replica that stays keeps its connections."""
        known = {
            (replica.spec.name, replica.spec.incarnation, replica.spec.base_url): replica for replica in self.replicas
        }
        replicas = []
        for each in spec.replicas:
            replica = known.pop((each.name, each.incarnation, each.base_url), None)
            if replica is None:
                replica = self._replica(each, spec, loop)
            replica.spec = each
            replicas.append(replica)
        for gone in known.values():
            gone.pool.close_idle()
            gone.share(None, 0)
        self.spec = spec
        self.demand.aim(spec.objective)
        self._take(replicas)


class ModelRoutes:
    """All models of this gateway process."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, board: SharedReplicaState | None = None, processes: int = 1
    ) -> None:
        """With a `board` the gateway processes of a machine (`processes`) share what they know of replicas."""
        self.loop = loop
        self._board = board
        self.activator = Activator(loop, processes)
        self._by_board_id: dict[int, RoutedReplica] = {}
        self.by_name: dict[str, ModelRoute] = {}
        """By the model's own name."""
        self._by_any_name: dict[str, ModelRoute] = {}

    def update(self, specs: list[ModelSpec]) -> None:
        """Replace all models by the supervisor's announcement."""
        routes = {}
        for spec in specs:
            route = self.by_name.get(spec.name)
            if route is None or route.spec.engine != spec.engine:
                route = ModelRoute(spec, self.loop)
            else:
                route.update(spec, self.loop)
            routes[spec.name] = route
        self.by_name = routes
        if self._board is not None:
            # The order is the same in all processes, as the configuration is.
            replicas = [replica for route in routes.values() if route.decides for replica in route.replicas]
            for row, replica in enumerate(replicas):
                replica.share(self._board, row)
            self._by_board_id = {replica.board_id: replica for replica in replicas}
        aliases = {alias: route for route in routes.values() for alias in route.spec.aliases}
        self._by_any_name = aliases | routes
        self.activator.update(routes)

    @property
    def names(self) -> Collection[str]:
        """All names that a model can be asked for by: its own, and its aliases."""
        return self._by_any_name.keys()

    def find(self, name: str) -> ModelRoute:
        """The route of a model, by its name or an alias. Raises ModelNotFound with the nearest name."""
        route = self._by_any_name.get(name)
        if route is None:
            hint = did_you_mean(name[:128], self._by_any_name) or "GET /v1/models lists the models."
            raise ModelNotFound(f"The model {name[:128]!r} does not exist.", hint=hint, param="model")
        return route

    def hear(self) -> None:
        """Note the prefixes that the other gateway processes sent to replicas."""
        if self._board is not None:
            self._board.hear(self._heard)

    def _heard(self, board_id: int, keys: Keys) -> None:
        replica = self._by_board_id.get(board_id)
        if replica is not None:
            replica.prefix.note(keys)

    def take_load(self) -> DemandReport:
        """The load now, and the traffic since the last call."""
        replicas: dict[str, ReplicaUse] = {}
        seen: dict[str, ModelSeen] = {}
        for name, route in self.by_name.items():
            of_model = route.demand.take()
            if of_model is not None:
                seen[name] = of_model
            for replica in route.replicas:
                active, done = replica.clock.active, replica.done
                if active or done:
                    replicas[replica.spec.name] = ReplicaUse(active - replica.filler, replica.filler, done)
                    replica.done = 0
        return DemandReport(replicas, seen)

    def sweep(self, now: float) -> None:
        self.hear()
        for route in self.by_name.values():
            for replica in route.replicas:
                replica.pool.sweep(now)
