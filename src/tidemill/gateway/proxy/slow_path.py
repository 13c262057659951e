"""The engine's part of a request: asking it, passing its answer on, settling. Whatever goes wrong, a record comes out.

Here everything is awaited. `gateway.proxy.fast_path` does the same without a task for what goes as it should, and hands
over to `fly` at any moment.
"""

import structlog

from tidemill.engines.collect import Collector
from tidemill.engines.protocol import Counts
from tidemill.engines.sse import BrokenStream, usage_of
from tidemill.errors import TidemillError, Unavailable
from tidemill.gateway.admission.holds import mid_stream_stop, output_bound
from tidemill.gateway.protocols.openai_errors import error_headers
from tidemill.gateway.proxy.engine_errors import engine_error
from tidemill.gateway.proxy.hedge import first_to_speak, hedges
from tidemill.gateway.proxy.inflight import Flight
from tidemill.gateway.proxy.retry import Failure, Refused, judge, retry_after, starts_over
from tidemill.http.client import Connection, EngineLost
from tidemill.http.exchange import ClientGone, Exchange
from tidemill.ledger.usage import Status

log = structlog.get_logger()

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""The longest answer that is taken from an engine in one piece."""
MAX_ERROR_BYTES = 1024 * 1024
FINISH_S = 1.0
"""How long a stream that has said that it is done may take to end, for its connection to be kept."""
JSON = b"content-type: application/json\r\n"
EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


async def fly(flight: Flight, begun: Connection | None = None, failure: Exception | None = None) -> None:
    """Ask the engine, pass its answer on, settle. Whatever goes wrong, the record is written.

    `begun`: the request was sent already, and so much of the answer was taken as `flight` knows of; `failure`: what
    has happened then.
    """
    exchange = flight.exchange
    try:
        await _ask(flight, begun, failure)
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


async def _ask(flight: Flight, begun: Connection | None, error: Exception | None) -> None:
    """Ask an engine, and another one when it fails, as long as nobody pays for that twice (`gateway.proxy.retry`)."""
    if error is None:
        failure = await _attempt(flight, begun)
    else:
        if begun is not None:
            begun.abort()
        if flight.settled or not isinstance(error, EngineLost | BrokenStream):
            raise error
        failure = error
    while True:
        judge(flight, failure)
        if failure is None:
            return
        if not starts_over(flight, failure):
            break
        failure = await _attempt(flight)
    if isinstance(failure, Refused):
        await _engine_refuses(flight, failure)
    else:
        await _fail(flight, failure)


async def _attempt(flight: Flight, begun: Connection | None = None) -> Failure | None:
    """Ask the engine and pass its answer on; None when the request is settled by it."""
    request, engine = flight.request, flight.route.engine
    try:
        connection = await _connection(flight, begun)
    except EngineLost as lost:
        return lost.with_traceback(None)
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
            await connection.finish(within_s=FINISH_S)
    except (EngineLost, BrokenStream) as lost:
        if flight.settled:
            raise
        connection.abort()
        return lost.with_traceback(None)  # whose frames have the connection, which has the failure
    finally:
        connection.release()
    return None


async def _connection(flight: Flight, begun: Connection | None) -> Connection:
    """The connection on which the engine has begun to answer. Raises EngineLost."""
    if begun is not None:
        try:
            await begun.response()
            return begun
        except EngineLost as lost:
            begun.abort()
            if not begun.reused_and_silent or lost.timed_out or flight.given_up:
                raise
        except BaseException:
            begun.abort()
            raise
    if begun is None and hedges(flight):
        return await first_to_speak(flight, engine_body(flight))
    path, pool = flight.request.ask.path, flight.replica.pool
    return await pool.request(path, engine_body(flight), flight.time_left(), owner=flight, fresh=begun is not None)


def engine_body(flight: Flight) -> bytes:
    """What the engine is asked."""
    cap, route = flight.hold.output_cap, flight.route
    if flight.way.detours:
        cap = min(cap, output_bound(flight.request, route))
    return route.engine.body(flight.request.ask, model=route.spec.upstream_model, output_cap=cap)


async def _stream(flight: Flight, connection: Connection) -> None:
    """Pass a stream through, event by event; `[DONE]` only once the record is on disk."""
    exchange, tap, reply = flight.exchange, flight.tap, flight.reply
    if begins_at_once(flight):
        begin(exchange)
    while not (tap.done or flight.over_the_cap) and (data := await connection.next()):
        events = tap.feed(data)
        flight.note()
        if events and not exchange.gone:
            begin(exchange)
            try:
                exchange.send(reply.events(events, tap.counts))
                if exchange.must_drain:
                    await exchange.drain()
            except ClientGone:
                pass  # `Flight._client_left` has decided what happens to the engine
        if not flight.given_up:
            connection.expire_in(flight.idle_s)
    if not tap.done and not connection.complete:
        connection.abort()  # over the cap
    elif not tap.done:
        rest = tap.end()
        flight.note()
        if not tap.begun:
            raise EngineLost("The engine's answer is empty.")
        begin(exchange)
        if rest and not exchange.gone:
            exchange.send(reply.events(rest, tap.counts))
    begin(exchange)
    if flight.used_up:
        await flight.settle(Status.BALANCE_EXHAUSTED, *flight.passed())
        exchange.end(flight.charge_comment + reply.stopped(mid_stream_stop(flight.hold)))
    elif tap.failed:
        await flight.settle(Status.ENGINE_LOST, *flight.passed())
        exchange.end(flight.charge_comment + reply.end(flight.tap.counts))
    else:
        await flight.settle(Status.CLIENT_CLOSED if flight.given_up else Status.OK, *flight.passed())
        if not exchange.gone:  # else the reply has not seen all of it
            exchange.end(flight.charge_comment + reply.end(flight.passed()[0]))


def begins_at_once(flight: Flight) -> bool:
    """The client's stream begins with the engine's; else with its first event, as until then it may start over."""
    return not (flight.way.branches and flight.route.engine.owned)


def begin(exchange: Exchange) -> None:
    """Begin a stream, unless it has begun."""
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
        connection.expire_in(flight.idle_s)
    if not tap.done or tap.failed:
        raise EngineLost("The engine's answer broke off.")
    counts, estimated = flight.passed()
    answer = flight.reply.whole(collector.answer(counts), counts)
    await flight.settle(Status.BALANCE_EXHAUSTED if flight.used_up else Status.OK, counts, estimated)
    flight.exchange.respond(200, answer, JSON + flight.charge_header)


async def _whole(flight: Flight, connection: Connection) -> None:
    """Pass a whole answer through, once its record is on disk."""
    body = await connection.body(MAX_ANSWER_BYTES)
    counts, estimated = whole_counts(flight, body)
    answer = flight.reply.whole(body, counts)  # before it is billed, as it may not be what the client asked for
    await flight.settle(whole_status(flight, counts), counts, estimated)
    flight.exchange.respond(200, answer, JSON + flight.charge_header)


def whole_counts(flight: Flight, body: bytes) -> tuple[Counts, bool]:
    """What a whole answer has used, and whether that is an estimate. Raises BrokenStream."""
    counts = usage_of(body)
    if counts is None:
        return Counts(flight.request.body_bytes // 4, 0, len(body) // 4), True
    return counts, False


def whole_status(flight: Flight, counts: Counts) -> Status:
    """How a request ends whose whole answer has come."""
    if flight.given_up:
        return Status.CLIENT_CLOSED
    return Status.BALANCE_EXHAUSTED if flight.uses_up(counts.completion) else Status.OK


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
        exchange.end(flight.charge_comment + flight.reply.stopped(error))
    else:
        exchange.respond(error.status, flight.reply.error(error), error_headers(error))
