"""The fast way: a request that needs nothing that is not at hand goes through without a task and without a wait.

It is sent within the event that brought it, and its answer is passed on within the events that bring that. As soon as
something is not as usual (a slow reader, an engine that fails, a limit that is reached) the request goes on in
`gateway.proxy.slow_path`, from exactly where it is.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from tidemill.gateway.protocols.reply import OpenAIReply
from tidemill.gateway.proxy.hedge import hedges
from tidemill.gateway.proxy.inflight import Flight
from tidemill.gateway.proxy.retry import judge
from tidemill.gateway.proxy.slow_path import (
    FINISH_S,
    JSON,
    begin,
    begins_at_once,
    engine_body,
    fly,
    whole_counts,
    whole_status,
)
from tidemill.http.client import Connection, EngineLost
from tidemill.http.exchange import Exchange
from tidemill.ledger.usage import Status
from tidemill.meter.log import LogFull

Guard = Callable[[Exchange, Awaitable[None]], Coroutine[Any, Any, None]]
"""Tells the client what the awaited work raises."""


def set_off(flight: Flight, guard: Guard) -> Coroutine[Any, Any, None] | None:
    """Send a request on its way: None when it is, else the work that is to be waited for. Never raises."""
    ask, engine = flight.request.ask, flight.route.engine
    if flight.hold.cut_short or (engine.collects and ask.generates and not ask.stream) or hedges(flight):
        return fly(flight)
    connection = flight.replica.pool.idle_connection()
    if connection is None:
        return _connect(flight, guard)
    try:
        _send(flight, connection, guard)
    except Exception as error:
        return fly(flight, connection, error)
    return None


async def _connect(flight: Flight, guard: Guard) -> None:
    try:
        connection = await flight.replica.pool.connect()
    except Exception as error:
        await fly(flight, failure=error)
        return
    try:
        if flight.given_up:
            raise EngineLost("The client left before its request was sent.", sent=False)
        _send(flight, connection, guard)
    except Exception as error:
        await fly(flight, connection, error)


def _send(flight: Flight, connection: Connection, guard: Guard) -> None:
    ask = flight.request.ask
    flight.replica.pool.send(connection, ask.path, engine_body(flight), flight.time_left())
    flight.connection = connection
    connection.sink = _Stream(flight, connection, guard) if ask.stream else _Whole(flight, connection, guard)
    flight.exchange.work.underway += 1


class _Sink:
    """See `connection.Sink`."""

    __slots__ = ("connection", "flight", "guard")

    def __init__(self, flight: Flight, connection: Connection, guard: Guard) -> None:
        self.flight = flight
        self.connection = connection
        self.guard = guard

    def hand_over(self, failure: Exception | None = None) -> None:
        """Go on in a task."""
        self.connection.sink = None
        self._follow(fly(self.flight, self.connection, failure))

    def unwritten(self, failure: LogFull) -> None:
        """The record could not be written."""
        self._follow(fly(self.flight, failure=failure))

    def _follow(self, rest: Awaitable[None]) -> None:
        exchange = self.flight.exchange
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
        flight, connection = self.flight, self.connection
        connection.sink = None
        body = connection.take()
        try:
            counts, estimated = whole_counts(flight, body)
            self.answer = flight.reply.whole(body, counts)
        except Exception as error:
            self.hand_over(error)
            return
        connection.release()
        try:
            judge(flight, None)
            flight.settle_then(whole_status(flight, counts), counts, estimated, self._settled)
        except Exception as error:
            self._follow(fly(flight, failure=error))

    def _settled(self, failure: LogFull | None) -> None:
        if failure is not None:
            self.unwritten(failure)
            return
        exchange = self.flight.exchange
        exchange.work.underway -= 1
        exchange.respond(200, self.answer, JSON + self.flight.charge_header)


class _Stream(_Sink):
    """Passes a stream on, event by event; `[DONE]` only once the record is on disk."""

    __slots__ = ("carrier", "exchange", "forwards", "idle_s", "tap", "time")

    def __init__(self, flight: Flight, connection: Connection, guard: Guard) -> None:
        super().__init__(flight, connection, guard)
        # What each chunk needs is looked up once: the hottest lines of all are here.
        self.idle_s = flight.idle_s
        self.exchange = flight.exchange
        self.carrier = flight.exchange.carrier
        self.tap = flight.tap
        self.time = flight.replica.pool.loop.time
        self.forwards = flight.exchange.chunked and isinstance(flight.reply, OpenAIReply)
        """Chunks that the tap leaves as they are go on with the frame that they came in."""

    def arrived(self) -> None:
        flight, connection = self.flight, self.connection
        if flight.settled:
            self._finish()
        elif connection.lost is not None or (connection.head_done and connection.status != 200):
            self.hand_over()
        elif connection.head_done:
            if begins_at_once(flight) and not flight.exchange.gone:
                begin(flight.exchange)
            data = connection.take()
            if data:
                self.chunk(data, b"")
            elif connection.complete:
                self.hand_over()  # it has ended without saying so

    def chunk(self, data: bytes, framed: bytes) -> None:
        flight, tap, carrier = self.flight, self.tap, self.carrier
        if flight.settled:
            return  # what comes behind the end
        if carrier.blocked:
            self.connection.give_back(data)
            self.hand_over()
            return
        try:
            events = tap.feed(data)
            flight.note()
            if events is data and framed and self.forwards and self.exchange.streaming:
                carrier.write(framed)
            elif events and not self.exchange.gone:
                begin(self.exchange)
                self.exchange.send(flight.reply.events(events, tap.counts))
            if tap.done:
                self._end()
                return
        except Exception as error:
            self.hand_over(error)
            return
        connection = self.connection
        if not flight.given_up:
            connection.deadline = self.time() + self.idle_s
        if connection.complete:
            self.hand_over()

    def _end(self) -> None:
        flight = self.flight
        begin(flight.exchange)
        judge(flight, None)
        whole = Status.CLIENT_CLOSED if flight.given_up else Status.OK
        status = Status.ENGINE_LOST if flight.tap.failed else whole
        flight.settle_then(status, *flight.passed(), self._settled)
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
        flight = self.flight
        exchange = flight.exchange
        exchange.work.underway -= 1
        if exchange.gone:  # the reply has not seen all of it
            return
        counts = flight.tap.counts if flight.tap.failed else flight.passed()[0]
        exchange.end(flight.charge_comment + flight.reply.end(counts))
