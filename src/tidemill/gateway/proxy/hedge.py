"""Hedging: where the first token is late, a second replica is asked as well, and the first to speak answers.

The other one is aborted. Only what the client is sent is billed, and there is one record. Dean and Barroso, "The Tail
at Scale", CACM 56(2), 2013: a wait of about the 95th percentile, and few requests beyond the ordinary ones.
"""

import asyncio

from tidemill.errors import Unavailable
from tidemill.gateway.proxy.inflight import Flight
from tidemill.gateway.proxy.retry import lost, refused, retry_after
from tidemill.gateway.routing.replica import Leg, Replica
from tidemill.http.client import Connection, EngineLost, Owner

Speaking = asyncio.Task[Connection]
"""It ends once an answer has begun."""


class _Second:
    """Who waits for the second replica: the same flight."""

    def __init__(self, flight: Flight) -> None:
        self.connection: Connection | None = None
        self._flight = flight

    @property
    def given_up(self) -> bool:
        return self._flight.given_up


def hedges(flight: Flight) -> bool:
    """This request may be asked twice: its engine is one of our own, so that what comes to nothing costs nobody, it
    gives its answer token by token, and no other attempt was made."""
    spec = flight.route.spec
    if spec.hedge_seconds is None:
        return False
    ask = flight.request.ask
    streamed = ask.stream or (flight.route.engine.collects and ask.generates)
    return spec.owned and streamed and not ask.filler and flight.attempts == 1


async def first_to_speak(flight: Flight, body: bytes) -> Connection:
    """The connection on which an answer has begun, its first bytes still to be read. The flight is then on the replica
    that gives it. Raises EngineLost."""
    route = flight.route
    route.hedges.earn()
    first = asyncio.create_task(_first_word(flight, flight.replica, flight, body))
    try:
        await asyncio.wait([first], timeout=route.spec.hedge_seconds)
        if not first.done() and not flight.given_up:
            leg = flight.way.beside(flight.replica)
            if leg is not None and route.hedges.spend():
                return await _race(flight, first, leg, body)
        return await first
    finally:
        first.cancel()


async def _race(flight: Flight, first: Speaking, leg: Leg, body: bytes) -> Connection:
    leg.start(leg.replica.pool.loop.time(), flight.hold.output_cap, flight.request.ask.choices)
    former = flight.replica
    flight.beside = other = _Second(flight)
    second = asyncio.create_task(_first_word(flight, leg.replica, other, body))
    won = False
    try:
        won = await _second_speaks_first(flight, leg, first, second)
    finally:
        flight.beside = None
        flight.hedged(won=won)
        if not won:
            await _drop(flight, leg.replica, second)
            flight.leave(leg)
    if not won:
        return await first
    flight.connection = other.connection
    await _drop(flight, former, first)
    return second.result()


async def _second_speaks_first(flight: Flight, leg: Leg, first: Speaking, second: Speaking) -> bool:
    """Wait for one of the two; the flight is then on the second replica, if it is that."""
    running = {first, second}
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if flight.given_up or (first in done and _speaks(first)):
            return False
        if second in done and _speaks(second):
            try:
                flight.move(leg)
            except Unavailable:
                return False  # there is no room to note that down; the first goes on
            return True
    return False


async def _drop(flight: Flight, replica: Replica, task: Speaking) -> None:
    """Give up on a replica that the answer does not come from, and tell its breaker what became of it there."""
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, Connection):
        outcome.abort()
    breaker, tenant, now = replica.breaker, flight.opened.tenant_id, replica.pool.loop.time()
    if isinstance(outcome, EngineLost) and not flight.given_up:
        lost(breaker, tenant, now, outcome)
    elif isinstance(outcome, Connection) and outcome.status != 200 and not flight.given_up:
        refused(breaker, tenant, now, outcome.status, retry_after(outcome.headers))
    else:
        breaker.undecided()


async def _first_word(flight: Flight, replica: Replica, owner: Owner, body: bytes) -> Connection:
    """Ask a replica, and wait until its answer has begun."""
    connection = await replica.pool.request(flight.request.ask.path, body, flight.time_left(), owner=owner)
    try:
        if connection.status == 200 and (data := await connection.next()):
            connection.give_back(data)
    except BaseException:
        connection.abort()
        raise
    return connection


def _speaks(task: Speaking) -> bool:
    return not task.cancelled() and task.exception() is None and task.result().status == 200
