"""The engine's part of a request: asking it, passing its answer on, settling. Whatever goes wrong, a record comes out.

Here everything is awaited. `gateway.proxy.fast_path` does the same without a task for what goes as it should, and hands
over to `run` at any moment.
"""

import structlog

from tidemill.engines.collect import Collector
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream, usage_of
from tidemill.errors import TidemillError, Unavailable
from tidemill.gateway.admission.holds import mid_stream_stop, output_bound
from tidemill.gateway.protocols.openai_errors import error_headers
from tidemill.gateway.proxy.engine_errors import engine_error
from tidemill.gateway.proxy.hedge import first_to_speak, hedges
from tidemill.gateway.proxy.inflight import InFlightRequest
from tidemill.gateway.proxy.retry import EngineRefused, Failure, record_outcome, retry_after, starts_over
from tidemill.http.client import EngineConnection, EngineLost
from tidemill.http.exchange import ClientGone, Exchange
from tidemill.ledger.usage import RequestStatus

log = structlog.get_logger()

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""The longest answer that is taken from an engine in one piece."""
MAX_ERROR_BYTES = 1024 * 1024
FINISH_S = 1.0
"""How long a stream that has said that it is done may take to end, for its connection to be kept."""
JSON = b"content-type: application/json\r\n"
EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"


async def run(
    inflight: InFlightRequest, begun: EngineConnection | None = None, failure: Exception | None = None
) -> None:
    """Ask the engine, pass its answer on, settle. Whatever goes wrong, the record is written.

    `begun`: the request was sent already, and so much of the answer was taken as `inflight` knows of; `failure`: what
    has happened then.
    """
    exchange = inflight.exchange
    try:
        await _ask(inflight, begun, failure)
    except Exception as error:
        if not inflight.settled:  # a fault of ours; the client pays for no more than what it was sent
            await inflight.settle(RequestStatus.ENGINE_LOST, *inflight.passed())
        if isinstance(error, TidemillError) and not exchange.answered:
            raise
        log.exception("request failed", request_id=exchange.request_id)
        if exchange.answered and not exchange.ended:
            exchange.cut()
        elif not exchange.answered:
            raise


async def _ask(inflight: InFlightRequest, begun: EngineConnection | None, error: Exception | None) -> None:
    """Ask an engine, and another one when it fails, as long as nobody pays for that twice (`gateway.proxy.retry`)."""
    if error is None:
        failure = await _attempt(inflight, begun)
    else:
        if begun is not None:
            begun.abort()
        if inflight.settled or not isinstance(error, EngineLost | BrokenStream):
            raise error
        failure = error
    while True:
        record_outcome(inflight, failure)
        if failure is None:
            return
        if not starts_over(inflight, failure):
            break
        failure = await _attempt(inflight)
    if isinstance(failure, EngineRefused):
        await _engine_refuses(inflight, failure)
    else:
        await _fail(inflight, failure)


async def _attempt(inflight: InFlightRequest, begun: EngineConnection | None = None) -> Failure | None:
    """Ask the engine and pass its answer on; None when the request is settled by it."""
    request, engine = inflight.request, inflight.route.engine
    try:
        connection = await _connection(inflight, begun)
    except EngineLost as lost:
        return lost.with_traceback(None)
    try:
        if connection.status != 200:
            return await _refusal(inflight, connection)
        if request.ask.stream:
            await _stream(inflight, connection)
        elif engine.collects and request.ask.generates:
            await _collect(inflight, connection)
        else:
            await _whole(inflight, connection)
        if inflight.tap.done and not connection.complete:
            await connection.finish(within_s=FINISH_S)
    except (EngineLost, BrokenStream) as lost:
        if inflight.settled:
            raise
        connection.abort()
        return lost.with_traceback(None)  # whose frames have the connection, which has the failure
    finally:
        connection.release()
    return None


async def _connection(inflight: InFlightRequest, begun: EngineConnection | None) -> EngineConnection:
    """The connection on which the engine has begun to answer. Raises EngineLost."""
    if begun is not None:
        try:
            await begun.response()
            return begun
        except EngineLost as lost:
            begun.abort()
            if not begun.reused_and_silent or lost.timed_out or inflight.given_up:
                raise
        except BaseException:
            begun.abort()
            raise
    if begun is None and hedges(inflight):
        return await first_to_speak(inflight, engine_body(inflight))
    path, pool = inflight.request.ask.path, inflight.replica.pool
    return await pool.request(
        path, engine_body(inflight), inflight.time_left(), owner=inflight, fresh=begun is not None
    )


def engine_body(inflight: InFlightRequest) -> bytes:
    """What the engine is asked."""
    cap, route = inflight.hold.output_cap, inflight.route
    if inflight.selector.rerouted:
        cap = min(cap, output_bound(inflight.request, route))
    return route.engine.body(inflight.request.ask, model=route.spec.upstream_model, output_cap=cap)


async def _stream(inflight: InFlightRequest, connection: EngineConnection) -> None:
    """Pass a stream through, event by event; `[DONE]` only once the record is on disk."""
    exchange, tap, reply = inflight.exchange, inflight.tap, inflight.reply
    if begins_at_once(inflight):
        begin(exchange)
    while not (tap.done or inflight.over_the_cap) and (data := await connection.next()):
        events = tap.feed(data)
        inflight.note()
        if events and not exchange.gone:
            begin(exchange)
            try:
                exchange.send(reply.events(events, tap.counts))
                if exchange.must_drain:
                    await exchange.drain()
            except ClientGone:
                pass  # `InFlightRequest._client_left` has decided what happens to the engine
        if not inflight.given_up:
            connection.expire_in(inflight.idle_s)
    if not tap.done and not connection.complete:
        connection.abort()  # over the cap
    elif not tap.done:
        rest = tap.end()
        inflight.note()
        if not tap.begun:
            raise EngineLost("The engine's answer is empty.")
        begin(exchange)
        if rest and not exchange.gone:
            exchange.send(reply.events(rest, tap.counts))
    begin(exchange)
    if inflight.used_up:
        await inflight.settle(RequestStatus.BALANCE_EXHAUSTED, *inflight.passed())
        exchange.end(inflight.charge_comment + reply.stopped(mid_stream_stop(inflight.hold)))
    elif tap.failed:
        await inflight.settle(RequestStatus.ENGINE_LOST, *inflight.passed())
        exchange.end(inflight.charge_comment + reply.end(inflight.tap.counts))
    else:
        await inflight.settle(
            RequestStatus.CLIENT_CLOSED if inflight.given_up else RequestStatus.OK, *inflight.passed()
        )
        if not exchange.gone:  # else the reply has not seen all of it
            exchange.end(inflight.charge_comment + reply.end(inflight.passed()[0]))


def begins_at_once(inflight: InFlightRequest) -> bool:
    """The client's stream begins with the engine's; else with its first event, as until then it may start over."""
    return not (inflight.selector.has_alternatives and inflight.route.engine.owned)


def begin(exchange: Exchange) -> None:
    """Begin a stream, unless it has begun."""
    if not exchange.streaming:
        exchange.start_stream(EVENT_STREAM)


async def _collect(inflight: InFlightRequest, connection: EngineConnection) -> None:
    """Put the stream of an own engine together for a client that wants the whole answer."""
    tap, collector = inflight.tap, Collector()
    while data := await connection.next():
        events = tap.feed(data)
        inflight.note()
        if events:
            collector.feed(events)
        if tap.done:
            break
        connection.expire_in(inflight.idle_s)
    if not tap.done or tap.failed:
        raise EngineLost("The engine's answer broke off.")
    counts, estimated = inflight.passed()
    answer = inflight.reply.whole(collector.answer(counts), counts)
    await inflight.settle(RequestStatus.BALANCE_EXHAUSTED if inflight.used_up else RequestStatus.OK, counts, estimated)
    inflight.exchange.respond(200, answer, JSON + inflight.charge_header)


async def _whole(inflight: InFlightRequest, connection: EngineConnection) -> None:
    """Pass a whole answer through, once its record is on disk."""
    body = await connection.body(MAX_ANSWER_BYTES)
    counts, estimated = whole_counts(inflight, body)
    answer = inflight.reply.whole(body, counts)  # before it is billed, as it may not be what the client asked for
    await inflight.settle(whole_status(inflight, counts), counts, estimated)
    inflight.exchange.respond(200, answer, JSON + inflight.charge_header)


def whole_counts(inflight: InFlightRequest, body: bytes) -> tuple[TokenCounts, bool]:
    """What a whole answer has used, and whether that is an estimate. Raises BrokenStream."""
    counts = usage_of(body)
    if counts is None:
        return TokenCounts(inflight.request.body_bytes // 4, 0, len(body) // 4), True
    return counts, False


def whole_status(inflight: InFlightRequest, counts: TokenCounts) -> RequestStatus:
    """How a request ends whose whole answer has come."""
    if inflight.given_up:
        return RequestStatus.CLIENT_CLOSED
    return RequestStatus.BALANCE_EXHAUSTED if inflight.uses_up(counts.completion) else RequestStatus.OK


async def _refusal(inflight: InFlightRequest, connection: EngineConnection) -> EngineRefused:
    body = await connection.body(MAX_ERROR_BYTES)
    error = engine_error(connection.status, body, inflight.route.spec.name)
    seconds = retry_after(connection.headers)
    if seconds is not None:
        error.retry_after_s = int(seconds)
    return EngineRefused(error, seconds)


async def _engine_refuses(inflight: InFlightRequest, refused: EngineRefused) -> None:
    """The engine has answered with an error: nothing is billed, and the client gets it in the API's shape."""
    error = refused.error
    await inflight.settle(RequestStatus.ENGINE_ERROR, TokenCounts(), False)
    inflight.exchange.respond(error.status, inflight.reply.error(error), error_headers(error))


