"""The queue of a full model: interactive requests before batch ones, fair between tenants.

A model works on `max_concurrent` requests at a time, shared evenly among the gateway processes. What comes beyond
waits here, where it has an order, and not in the engine, which takes first whoever came first. While several tenants
are about, a small reserve is kept for one that has nothing running: so a tenant that floods the model has its share,
and another's first token does not wait until one of the flood's answers has ended.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from math import ceil

from tidemill.gateway.auth.snapshot import Principal
from tidemill.gateway.errors import QueueFull, WaitedTooLong
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.routing.models import ModelSpec
from tidemill.http.server import Exchange
from tidemill.ledger.pricing import PriceTier
from tidemill.tides.fairness import FairClock

RESERVE_OF = 8
"""One of so many places is kept for tenants that have nothing running."""
RESERVE_FROM = 4
"""With fewer places none is kept."""
CROWDED_S = 60.0
"""So long after two tenants were seen in turn, several are taken to be about."""
_MAX_RETRY_AFTER_S = 60


class Priority(IntEnum):
    """The class of a request; lower values go first."""

    INTERACTIVE = 0
    BATCH = 1


_BATCH_TIERS = (b'"flex"', b'"batch"')


def priority_of(request: ModelRequest, principal: Principal) -> Priority:
    """OpenAI's `service_tier`: `flex` (and `batch`) can wait, `auto`, `default` and `priority` cannot."""
    if principal.tier is PriceTier.BATCH:
        return Priority.BATCH
    tier = request.ask.fields.get("service_tier")
    return Priority.BATCH if tier is not None and bytes(tier) in _BATCH_TIERS else Priority.INTERACTIVE


class QueueSlot:
    """A request's concurrency slot at a model, held until `leave`."""

    __slots__ = ("_queue", "began", "priority", "tenant", "weight", "work")

    def __init__(self, queue: "ModelQueue", tenant: str, weight: int, work: int, priority: Priority) -> None:
        self._queue = queue
        self.tenant = tenant
        self.weight = weight
        self.work = work
        self.priority = priority
        self.began = 0.0

    def leave(self, used_tokens: int) -> None:
        """Free the slot of an ended request, with the work that it took."""
        self._queue.left(self, used_tokens)


class _Waiter:
    __slots__ = ("future", "place")

    def __init__(self, place: QueueSlot, future: "asyncio.Future[None]") -> None:
        self.place = place
        self.future = future


