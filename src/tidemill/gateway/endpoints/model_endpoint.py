"""Inference requests, in order: authenticate, route, admit, then proxy.

The engine's part is in `gateway.proxy.fast_path` and `gateway.proxy.slow_path`.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from tidemill.engines.capabilities import refusal
from tidemill.gateway.admission.admission import Admission, Admitted
from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.auth.snapshot import Principal
from tidemill.gateway.errors import NoEmbeddings, NoRanking, NoReplica, UnsupportedParameter
from tidemill.gateway.protocols.reply import Reply
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.proxy.engine_errors import counted_prompt
from tidemill.gateway.proxy.fast_path import Guard, try_fast
from tidemill.gateway.proxy.inflight import GatewayMeter, InFlightRequest
from tidemill.gateway.proxy.slow_path import JSON, MAX_ERROR_BYTES, run
from tidemill.gateway.routing.models import ModelRoute, ModelRoutes, RoutedReplica
from tidemill.gateway.routing.replica import ReplicaAttempt
from tidemill.gateway.routing.request_context import RequestContext
from tidemill.gateway.routing.selector import RouteSelector
from tidemill.http.client import EngineLost
from tidemill.http.server import Exchange
from tidemill.ledger.pricing import PriceTier

__all__ = ["JSON", "ModelEndpoint", "ModelOperation", "count_prompt", "refuse_what_is_ignored"]

COUNT_TIMEOUT_S = 10.0


class ModelOperation(msgspec.Struct, frozen=True):
    """An inference endpoint: how its requests are read, and how its answers are written."""

    name: str
    read: Callable[[bytes], ModelRequest]
    reply: Callable[[ModelRequest, str], Reply]
    """Takes the request's id, too."""


Prepare = Callable[[ModelRequest, Principal], Awaitable[None]]


class ModelEndpoint:
    """One operation of one gateway process."""

    def __init__(
        self,
        operation: ModelOperation,
        authenticator: Authenticator,
        routes: ModelRoutes,
        admission: Admission,
        meter: GatewayMeter,
        *,
        prepare: Prepare | None = None,
    ) -> None:
        """`prepare` completes a request with what the store knows."""
        self._operation = operation
        self._prepare = prepare
        self._authenticator = authenticator
        self._routes = routes
        self._admission = admission
        self._meter = meter

    def begin(self, exchange: Exchange, guard: Guard) -> Coroutine[Any, Any, None] | None:
        """Answer one request; returns what remains to be awaited. Raises TidemillError if it is refused."""
        principal = self._authenticator.admit(exchange)
        if principal is None or self._prepare is not None:
            return self(exchange)
        context = self._context(exchange, self._operation.read(exchange.body), principal)
        selector = RouteSelector(self._routes, context)
        inflight = self._start_now(context, selector)
        return self._wait_and_run(context, selector) if inflight is None else try_fast(inflight, guard)

    async def __call__(self, exchange: Exchange) -> None:
        """The same, waiting for all that there is to wait for."""
        principal = await self._authenticator.authenticate(exchange)
        request = self._operation.read(exchange.body)
        if self._prepare is not None:
            await self._prepare(request, principal)
        context = self._context(exchange, request, principal)
        selector = RouteSelector(self._routes, context)
        inflight = self._start_now(context, selector)
        await (self._wait_and_run(context, selector) if inflight is None else run(inflight))

    def _context(self, exchange: Exchange, request: ModelRequest, principal: Principal) -> RequestContext:
        """Find the model and its price. Raises ModelNotFound, BadRequest, NotAllowed."""
        route = self._routes.find(request.model)
        request.model = route.spec.name  # from here on, whichever of its names was used
        if principal.tier is PriceTier.BATCH:
            request.ask.filler = True
        request.prepare_for(route.engine, exchange.headers)
        refuse_what_is_ignored(request, route)
        return RequestContext(exchange, request, principal, route, self._authenticator.price(request.model, principal))

    def _start_now(self, context: RequestContext, selector: RouteSelector) -> InFlightRequest | None:
        """Admit a request without waiting and open its record; None if it must wait."""
        try:
            attempt = selector.first()
        except NoReplica:
            if not context.route.asleep:
                raise
            return None
        admitted = self._admission.admit_now(context)
        return None if admitted is None else self._open(context, selector, attempt, admitted)

    async def _wait_and_run(self, context: RequestContext, selector: RouteSelector) -> None:
        """Admit a request, waiting as needed, and answer it. Returns early if the client leaves."""
        try:
            attempt = selector.first()
        except NoReplica:
            if not context.route.asleep:
                raise
            if not await selector.woken():
                return
            attempt = selector.first()
        admitted = self._admission.admit_now(context)
        if admitted is None:
            route, replica = selector.route, attempt.replica
            admitted = await self._admission.admit(context, lambda: count_prompt(context.request, route, replica))
            if admitted is None:
                return
            try:
                attempt = selector.first()  # others have been admitted meanwhile
            except BaseException:
                admitted.cancel(self._meter.leasing)
                raise
        await run(self._open(context, selector, attempt, admitted))

    def _open(
        self, context: RequestContext, selector: RouteSelector, attempt: ReplicaAttempt, admitted: Admitted
    ) -> InFlightRequest:
        try:
            reply = self._operation.reply(context.request, context.exchange.request_id)
            return InFlightRequest(self._meter, context, selector, attempt, admitted, reply)
        except BaseException:
            admitted.cancel(self._meter.leasing)
            raise


def refuse_what_is_ignored(request: ModelRequest, route: ModelRoute) -> None:
    """Refuse a request that the model's engine does not support.

    Raises UnsupportedParameter for a parameter that the engine would ignore, NoEmbeddings or NoRanking.
    """
    if request.ask.documents and not route.spec.ranks:
        raise NoRanking(
            f"The model {request.model!r} does not support reranking.",
            hint="Use another model, or ask your operator to set reranking = true for this one.",
            param="model",
        )
    if not (request.ask.generates or request.ask.documents or route.spec.embeds):
        raise NoEmbeddings(
            f"The model {request.model!r} does not support embeddings.",
            hint="Use another model, or ask your operator to set embeddings = true for this one.",
            param="model",
        )
    refused = refusal(route.engine, route.spec.lacks, request.ask)
    if refused is not None:
        name = request.own_name(refused.parameter)
        message = f"The model {request.model!r} does not support '{name}'."
        raise UnsupportedParameter(message, hint=refused.hint, param=name)


async def count_prompt(request: ModelRequest, route: ModelRoute, replica: RoutedReplica) -> int | None:
    """The exact token count of a prompt by the engine; None if it cannot count or does not answer."""
    ask, engine = request.ask_for(route.engine), route.engine
    counting = engine.count(ask, model=route.spec.upstream_model)
    if counting is None:
        return None
    try:
        connection = await replica.pool.request(*counting, COUNT_TIMEOUT_S, headers=engine.headers(ask))
        try:
            answer = await connection.body(MAX_ERROR_BYTES)
        finally:
            connection.release()
    except EngineLost:
        return None
    return counted_prompt(answer) if connection.status == 200 else None
