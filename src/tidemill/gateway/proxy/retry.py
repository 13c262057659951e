"""What a failed attempt means: for the replica's health, and for the request, which may be sent elsewhere or not.

A request starts over while the client has been sent nothing, and while nothing can have been produced that somebody
bills: the connection was not made, or the engine refused for being busy. An engine of one's own may also have died
over it: then once more, for a request that kills engines must not go through all of them.
"""

import msgspec

from tidemill.engines.sse import BrokenStream
from tidemill.errors import TidemillError, Unavailable
from tidemill.gateway.proxy.inflight import InFlightRequest
from tidemill.gateway.routing.circuit_breaker import CircuitBreaker
from tidemill.http.client import EngineLost

MAX_ATTEMPTS = 4
MAX_RETRY_AFTER_S = 86_400
BUSY = (429, 503, 529)
"""Statuses of an engine that has too much to do; 529 is Anthropic's `overloaded_error`."""


class EngineRefused(msgspec.Struct, frozen=True):
    """The engine has answered with an error."""

    error: TidemillError
    retry_after_s: float | None


Failure = EngineLost | BrokenStream | EngineRefused


def record_outcome(inflight: InFlightRequest, failure: Failure | None) -> None:
    """Tell the replica's breaker how the attempt went."""
    breaker, tenant = inflight.replica.breaker, inflight.opened.tenant_id
    if failure is None and not inflight.relay.tap.failed:
        if not breaker.calm:
            breaker.succeeded(tenant)
        return
    now = inflight.replica.pool.loop.time()
    if inflight.given_up:
        breaker.undecided()
    elif isinstance(failure, EngineRefused):
        refused(breaker, tenant, now, failure.error.status, failure.retry_after_s)
    else:
        lost(breaker, tenant, now, failure)


def refused(breaker: CircuitBreaker, tenant: str, now: float, status: int, retry_after_s: float | None) -> None:
    """The engine has answered with an error."""
    if status in BUSY:
        breaker.busy(now, retry_after_s)
    elif status >= 500:
        breaker.failed(tenant, now)
    elif not breaker.calm:
        breaker.succeeded(tenant)


def lost(breaker: CircuitBreaker, tenant: str, now: float, failure: EngineLost | BrokenStream | None) -> None:
    """The engine was not reached, or was lost, broken, silent, or ended its answer with an error event (None)."""
    if isinstance(failure, EngineLost) and not failure.sent:
        breaker.unreachable(now)
    else:
        breaker.failed(tenant, now)


def starts_over(inflight: InFlightRequest, failure: Failure) -> bool:
    """Move the flight to another replica, if it may be and there is one."""
    if (
        inflight.exchange.answered
        or inflight.given_up
        or inflight.attempts >= MAX_ATTEMPTS
        or inflight.time_left() <= 0
    ):
        return False
    untouched = (
        failure.error.status in BUSY if isinstance(failure, EngineRefused) else not getattr(failure, "sent", True)
    )
    if not untouched:
        if isinstance(failure, EngineRefused) or not inflight.route.engine.owned or inflight.resent:
            return False
        inflight.resent = True
    attempt = inflight.selector.another(inflight.replica)
    if attempt is None:
        return False
    try:
        inflight.move(attempt)
    except Unavailable:
        return False
    return True


def retry_after(headers: dict[bytes, bytes]) -> float | None:
    """The seconds of a Retry-After header, at most a day; a date is not worth reading, as clocks differ."""
    value = headers.get(b"retry-after", b"")
    return float(min(int(value), MAX_RETRY_AFTER_S)) if value.isdigit() and len(value) < 10 else None
