"""The way of a request: door, admission, route, engine, settle. Read it from the top."""

from collections.abc import Awaitable, Callable

import msgspec
import structlog

from tidemill.engines.capabilities import refusal
from tidemill.engines.collect import Collector
from tidemill.engines.protocol import Counts
from tidemill.engines.sse import BrokenStream, usage_of
from tidemill.errors import TidemillError, Unavailable
from tidemill.gateway.admission import Admission
from tidemill.gateway.door import Door
from tidemill.gateway.engine_errors import counted_prompt, engine_error
from tidemill.gateway.errors import UnsupportedParameter, error_headers
from tidemill.gateway.flight import Flight, Meter
from tidemill.gateway.holding import mid_stream_stop, output_bound
from tidemill.gateway.http import ClientGone, Exchange
from tidemill.gateway.replies import Reply
from tidemill.gateway.requests import ModelRequest
from tidemill.gateway.retry import Failure, Refused, judge, retry_after, starts_over
from tidemill.gateway.routing import Replica, Route, Routes
from tidemill.gateway.snapshot import Principal
from tidemill.gateway.upstream import Connection, EngineLost
from tidemill.gateway.way import Way
from tidemill.ledger.usage import Status

log = structlog.get_logger()

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""The longest answer that is taken from an engine in one piece."""
MAX_ERROR_BYTES = 1024 * 1024
COUNT_TIMEOUT_S = 10.0
JSON = b"content-type: application/json\r\n"
EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


class Operation(msgspec.Struct, frozen=True):
    """An endpoint that has a model work: how its requests are read, and how its answers are written."""

    name: str
    read: Callable[[bytes], ModelRequest]
    reply: Callable[[ModelRequest, str], Reply]
    """Takes the request's id, too."""


Prepare = Callable[[ModelRequest, Principal], Awaitable[None]]


class Serve:
    """One operation of one gateway process."""

    def __init__(
        self,
        operation: Operation,
        door: Door,
        routes: Routes,
        admission: Admission,
        meter: Meter,
        *,
        prepare: Prepare | None = None,
    ) -> None:
        """`prepare` completes a request with what the store knows."""
        self._operation = operation
        self._prepare = prepare
        self._door = door
        self._routes = routes
        self._admission = admission
        self._meter = meter

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request. Raises TidemillError when it is refused before an engine was asked."""
        principal = self._door.admit(exchange) or await self._door.ask_store(exchange)
        request = self._operation.read(exchange.body)
        if self._prepare is not None:
            await self._prepare(request, principal)
        route = self._routes.find(request.model)
        request.model = route.spec.name  # from here on, whichever of its names was used
        refuse_what_is_ignored(request, route)
        price = self._door.price(request.model, principal)
        way = Way(self._routes, route, request, principal, price, exchange)
        leg = way.first()
        admitted = self._admission.admit_now(exchange, request, route, principal, price)
        waited = admitted is None
        if admitted is None:
            where = way.route, leg.replica
            count = lambda: count_prompt(request, *where)  # noqa: E731
            admitted = await self._admission.admit(exchange, request, route, principal, price, count)
            if admitted is None:
                return  # the client has left
        try:
            reply = self._operation.reply(request, exchange.request_id)
            if waited:
                leg = way.first()  # others have gone their ways meanwhile
            flight = Flight(self._meter, exchange, request, way, leg, principal, price, admitted, reply)
        except BaseException:
            admitted.cancel(self._meter.leasing)
            raise
        await fly(flight)


def refuse_what_is_ignored(request: ModelRequest, route: Route) -> None:
    """Raise UnsupportedParameter for a parameter that the model's engine would leave out without a word."""
    refused = refusal(route.spec.engine, route.spec.lacks, request.ask)
    if refused is not None:
        name = request.own_name(refused.parameter)
        message = f"{request.model!r} cannot honour '{name}'."
        raise UnsupportedParameter(message, hint=refused.hint, param=name)


