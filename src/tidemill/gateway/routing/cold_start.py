"""Requests that wait for a model to be started from zero replicas.

The request that asks for it is what wakes it, and is answered.

A model at zero replicas (`ModelSpec.wakes`) costs nothing; its first request waits here, before it holds any money or
place, while the fleet starts a replica. So many may wait, and so long, as the model says; a client that leaves frees
its place at once. All go on when a replica is ready, and are then ordered like any others
(`gateway.admission.fair_queue`).
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from tidemill.gateway.errors import StillAsleep, TooManyWait
from tidemill.http.server import Exchange

_RETRY_AFTER_S = 5


class WaitingModel(Protocol):
    """The part of a model's route that waiting needs (`gateway.routing.models.ModelRoute`)."""

    @property
    def name(self) -> str: ...
    @property
    def asleep(self) -> bool:
        """True if the model has no replica for interactive requests, and a waiting request starts one."""
        ...

    @property
    def wake_seconds(self) -> float: ...
    @property
    def max_waiting(self) -> int: ...


class Activator:
    """The requests that wait for models to start, in one gateway process of `processes`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, processes: int = 1) -> None:
        self._loop = loop
        self._processes = processes
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self.on_wanted: Callable[[], None] = lambda: None
        """Called when a model is waited for that nobody waited for before."""

    async def woken(self, route: WaitingModel, exchange: Exchange) -> bool:
        """Wait until the model has a replica; False if the client leaves meanwhile.

        Raises TooManyWait, and StillAsleep when it takes too long.
        """
        waiting = self._waiting.setdefault(route.name, set())
        if len(waiting) >= math.ceil(route.max_waiting / self._processes):
            raise TooManyWait(
                f"The model {route.name!r} is starting, and too many requests are waiting for it.",
                hint="Try again in a few seconds.",
                retry_after_s=_RETRY_AFTER_S,
            )
        future = self._loop.create_future()
        waiting.add(future)
        if len(waiting) == 1:
            self.on_wanted()
        timer = self._loop.call_later(route.wake_seconds, self._too_long, future, route)
        exchange.on_gone = lambda: _abandon(future)
        try:
            await future
        except asyncio.CancelledError:
            if exchange.gone:
                return False
            raise
        finally:
            exchange.on_gone = None
            timer.cancel()
            waiting.discard(future)
        return not exchange.gone

    def update(self, routes: Mapping[str, WaitingModel]) -> None:
        """Apply the models' current state; requests for a model that is ready, or won't start, go on."""
        for name, waiting in self._waiting.items():
            route = routes.get(name)
            if route is None or not route.asleep:
                for future in waiting:
                    if not future.done():
                        future.set_result(None)

    @property
    def waiting(self) -> dict[str, int]:
        """Number of waiting requests by model; models without any are left out."""
        return {name: len(waiting) for name, waiting in self._waiting.items() if waiting}

    def _too_long(self, future: "asyncio.Future[None]", route: WaitingModel) -> None:
        if not future.done():
            error = StillAsleep(
                f"The model {route.name!r} has no replica, and none became ready within {route.wake_seconds:g} s.",
                hint="Try again in a few seconds.",
            )
            error.retry_after_s = _RETRY_AFTER_S
            future.set_exception(error)


def _abandon(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.cancel()
