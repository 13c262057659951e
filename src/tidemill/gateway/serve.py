"""The way of a request: door, admission, route, engine, settle. Read it from the top."""

from collections.abc import Callable

import msgspec
import structlog

from tidemill.engines.collect import Collector
from tidemill.engines.protocol import Counts
from tidemill.engines.sse import BrokenStream, usage_of
from tidemill.errors import TidemillError, Unavailable
from tidemill.gateway.admission import hold_now, hold_scarce, mid_stream_stop
from tidemill.gateway.door import Door
from tidemill.gateway.engine_errors import counted_prompt, engine_error
from tidemill.gateway.errors import error_headers
from tidemill.gateway.flight import Flight, Meter
from tidemill.gateway.http import ClientGone, Exchange
from tidemill.gateway.replies import Reply
from tidemill.gateway.requests import ModelRequest
from tidemill.gateway.routing import Replica, Route, Routes
from tidemill.gateway.upstream import Connection, EngineLost
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
    reply: Callable[[ModelRequest], Reply]


class Serve:
    """One operation of one gateway process."""

    def __init__(self, operation: Operation, door: Door, routes: Routes, meter: Meter) -> None:
        self._operation = operation
        self._door = door
        self._routes = routes
        self._meter = meter

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request. Raises TidemillError when it is refused before an engine was asked."""
        principal = self._door.admit(exchange) or await self._door.ask_store(exchange)
        request = self._operation.read(exchange.body)
        route = self._routes.find(request.model)
        price = self._door.price(request.model, principal)
        replica = route.pick()
        hold = hold_now(request, route, principal, price, self._meter.leasing)
        if hold is None:
            hold = await hold_scarce(
                request, route, principal, price, self._meter.leasing, lambda: count_prompt(request, route, replica)
            )
        if exchange.gone:
            self._meter.leasing.settle(principal.tenant_id, hold.amount, 0)
            return
        try:
            reply = self._operation.reply(request)
            flight = Flight(self._meter, exchange, request, route, replica, principal, price, hold, reply)
        except Unavailable:
            self._meter.leasing.settle(principal.tenant_id, hold.amount, 0)
            raise
        await fly(flight)


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
    request, engine, spec = flight.request, flight.route.engine, flight.route.spec
    body = engine.body(request.ask, model=spec.upstream_model, output_cap=flight.hold.output_cap)
    try:
        connection = await flight.replica.pool.request(request.ask.path, body, spec.ttft_timeout_seconds, owner=flight)
    except EngineLost as lost:
        await _fail(flight, lost)
        return
    try:
        if connection.status != 200:
            await _engine_refuses(flight, connection)
        elif request.ask.stream:
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
        await _fail(flight, lost)
    finally:
        connection.release()


async def _stream(flight: Flight, connection: Connection) -> None:
    """Pass a stream through, event by event; `[DONE]` only once the record is on disk."""
    exchange, tap, reply = flight.exchange, flight.tap, flight.reply
    exchange.start_stream(EVENT_STREAM)
    while data := await connection.next():
        events = tap.feed(data)
        flight.note()
        if events and not exchange.gone:
            try:
                exchange.send(reply.events(events))
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
    if flight.used_up:
        await flight.settle(Status.BALANCE_EXHAUSTED, *flight.passed())
        exchange.end(reply.stopped(mid_stream_stop()))
    elif tap.failed:
        await flight.settle(Status.ENGINE_LOST, *flight.passed())
        exchange.end(reply.end(flight.tap.counts))
    else:
        await flight.settle(Status.CLIENT_CLOSED if flight.given_up else Status.OK, *flight.passed())
        exchange.end(reply.end(flight.passed()[0]))


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
    await flight.settle(Status.BALANCE_EXHAUSTED if flight.used_up else Status.OK, counts, estimated)
    flight.exchange.respond(200, flight.reply.whole(collector.answer(counts)), JSON)


async def _whole(flight: Flight, connection: Connection) -> None:
    """Pass a whole answer through, once its record is on disk."""
    body = await connection.body(MAX_ANSWER_BYTES)
    counts = usage_of(body)
    estimated = counts is None
    if counts is None:
        counts = Counts(flight.request.body_bytes // 4, 0, len(body) // 4)
    status = Status.CLIENT_CLOSED if flight.given_up else Status.OK
    await flight.settle(status, counts, estimated)
    flight.exchange.respond(200, flight.reply.whole(body), JSON)


async def _engine_refuses(flight: Flight, connection: Connection) -> None:
    """The engine has answered with an error: nothing is billed, and the client gets it in the API's shape."""
    body = await connection.body(MAX_ERROR_BYTES)
    error = engine_error(connection.status, body, flight.route.spec.name)
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
    if flight.tap.done:
        status = Status.OK  # all of it had come; the client left before the gateway saw that
    elif flight.given_up and not flight.route.engine.owned and not flight.tap.exact:
        # The upstream goes on and bills its answer, of which we know no more than what has passed.
        counts, estimated = flight.tap.estimate(flight.request.body_bytes), True
    if not flight.given_up:
        log.warning("engine lost", request_id=exchange.request_id, replica=flight.opened.replica, reason=str(lost))
    await flight.settle(status, counts, estimated)
    if exchange.gone:
        return
    if flight.used_up:
        error: TidemillError = mid_stream_stop()
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