async def fly(flight: Flight) -> None:
    """Ask the engine, pass its answer on, settle. Whatever goes wrong, the record is written."""
    exchange = flight.exchange
    try:
        await _ask(flight)
    except Exception as error:
        if not flight.settled:  # a fault of ours; the client pays for no more than what it was sent
            await flight.settle(Status.ENGINE_LOST, *flight.passed())
        if isinstance(error, TidemillError) and not exchange.answered:
            raise
        log.exception("request failed", request_id=exchange.request_id)
        if exchange.answered and not exchange.ended:
            exchange.cut()
        elif not exchange.answered:
            raise


async def _ask(flight: Flight) -> None:
    """Ask an engine, and another one when it fails, as long as nobody pays for that twice (`gateway.retry`)."""
    while True:
        failure = await _attempt(flight)
        judge(flight, failure)
        if failure is None:
            return
        if not starts_over(flight, failure):
            break
    if isinstance(failure, Refused):
        await _engine_refuses(flight, failure)
    else:
        await _fail(flight, failure)


async def _attempt(flight: Flight) -> Failure | None:
    """Ask the engine and pass its answer on; None when the request is settled by it."""
    request, engine, spec = flight.request, flight.route.engine, flight.route.spec
    cap = flight.hold.output_cap
    if flight.way.detours:
        cap = min(cap, output_bound(request, flight.route))
    body = engine.body(request.ask, model=spec.upstream_model, output_cap=cap)
    try:
        connection = await flight.replica.pool.request(request.ask.path, body, flight.time_left(), owner=flight)
    except EngineLost as lost:
        return lost
    try:
        if connection.status != 200:
            return await _refusal(flight, connection)
        if request.ask.stream:
            await _stream(flight, connection)
        elif engine.collects and request.ask.generates:
            await _collect(flight, connection)
        else:
            await _whole(flight, connection)
        if flight.tap.done and not connection.complete:
            await connection.finish(within_s=1.0)
    except (EngineLost, BrokenStream) as lost:
        if flight.settled:
            raise
        connection.abort()
        return lost
    finally:
        connection.release()
    return None


async def _stream(flight: Flight, connection: Connection) -> None:
    """Pass a stream through, event by event; `[DONE]` only once the record is on disk."""
    exchange, tap, reply = flight.exchange, flight.tap, flight.reply
    if not (flight.way.branches and flight.route.engine.owned):
        _begin(exchange)  # else with the first event: until then the request may start over
    while data := await connection.next():
        events = tap.feed(data)
        flight.note()
        if events and not exchange.gone:
            _begin(exchange)
            try:
                exchange.send(reply.events(events, tap.counts))
                if exchange.must_drain:
                    await exchange.drain()
            except ClientGone:
                pass  # `Flight._client_left` has decided what happens to the engine
        if tap.done or flight.over_the_cap:
            break
        if not flight.given_up:
            connection.expire_in(flight.route.spec.idle_timeout_seconds)
    if not tap.done and not connection.complete:
        connection.abort()  # over the cap
    elif not tap.done:
        rest = tap.end()
        flight.note()
        if not tap.begun:
            raise EngineLost("The engine's answer is empty.")
        _begin(exchange)
        if rest and not exchange.gone:
            exchange.send(reply.events(rest, tap.counts))
    _begin(exchange)
    if flight.used_up:
        await flight.settle(Status.BALANCE_EXHAUSTED, *flight.passed())
        exchange.end(reply.stopped(mid_stream_stop(flight.hold)))
    elif tap.failed:
        await flight.settle(Status.ENGINE_LOST, *flight.passed())
        exchange.end(reply.end(flight.tap.counts))
    else:
        await flight.settle(Status.CLIENT_CLOSED if flight.given_up else Status.OK, *flight.passed())
        if not exchange.gone:  # else the reply has not seen all of it
            exchange.end(reply.end(flight.passed()[0]))


def _begin(exchange: Exchange) -> None:
    if not exchange.streaming:
        exchange.start_stream(EVENT_STREAM)