class ModelQueue:
    """The concurrency slots and the queue of one model in one gateway process."""

    def __init__(self, model: str, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self.capacity = 1
        self.max_queued = 0
        self.max_wait_s = 0.0
        self.running = 0
        self.queued = 0
        self._running_of: dict[str, int] = {}
        self._waiting: tuple[dict[str, deque[_Waiter]], ...] = ({}, {})
        self._clocks = (FairClock(), FairClock())
        self._last_seen = ("", Priority.INTERACTIVE)
        self._crowded_until = 0.0
        self._service_s = 0.0

    def enter_now(self, tenant: str, weight: int, work: int, priority: Priority) -> QueueSlot | None:
        """A slot if one is free for this tenant, else None. The hot path."""
        if (tenant, priority) != self._last_seen:
            if self._last_seen[0]:
                self._crowded_until = self._clock() + CROWDED_S
            self._last_seen = (tenant, priority)
        if self.queued:
            self._dispatch()
        if not self._has_room(tenant, priority):
            return None
        place = QueueSlot(self, tenant, weight, work, priority)
        self._start(place)
        return place

    async def enter(
        self, exchange: Exchange, tenant: str, weight: int, work: int, priority: Priority
    ) -> QueueSlot | None:
        """Wait for a slot; None if the client leaves meanwhile.

        Raises QueueFull when too many wait, also later on when others have a better right to wait, and WaitedTooLong.
        """
        self._make_room(tenant, weight, priority)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(QueueSlot(self, tenant, weight, work, priority), loop.create_future())
        self._waiting[priority].setdefault(tenant, deque()).append(waiter)
        self.queued += 1
        timer = loop.call_later(self.max_wait_s, self._give_up, waiter)
        exchange.on_gone = lambda: self._abandon(waiter)
        self._dispatch()
        try:
            await waiter.future
        except asyncio.CancelledError:
            if waiter.place.began:
                waiter.place.leave(0)
            else:
                self._remove(waiter)
            if exchange.gone:
                return None
            raise
        finally:
            exchange.on_gone = None
            timer.cancel()
        if exchange.gone:
            waiter.place.leave(0)
            return None
        return waiter.place

    def left(self, place: QueueSlot, used_tokens: int) -> None:
        """Account for an ended request: correct its tenant's share by its actual work, and admit the next."""
        self.running -= 1
        rest = self._running_of[place.tenant] - 1
        if rest:
            self._running_of[place.tenant] = rest
        else:
            del self._running_of[place.tenant]
        took_s = self._clock() - place.began
        self._service_s += (took_s - self._service_s) * 0.1 if self._service_s else took_s
        self._clocks[place.priority].correct(place.tenant, used_tokens - place.work, place.weight)
        if self.queued:
            self._dispatch()

    def resize(self, capacity: int, max_queued: int, max_wait_s: float) -> None:
        """Change the bounds."""
        self.capacity, self.max_queued, self.max_wait_s = capacity, max_queued, max_wait_s
        self._dispatch()

    @property
    def people_waiting(self) -> int:
        """Number of interactive requests in the queue."""
        return sum(map(len, self._waiting[Priority.INTERACTIVE].values()))

    @property
    def retry_after_s(self) -> int:
        """Seconds until a retry may succeed: the time to work off the queue."""
        return min(max(ceil(self.queued * self._service_s / self.capacity), 1), _MAX_RETRY_AFTER_S)

    def _has_room(self, tenant: str, priority: Priority) -> bool:
        free = self.capacity - self.running
        if free <= 0:
            return False
        reserve = max(self.capacity // RESERVE_OF, 1) if self.capacity >= RESERVE_FROM else 0
        if free > reserve or self._clock() >= self._crowded_until:
            return True
        return priority is Priority.INTERACTIVE and tenant not in self._running_of

    def _start(self, place: QueueSlot) -> None:
        place.began = self._clock()
        self.running += 1
        self._running_of[place.tenant] = self._running_of.get(place.tenant, 0) + 1
        self._clocks[place.priority].serve(place.tenant, place.work, place.weight)

    def _dispatch(self) -> None:
        """Admit queued requests in order, as far as slots are free."""
        while self.queued and self.running < self.capacity:
            waiter = self._next()
            if waiter is None:
                return
            self._remove(waiter)
            self._start(waiter.place)
            waiter.future.set_result(None)

    def _next(self) -> _Waiter | None:
        for priority in Priority:
            waiting = self._waiting[priority]
            eligible = [tenant for tenant in waiting if self._has_room(tenant, priority)]
            if eligible:
                return waiting[self._clocks[priority].next_of(eligible)][0]
        return None

    def _remove(self, waiter: _Waiter) -> None:
        waiting, tenant = self._waiting[waiter.place.priority], waiter.place.tenant
        queue = waiting.get(tenant)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            self.queued -= 1
            if not queue:
                del waiting[tenant]

    def _abandon(self, waiter: _Waiter) -> None:
        if not waiter.future.done():
            self._remove(waiter)
            waiter.future.cancel()

    def _give_up(self, waiter: _Waiter) -> None:
        if not waiter.future.done():
            self._remove(waiter)
            message = (
                f"The model {self._model!r} is busy: your request timed out after waiting for {self.max_wait_s:g} s."
            )
            error = WaitedTooLong(message, hint="Try again later.")
            error.retry_after_s = self.retry_after_s
            waiter.future.set_exception(error)

    def _make_room(self, tenant: str, weight: int, priority: Priority) -> None:
        """Enqueue a request, if need be in place of another. Raises QueueFull.

        Who gives way is the newest request of the tenant that has the most waiting for its weight, of the lowest
        class; so a flood fills the queue only as far as nobody else wants to wait.
        """
        if self.queued < self.max_queued:
            return
        own = len(self._waiting[priority].get(tenant, ())) + 1
        fattest = max(self._flows(), default=None, key=lambda flow: flow[:2])
        if fattest is None or (priority, own / weight) >= fattest[:2]:
            raise self._full(tenant)
        newest = fattest[2][-1]
        self._remove(newest)
        newest.future.set_exception(self._full(newest.place.tenant))

    def _flows(self) -> Iterator[tuple[Priority, float, deque[_Waiter]]]:
        for priority in Priority:
            for queue in self._waiting[priority].values():
                yield priority, len(queue) / queue[0].place.weight, queue

    def _full(self, tenant: str) -> QueueFull:
        own = sum(len(waiting.get(tenant, ())) for waiting in self._waiting)
        return QueueFull(
            f"The model {self._model!r} is busy, and too many requests are waiting for it, {own} of them yours.",
            hint="Send fewer requests at a time, or try again later.",
            retry_after_s=self.retry_after_s,
        )


class FairQueues:
    """The queues of all models that have one. `index` of `processes` is this gateway process."""

    def __init__(self, index: int, processes: int, clock: Callable[[], float]) -> None:
        self._index = index
        self._processes = processes
        self._clock = clock
        self._by_model: dict[str, ModelQueue] = {}

    def update(self, specs: list[ModelSpec]) -> None:
        """Apply the supervisor's announcement."""
        known, self._by_model = self._by_model, {}
        for spec in specs:
            if spec.max_concurrent is not None:
                queue = known.get(spec.name) or ModelQueue(spec.name, self._clock)
                self._by_model[spec.name] = queue
                queue.resize(self.part(spec.max_concurrent), self.part(spec.max_queued), spec.queue_seconds)

    def part(self, whole: int) -> int:
        """This process's part of a bound, at least 1: parts differ by one at the most and add up to the whole."""
        return max(whole // self._processes + (self._index < whole % self._processes), 1)

    def queued(self) -> dict[str, int]:
        """Queued requests of all classes, by model; models without any are left out."""
        return {name: queue.queued for name, queue in self._by_model.items() if queue.queued}

    def people_waiting(self) -> dict[str, int]:
        """Queued interactive requests, by model; models without any are left out."""
        return {name: queue.people_waiting for name, queue in self._by_model.items() if queue.queued}

    def of(self, model: str) -> ModelQueue | None:
        """The queue of a model; None if the model has no concurrency bound."""
        return self._by_model.get(model)
