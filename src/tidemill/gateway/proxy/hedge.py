"""Hedging: where the first token is late, a second replica is asked as well, and the first to speak answers.

The other one is aborted. Only what the client is sent is billed, and there is one record. Dean and Barroso, "The Tail
at Scale", CACM 56(2), 2013: a wait of about the 95th percentile, and few requests beyond the ordinary ones.
"""

import asyncio

from tidemill.errors import Unavailable
from tidemill.gateway.proxy.inflight import InFlightRequest
from tidemill.gateway.proxy.retry import lost, refused, retry_after
from tidemill.gateway.routing.replica import ReplicaAttempt, RoutedReplica
from tidemill.http.client import AnswerOwner, EngineConnection, EngineLost

Speaking = asyncio.Task[EngineConnection]
"""It ends once an answer has begun."""


class _Second:
    """Who waits for the second replica: the same flight."""

    def __init__(self, inflight: InFlightRequest) -> None:
        self.connection: EngineConnection | None = None
        self._inflight = inflight

    @property
    def given_up(self) -> bool:
        return self._inflight.given_up


def hedges(inflight: InFlightRequest) -> bool:
    """This request may be asked twice: its engine is one of our own, so that what comes to nothing costs nobody, it
    gives its answer token by token, and no other attempt was made."""
    spec = inflight.route.spec
    if spec.hedge_seconds is None:
        return False
    ask = inflight.request.ask
    streamed = ask.stream or (inflight.route.engine.collects and ask.generates)
    return spec.owned and streamed and not ask.filler and inflight.attempts == 1


async def first_to_speak(inflight: InFlightRequest, body: bytes) -> EngineConnection:
    """The connection on which an answer has begun, its first bytes still to be read. The flight is then on the replica
    that gives it. Raises EngineLost."""
    route = inflight.route
    route.hedges.earn()
    first = asyncio.create_task(_first_word(inflight, inflight.replica, inflight, body))
    try:
        await asyncio.wait([first], timeout=route.spec.hedge_seconds)
        if not first.done() and not inflight.given_up:
            attempt = inflight.selector.hedge(inflight.replica)
            if attempt is not None and route.hedges.spend():
                return await _race(inflight, first, attempt, body)
        return await first
    finally:
        first.cancel()


async def _race(inflight: InFlightRequest, first: Speaking, attempt: ReplicaAttempt, body: bytes) -> EngineConnection:
    attempt.start(attempt.replica.pool.loop.time(), inflight.hold.output_cap, inflight.request.ask.choices)
    former = inflight.replica
    inflight.hedge = other = _Second(inflight)
    second = asyncio.create_task(_first_word(inflight, attempt.replica, other, body))
    won = False
    try:
        won = await _second_speaks_first(inflight, attempt, first, second)
    finally:
        inflight.hedge = None
        inflight.hedged(won=won)
        if not won:
            await _drop(inflight, attempt.replica, second)
            inflight.leave(attempt)
    if not won:
        return await first
    inflight.connection = other.connection
    await _drop(inflight, former, first)
    return second.result()


async def _second_speaks_first(
    inflight: InFlightRequest, attempt: ReplicaAttempt, first: Speaking, second: Speaking
) -> bool:
    """Wait for one of the two; the flight is then on the second replica, if it is that."""
    running = {first, second}
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if inflight.given_up or (first in done and _speaks(first)):
            return False
        if second in done and _speaks(second):
            try:
                inflight.move(attempt)
            except Unavailable:
                return False  # there is no room to note that down; the first goes on
            return True
    return False


async def _drop(inflight: InFlightRequest, replica: RoutedReplica, task: Speaking) -> None:
    """Give up on a replica that the answer does not come from, and tell its breaker what became of it there."""
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, EngineConnection):
        outcome.abort()
    breaker, tenant, now = replica.breaker, inflight.opened.tenant_id, replica.pool.loop.time()
    if isinstance(outcome, EngineLost) and not inflight.given_up:
        lost(breaker, tenant, now, outcome)
    elif isinstance(outcome, EngineConnection) and outcome.status != 200 and not inflight.given_up:
        refused(breaker, tenant, now, outcome.status, retry_after(outcome.headers))
    else:
        breaker.undecided()


async def _first_word(
    inflight: InFlightRequest, replica: RoutedReplica, owner: AnswerOwner, body: bytes
) -> EngineConnection:
    """Ask a replica, and wait until its answer has begun."""
    engine, ask = inflight.route.engine, inflight.relay.ask
    connection = await replica.pool.request(
        engine.path(ask), body, inflight.time_left(), owner=owner, headers=engine.headers(ask)
    )
    try:
        if connection.status == 200 and (data := await connection.next()):
            connection.give_back(data)
    except BaseException:
        connection.abort()
        raise
    return connection


def _speaks(task: Speaking) -> bool:
    return not task.cancelled() and task.exception() is None and task.result().status == 200