async def _collect(flight: Flight, connection: Connection) -> None:
    """Put the stream of an own engine together for a client that wants the whole answer."""
    tap, collector = flight.tap, Collector()
    while data := await connection.next():
        events = tap.feed(data)
        flight.note()
        if events:
            collector.feed(events)
        if tap.done:
            break
        connection.expire_in(flight.route.spec.idle_timeout_seconds)
    if not tap.done or tap.failed:
        raise EngineLost("The engine's answer broke off.")
    counts, estimated = flight.passed()
    answer = flight.reply.whole(collector.answer(counts), counts)
    await flight.settle(Status.BALANCE_EXHAUSTED if flight.used_up else Status.OK, counts, estimated)
    flight.exchange.respond(200, answer, JSON)


async def _whole(flight: Flight, connection: Connection) -> None:
    """Pass a whole answer through, once its record is on disk."""
    body = await connection.body(MAX_ANSWER_BYTES)
    counts = usage_of(body)
    estimated = counts is None
    if counts is None:
        counts = Counts(flight.request.body_bytes // 4, 0, len(body) // 4)
    answer = flight.reply.whole(body, counts)  # before it is billed, as it may not be what the client asked for
    status = Status.BALANCE_EXHAUSTED if flight.uses_up(counts.completion) else Status.OK
    await flight.settle(Status.CLIENT_CLOSED if flight.given_up else status, counts, estimated)
    flight.exchange.respond(200, answer, JSON)


async def _refusal(flight: Flight, connection: Connection) -> Refused:
    body = await connection.body(MAX_ERROR_BYTES)
    error = engine_error(connection.status, body, flight.route.spec.name)
    seconds = retry_after(connection.headers)
    if seconds is not None:
        error.retry_after_s = int(seconds)
    return Refused(error, seconds)


async def _engine_refuses(flight: Flight, refused: Refused) -> None:
    """The engine has answered with an error: nothing is billed, and the client gets it in the API's shape."""
    error = refused.error
    await flight.settle(Status.ENGINE_ERROR, Counts(), False)
    flight.exchange.respond(error.status, flight.reply.error(error), error_headers(error))


async def _fail(flight: Flight, lost: EngineLost | BrokenStream) -> None:
    """The answer will not become whole: bill what has passed, and say so if somebody still listens."""
    exchange = flight.exchange
    if flight.connection is not None:
        rest = flight.connection.pending()
        if rest:
            flight.tap.feed(rest)
            flight.note()
    counts, estimated = flight.passed()
    status = Status.CLIENT_CLOSED if flight.given_up else Status.ENGINE_LOST
    if flight.given_up and flight.tap.done and not flight.tap.failed:
        status = Status.OK  # all of it had come; the client left before the gateway saw that
    elif not flight.given_up:
        if not exchange.streaming:
            counts, estimated = Counts(), False  # the client gets an error, and nothing else
    elif not flight.route.engine.owned and not flight.tap.exact and getattr(lost, "sent", True):
        # The upstream goes on and bills its answer, of which we know no more than what has passed.
        counts, estimated = flight.tap.estimate(flight.request.body_bytes), True
    if not flight.given_up:
        log.warning("engine lost", request_id=exchange.request_id, replica=flight.opened.replica, reason=str(lost))
    await flight.settle(status, counts, estimated)
    if exchange.gone:
        return
    if flight.used_up:
        error: TidemillError = mid_stream_stop(flight.hold)
    elif isinstance(lost, EngineLost):
        error = lost if lost.sent else Unavailable("The model's engine cannot be reached.", hint="Try again shortly.")
    else:
        error = EngineLost(f"The engine's stream is broken: {lost}.")
    if exchange.streaming:
        exchange.end(flight.reply.stopped(error))
    else:
        exchange.respond(error.status, flight.reply.error(error), error_headers(error))


async def count_prompt(request: ModelRequest, route: Route, replica: Replica) -> int | None:
    """Have the engine count a prompt exactly; None when it cannot or does not answer."""
    path = route.engine.count_path
    if path is None or request.ask.path != b"/chat/completions":
        return None
    body = route.engine.body(request.ask, model=route.spec.upstream_model, output_cap=1)
    try:
        connection = await replica.pool.request(path, body, COUNT_TIMEOUT_S)
        try:
            answer = await connection.body(MAX_ERROR_BYTES)
        finally:
            connection.release()
    except EngineLost:
        return None
    return counted_prompt(answer) if connection.status == 200 else None
