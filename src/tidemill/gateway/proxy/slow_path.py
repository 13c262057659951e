"""The engine's part of a request: asking it, passing its answer on, settling. Whatever goes wrong, a record comes out.

Here everything is awaited. `gateway.proxy.fast_path` does the same without a task for what goes as it should, and hands
over to `run` at any moment.
"""

import structlog

from tidemill.engines.collect import Collector
from tidemill.engines.sse import BrokenStream
from tidemill.errors import TidemillError
from tidemill.gateway.admission.holds import output_bound
from tidemill.gateway.protocols.openai_errors import error_headers
from tidemill.gateway.proxy.engine_errors import engine_error
from tidemill.gateway.proxy.hedge import first_to_speak, hedges
from tidemill.gateway.proxy.inflight import InFlightRequest
from tidemill.gateway.proxy.relay import Cause, Ending, Told
from tidemill.gateway.proxy.retry import EngineRefused, Failure, record_outcome, retry_after, starts_over
from tidemill.http.client import EngineConnection, EngineLost
from tidemill.http.exchange import ClientGone, Exchange

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
            await inflight.settle(inflight.close(Cause.GATEWAY_FAULT))
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
        if inflight.relay.tap.done and not connection.complete:
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
    engine, ask = inflight.route.engine, inflight.relay.ask
    return await inflight.replica.pool.request(
        engine.path(ask),
        engine_body(inflight),
        inflight.time_left(),
        owner=inflight,
        headers=engine.headers(ask),
        fresh=begun is not None,
    )


def engine_body(inflight: InFlightRequest) -> bytes:
    """What the engine is asked."""
    cap, route = inflight.hold.output_cap, inflight.route
    if inflight.selector.rerouted:
        cap = min(cap, output_bound(inflight.request, route))
    return route.engine.body(inflight.relay.ask, model=route.spec.upstream_model, output_cap=cap)


async def _stream(inflight: InFlightRequest, connection: EngineConnection) -> None:
    """Pass a stream through, event by event; `[DONE]` only once the record is on disk."""
    exchange, relay = inflight.exchange, inflight.relay
    tap = relay.tap
    if begins_at_once(inflight):
        begin(exchange)
    while not (tap.done or relay.over_the_cap) and (data := await connection.next()):
        events = tap.feed(data)
        inflight.note()
        if events and not exchange.gone:
            try:
                send_events(inflight, events)
                if exchange.must_drain:
                    await exchange.drain()
            except ClientGone:
                pass  # `InFlightRequest._client_left` has decided what happens to the engine
        if not inflight.given_up:
            connection.expire_in(inflight.idle_s)
    if tap.done:
        cause = Cause.DONE
    elif not connection.complete:
        connection.abort()
        cause = Cause.CAP
    else:
        rest = tap.end()
        inflight.note()
        if not tap.begun:
            raise EngineLost("The engine's answer is empty.")
        if rest and not exchange.gone:
            send_events(inflight, rest)
        cause = Cause.DONE
    begin(exchange)
    ending = inflight.close(Cause.ERROR_EVENT if tap.failed and cause is Cause.DONE else cause)
    await inflight.settle(ending)
    end_stream(inflight, ending)


def begins_at_once(inflight: InFlightRequest) -> bool:
    """The client's stream begins with the engine's; else with its first event, as until then it may start over."""
    return not (inflight.selector.has_alternatives and inflight.route.engine.owned)


def begin(exchange: Exchange) -> None:
    """Begin a stream, unless it has begun."""
    if not exchange.streaming:
        exchange.start_stream(EVENT_STREAM)


def send_events(inflight: InFlightRequest, events: bytes) -> None:
    """Send whole events of the engine to the client, in the form of its API. Raises ClientGone, BrokenStream."""
    exchange, relay = inflight.exchange, inflight.relay
    begin(exchange)
    try:
        exchange.send(relay.reply.events(events, relay.tap.counts))
    except BrokenStream as broken:
        exchange.send(broken.before)
        raise


def end_stream(inflight: InFlightRequest, ending: Ending) -> None:
    """Send the client the end of its stream. The record is on disk."""
    if ending.told is not Told.NOTHING:
        inflight.exchange.end(inflight.charge_comment + inflight.relay.last_events(ending))


async def _collect(inflight: InFlightRequest, connection: EngineConnection) -> None:
    """Put the stream of an own engine together for a client that wants the whole answer."""
    relay, collector = inflight.relay, Collector()
    tap = relay.tap
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
    ending = inflight.close(Cause.DONE)
    answer = relay.reply.whole(collector.answer(ending.counts), ending.counts)
    await inflight.settle(ending)
    inflight.exchange.respond(200, answer, JSON + inflight.charge_header)


async def _whole(inflight: InFlightRequest, connection: EngineConnection) -> None:
    """Pass a whole answer through, once its record is on disk."""
    ending, answer = inflight.relay.whole(await connection.body(MAX_ANSWER_BYTES), inflight.client)
    await inflight.settle(ending)
    inflight.exchange.respond(200, answer, JSON + inflight.charge_header)


async def _refusal(inflight: InFlightRequest, connection: EngineConnection) -> EngineRefused:
    body = await connection.body(MAX_ERROR_BYTES)
    error = engine_error(connection.status, body, inflight.route.spec.name)
    seconds = retry_after(connection.headers)
    if seconds is not None:
        error.retry_after_s = int(seconds)
    return EngineRefused(error, seconds)


async def _fail(inflight: InFlightRequest, failure: Failure) -> None:
    """No attempt has given a whole answer: bill what has passed, and tell the client if it is still there."""
    exchange, relay = inflight.exchange, inflight.relay
    if isinstance(failure, EngineRefused):
        ending = inflight.close(Cause.ENGINE_REFUSED, failure.error)
    else:
        if inflight.connection is not None:
            rest = inflight.connection.pending()
            if rest:
                relay.tap.feed(rest)
                inflight.note()
        if not inflight.given_up:
            reason, replica = str(failure), inflight.opened.replica
            log.warning("engine lost", request_id=exchange.request_id, replica=replica, reason=reason)
        ending = inflight.close(Cause.ENGINE_LOST, failure)
    await inflight.settle(ending)
    if exchange.streaming:
        end_stream(inflight, ending)
    elif ending.error is not None:
        error = ending.error
        exchange.respond(error.status, relay.reply.error(error), error_headers(error))
