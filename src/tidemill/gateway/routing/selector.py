"""Route selection: which models may answer a request, in which order, and on which replicas.

The order is the split's arm, the model itself, its fallbacks; a model that would be sold below its cost is left out
(docs/routing.md). Among replicas `tides.routing` decides. A model with one replica and no alternatives needs no
decision.
"""

from tidemill.engines.capabilities import refusal
from tidemill.engines.sse import BYTES_PER_TOKEN
from tidemill.gateway.errors import BadRequest
from tidemill.gateway.routing.demand import DemandCounter
from tidemill.gateway.routing.models import ModelRoute, ModelRoutes
from tidemill.gateway.routing.prefix_index import Keys, matched_bytes, prompt_keys
from tidemill.gateway.routing.replica import ReplicaAttempt, RoutedReplica, spread_key
from tidemill.gateway.routing.request_context import RequestContext
from tidemill.ledger.pricing import PriceTier, covers
from tidemill.tides.routing import ReplicaCandidate, ReplicaHealth, arm, choose, home

MAX_SESSION_BYTES = 512
"""A longer session id is no session id."""

_WITH_QUEUE = (ReplicaHealth.FULL, ReplicaHealth.AVOID)
_WITH_OVERFLOW = (ReplicaHealth.READY, ReplicaHealth.FULL, ReplicaHealth.AVOID)
"""Worst acceptable health; each level is tried on all models before the next."""