async def _fail(inflight: InFlightRequest, lost: EngineLost | BrokenStream) -> None:
    """The answer will not become whole: bill what has passed, and say so if somebody still listens."""
    exchange = inflight.exchange
    if inflight.connection is not None:
        rest = inflight.connection.pending()
        if rest:
            inflight.tap.feed(rest)
            inflight.note()
    counts, estimated = inflight.passed()
    status = RequestStatus.CLIENT_CLOSED if inflight.given_up else RequestStatus.ENGINE_LOST
    if inflight.given_up and inflight.tap.done and not inflight.tap.failed:
        status = RequestStatus.OK  # all of it had come; the client left before the gateway saw that
    elif not inflight.given_up:
        if not exchange.streaming:
            counts, estimated = TokenCounts(), False  # the client gets an error, and nothing else
    elif not inflight.route.engine.owned and not inflight.tap.exact and getattr(lost, "sent", True):
        # The upstream goes on and bills its answer, of which we know no more than what has passed.
        counts, estimated = inflight.tap.estimate(inflight.request.body_bytes), True
    if not inflight.given_up:
        log.warning("engine lost", request_id=exchange.request_id, replica=inflight.opened.replica, reason=str(lost))
    await inflight.settle(status, counts, estimated)
    if exchange.gone:
        return
    if inflight.used_up:
        error: TidemillError = mid_stream_stop(inflight.hold)
    elif isinstance(lost, EngineLost):
        error = lost if lost.sent else Unavailable("The model's engine cannot be reached.", hint="Try again shortly.")
    else:
        error = EngineLost(f"The engine's stream is broken: {lost}.")
    if exchange.streaming:
        exchange.end(inflight.charge_comment + inflight.reply.stopped(error))
    else:
        exchange.respond(error.status, inflight.reply.error(error), error_headers(error))
