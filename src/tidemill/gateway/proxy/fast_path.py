"""The fast way: a request that needs nothing that is not at hand goes through without a task and without a wait.

It is sent within the event that brought it, and its answer is passed on within the events that bring that. As soon as
something is not as usual (a slow reader, an engine that fails, a limit that is reached) the request goes on in
`gateway.proxy.slow_path`, from exactly where it is.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from tidemill.gateway.protocols.reply import OpenAIReply
from tidemill.gateway.proxy.hedge import hedges
from tidemill.gateway.proxy.inflight import InFlightRequest
from tidemill.gateway.proxy.relay import Cause
from tidemill.gateway.proxy.retry import record_outcome
from tidemill.gateway.proxy.slow_path import (
    FINISH_S,
    JSON,
    begin,
    begins_at_once,
    end_stream,
    engine_body,
    run,
    send_events,
)
from tidemill.http.client import EngineConnection, EngineLost
from tidemill.http.exchange import Exchange
from tidemill.meter.log import LogFull

Guard = Callable[[Exchange, Awaitable[None]], Coroutine[Any, Any, None]]
"""Tells the client what the awaited work raises."""


def try_fast(inflight: InFlightRequest, guard: Guard) -> Coroutine[Any, Any, None] | None:
    """Send a request on its way: None when it is, else the work that is to be waited for. Never raises."""
    ask, engine = inflight.request.ask, inflight.route.engine
    if inflight.hold.cut_short or (engine.collects and ask.generates and not ask.stream) or hedges(inflight):
        return run(inflight)
    connection = inflight.replica.pool.idle_connection()
    if connection is None:
        return _connect(inflight, guard)
    try:
        _send(inflight, connection, guard)
    except Exception as error:
        return run(inflight, connection, error)
    return None


async def _connect(inflight: InFlightRequest, guard: Guard) -> None:
    try:
        connection = await inflight.replica.pool.connect()
    except Exception as error:
        await run(inflight, failure=error)
        return
    try:
        if inflight.given_up:
            raise EngineLost("The client left before its request was sent.", sent=False)
        _send(inflight, connection, guard)
    except Exception as error:
        await run(inflight, connection, error)


def _send(inflight: InFlightRequest, connection: EngineConnection, guard: Guard) -> None:
    ask, engine = inflight.relay.ask, inflight.route.engine
    pool, body = inflight.replica.pool, engine_body(inflight)
    pool.send(connection, engine.path(ask), body, inflight.time_left(), engine.headers(ask))
    inflight.connection = connection
    connection.sink = _Stream(inflight, connection, guard) if ask.stream else _Whole(inflight, connection, guard)
    inflight.exchange.work.underway += 1


class _Sink:
    """See `connection.Sink`."""

    __slots__ = ("connection", "guard", "inflight")

    def __init__(self, inflight: InFlightRequest, connection: EngineConnection, guard: Guard) -> None:
        self.inflight = inflight
        self.connection = connection
        self.guard = guard

    def hand_over(self, failure: Exception | None = None) -> None:
        """Go on in a task."""
        self.connection.sink = None
        self._follow(run(self.inflight, self.connection, failure))

    def unwritten(self, failure: LogFull) -> None:
        """The record could not be written."""
        self._follow(run(self.inflight, failure=failure))

    def _follow(self, rest: Awaitable[None]) -> None:
        exchange = self.inflight.exchange
        exchange.work.underway -= 1
        exchange.work.spawn(self.guard(exchange, rest))


class _Whole(_Sink):
    """Passes a whole answer on, once its record is on disk."""

    __slots__ = ("answer",)

    def arrived(self) -> None:
        connection = self.connection
        if connection.complete and connection.status == 200:
            self._pass_on()
        elif connection.lost is not None or connection.full or (connection.head_done and connection.status != 200):
            self.hand_over()

    def chunk(self, data: bytes, framed: bytes) -> None:
        self.connection.give_back(data)
        self.hand_over()

    def _pass_on(self) -> None:
        inflight, connection = self.inflight, self.connection
        connection.sink = None
        body = connection.take()
        try:
            ending, self.answer = inflight.relay.whole(body, inflight.client)
        except Exception as error:
            self.hand_over(error)
            return
        connection.release()
        try:
            record_outcome(inflight, None)
            inflight.settle_then(ending, self._settled)
        except Exception as error:
            self._follow(run(inflight, failure=error))

    def _settled(self, failure: LogFull | None) -> None:
        if failure is not None:
            self.unwritten(failure)
            return
        exchange = self.inflight.exchange
        exchange.work.underway -= 1
        exchange.respond(200, self.answer, JSON + self.inflight.charge_header)


class _Stream(_Sink):
    """Passes a stream on, event by event; `[DONE]` only once the record is on disk."""

    __slots__ = ("carrier", "ending", "exchange", "forwards", "idle_s", "tap", "time")

    def __init__(self, inflight: InFlightRequest, connection: EngineConnection, guard: Guard) -> None:
        super().__init__(inflight, connection, guard)
        # What each chunk needs is looked up once: the hottest lines of all are here.
        self.idle_s = inflight.idle_s
        self.exchange = inflight.exchange
        self.carrier = inflight.exchange.carrier
        self.tap = inflight.relay.tap
        self.time = inflight.replica.pool.loop.time
        self.forwards = inflight.exchange.chunked and isinstance(inflight.relay.reply, OpenAIReply)
        """Chunks that the tap leaves as they are go on with the frame that they came in."""

    def arrived(self) -> None:
        inflight, connection = self.inflight, self.connection
        if inflight.settled:
            self._finish()
        elif connection.lost is not None or (connection.head_done and connection.status != 200):
            self.hand_over()
        elif connection.head_done:
            if begins_at_once(inflight) and not inflight.exchange.gone:
                begin(inflight.exchange)
            data = connection.take()
            if data:
                self.chunk(data, b"")
            elif connection.complete:
                self.hand_over()  # it has ended without saying so

    def chunk(self, data: bytes, framed: bytes) -> None:
        inflight, tap, carrier = self.inflight, self.tap, self.carrier
        if inflight.settled:
            return  # what comes behind the end
        if carrier.blocked:
            self.connection.give_back(data)
            self.hand_over()
            return
        try:
            events = tap.feed(data)
            inflight.note()
            if events is data and framed and self.forwards and self.exchange.streaming:
                carrier.write(framed)
            elif events and not self.exchange.gone:
                send_events(inflight, events)
            if tap.done:
                self._end()
                return
        except Exception as error:
            self.hand_over(error)
            return
        connection = self.connection
        if not inflight.given_up:
            connection.deadline = self.time() + self.idle_s
        if connection.complete:
            self.hand_over()

    def _end(self) -> None:
        inflight = self.inflight
        begin(inflight.exchange)
        record_outcome(inflight, None)
        self.ending = inflight.close(Cause.ERROR_EVENT if self.tap.failed else Cause.DONE)
        inflight.settle_then(self.ending, self._settled)
        self._finish()

    def _finish(self) -> None:
        """Keep the connection, once the body is at its end."""
        connection = self.connection
        if connection.complete or connection.lost is not None:
            connection.sink = None
            connection.take()
            connection.release()
        else:
            connection.expire_in(FINISH_S)

    def _settled(self, failure: LogFull | None) -> None:
        if failure is not None:
            self.unwritten(failure)
            return
        self.exchange.work.underway -= 1
        end_stream(self.inflight, self.ending)