class RouteSelector:
    """Selects the models and replicas for one request. `route` is that of the current attempt."""

    __slots__ = (
        "_asked",
        "_context",
        "_filler",
        "_keys",
        "_prompt",
        "_routes",
        "_tried",
        "route",
        "waited_us",
    )

    def __init__(self, routes: ModelRoutes, context: RequestContext) -> None:
        self.route = self._asked = context.route
        self._routes = routes
        self._context = context
        self._filler = context.principal.tier is PriceTier.BATCH
        self.waited_us = 0
        """What it has waited for a replica to be started."""
        self._prompt = context.request.body_bytes // BYTES_PER_TOKEN
        self._keys: Keys | None = None
        self._tried: list[RoutedReplica] = []

    @property
    def has_alternatives(self) -> bool:
        """True if there may be another replica than that of the first attempt."""
        spec = self._asked.spec
        return bool(len(self._asked.ordinary) > 1 or spec.fallbacks or spec.split)

    @property
    def demand(self) -> DemandCounter | None:
        """The counter of the demand of the request; None for a batch line, which is not counted."""
        return None if self._filler else self._asked.demand

    @property
    def rerouted(self) -> bool:
        """True if the current attempt is on another model than the requested one."""
        return self.route is not self._asked

    def first(self) -> ReplicaAttempt:
        """The first attempt. Raises NoReplica."""
        replica = self._asked.only_replica
        if replica is not None and not (self._filler and self._asked.batch_only):
            self.route = self._asked
            return ReplicaAttempt(replica, self._prompt, filler=self._filler)
        now = self._routes.loop.time()
        attempt = self._choose(_WITH_OVERFLOW if self._asked.spec.overflow else _WITH_QUEUE, now)
        if attempt is None:
            raise self._asked.no_replica(now)
        return attempt

    async def woken(self) -> bool:
        """Wait for a replica of the model to start; False if the client leaves meanwhile. Raises."""
        began = self._routes.loop.time()
        try:
            return await self._routes.activator.woken(self._asked, self._context.exchange)
        finally:
            self.waited_us = round((self._routes.loop.time() - began) * 1e6)

    def another(self, failed: RoutedReplica) -> ReplicaAttempt | None:
        """An attempt on a healthy, untried replica, or None. `route` is then that of the new attempt."""
        self._tried.append(failed)
        return self._choose(_WITH_QUEUE[:1], self._routes.loop.time())

    def hedge(self, first: RoutedReplica) -> ReplicaAttempt | None:
        """An attempt on another replica of the model with a free slot, while the first one goes on."""
        self._tried.append(first)
        try:
            return self._choose_replica(self.route, ReplicaHealth.READY, self._routes.loop.time())
        finally:
            self._tried.pop()

    def _choose(self, steps: tuple[ReplicaHealth, ...], now: float) -> ReplicaAttempt | None:
        candidates = self._candidates()
        for worst in steps:
            for route in candidates:
                attempt = self._choose_replica(route, worst, now)
                if attempt is not None:
                    self.route = route
                    return attempt
        return None

    def _candidates(self) -> list[ModelRoute]:
        """The models that may answer, in order of preference."""
        asked = self._asked
        spec = asked.spec
        candidates = [asked]
        if spec.split:
            name = arm(self._split_key(), spec.split)
            target = self._routes.by_name.get(name) if name is not None else None
            if target is not None and self._may_sell(target) and self._fits(target):
                candidates.insert(0, target)
        if self._context.request.ask.generates:  # vectors of another model would be of another space
            for name in spec.fallbacks:
                target = self._routes.by_name.get(name)
                if target is not None and target not in candidates and self._may_sell(target) and self._fits(target):
                    candidates.append(target)
        return candidates

    def _may_sell(self, route: ModelRoute) -> bool:
        """True if what the tenant pays covers the cost of this model, or loss is allowed.

        It pays the price of the model that it asked for.
        """
        cost = route.spec.cost
        if cost is None or self._asked.spec.allow_loss:
            return True
        return cost.currency == self._context.principal.currency and covers(self._context.price.price, cost.price)

    def _fits(self, route: ModelRoute) -> bool:
        """True if the model supports all that the request asks for, so that failover does not refuse it."""
        spec = route.spec
        if spec.context is not None and self._prompt + (self._context.request.ask.max_tokens or 0) >= spec.context:
            return False
        try:
            return refusal(route.engine, spec.lacks, self._context.request.ask_for(route.engine)) is None
        except BadRequest:
            return False

    def _choose_replica(self, route: ModelRoute, worst: ReplicaHealth, now: float) -> ReplicaAttempt | None:
        slots = route.spec.slots
        replicas = route.open_to(self._filler)
        if not replicas:
            return None
        if len(replicas) == 1:
            (replica,) = replicas
            if replica in self._tried or replica.health(now, slots, replica.load()[1]) > worst:
                return None
            return ReplicaAttempt(replica, self._prompt, filler=self._filler)
        loads = [each.load() for each in replicas]
        healths = [
            ReplicaHealth.DOWN if each in self._tried else each.health(now, slots, active)
            for each, (_, active) in zip(replicas, loads, strict=True)
        ]
        if min(healths) > worst:
            return None
        self._routes.hear()
        if self._keys is None:
            self._keys = prompt_keys(self._context.request.ask)
        keys = self._keys
        cached = [matched_bytes(each.prefix.match(keys)) // BYTES_PER_TOKEN for each in replicas] if keys else None
        session = self._session()
        at_home = home(session, [each.seat for each in replicas]) if session is not None else -1
        views = [
            ReplicaCandidate(
                health=healths[index],
                cached=0 if cached is None else cached[index],
                in_flight=loads[index][0],
                held=len(each.prefix),
                home=index == at_home,
            )
            for index, each in enumerate(replicas)
        ]
        chosen = choose(views, self._prompt, worst=worst)
        if chosen is None:
            return None
        return ReplicaAttempt(replicas[chosen], self._prompt, views[chosen].cached, keys, filler=self._filler)

    def _session(self) -> int | None:
        """The session that the client names, within its tenant.

        Requests that share a session share a home.
        """
        given = self._context.exchange.headers.get(b"x-session-id")
        if given is None:
            raw = self._context.request.session()
            given = None if raw is None else bytes(raw)
        if not given or given == b"null" or len(given) > MAX_SESSION_BYTES:
            return None
        return spread_key(b"%b\0%b" % (self._context.principal.tenant_id.encode(), given))

    def _split_key(self) -> int:
        """The key for a weighted split; all requests of a session get the same arm.

        Without one, the tenant does (for vectors always: they must be comparable).
        """
        session = self._session() if self._context.request.ask.generates else None
        if session is None:
            session = spread_key(self._context.principal.tenant_id.encode())
        return spread_key(b"%b\0%d" % (self._asked.spec.name.encode(), session))
