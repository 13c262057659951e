"""This process's leases of the limits.

Renewed in the background, so that a request seldom waits for the store.

All that is due is reported in one transaction, and while that is under way, the next gathers. Once a second whatever
has changed is reported, and what is not needed goes back. A request that finds nothing at hand waits for the next
round, but never longer than `patience_s`.
"""

import asyncio
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from itertools import islice

import structlog

from tidemill.errors import Unavailable
from tidemill.ledger.limits import Limit
from tidemill.ledger.slots import LEASE_S, SlotGrant, SlotReport, SlotShare
from tidemill.ledger.windows import AHEAD_S, RateGrant, RateReport, RateShare
from tidemill.meter.balance_leases import DRY_FOR_S, STORE_PATIENCE_S
from tidemill.store.engine import Store
from tidemill.store.limit_leases import LimitReply, exchange

log = structlog.get_logger()

BEAT_S = 1.0
RESERVE_S = 2.0
"""A process keeps what its pace of late uses up in this time."""
CUSHION = 50
"""While more than half of a limit is free, a process keeps this fraction of it even when it is idle."""
ROUND_LIMITS = 256
"""Limits in one transaction."""


class _Held:
    """The state of a limit and of its waiters in one process. Times are of this process's clock."""

    __slots__ = (
        "denied_least",
        "denied_until",
        "dry_until",
        "elsewhere",
        "free",
        "frees_at",
        "limit",
        "patient",
        "waiting",
    )

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.free = 0
        """What was left for other processes when the store was last asked."""
        self.elsewhere = 0
        """What other processes held and did not use then."""
        self.frees_at = 0.0
        """When what was denied last may be had."""
        self.denied_until = 0.0
        self.denied_least = 0
        self.dry_until = 0.0
        self.waiting: list[int] = []
        """The amounts that requests wait for."""
        self.patient = 0
        """What requests hope to get of what is held elsewhere."""


class RateLease(_Held):
    """A limit per minute, as this process knows it."""

    __slots__ = ("share",)

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self.share = RateShare()

    def report(self, second: int, now: float, closing: bool = False) -> RateReport:
        if closing:
            return self.share.report(second, now)
        plenty = 2 * self.free >= self.limit.amount
        return self.share.report(
            second,
            now,
            need=sum(self.waiting),
            least=min(self.waiting, default=1),
            reserve_s=RESERVE_S if self.free else 0.0,  # else others may be waiting for what is kept here
            cushion=self.limit.amount // CUSHION if plenty else 0,
        )

    def answered(self, answer: RateGrant, report: RateReport, now: float) -> None:
        self.share.renewed(answer)
        self.free, self.elsewhere = answer.free, answer.elsewhere
        if answer.granted < report.want:
            self.dry_until = now + DRY_FOR_S
        if answer.frees_in:
            self.frees_at = now + answer.frees_in
            self.denied_until = now + min(DRY_FOR_S, answer.frees_in)
            self.denied_least = report.least

    @property
    def runs_low(self) -> bool:
        return self.share.runs_low(BEAT_S)

    def stale(self, second: int) -> bool:
        """True if there is something to report, or perhaps to give back."""
        return self.share.dirty or self.share.held > 0

    def remaining(self, second: int) -> int:
        """The permits left of the limit, as far as this process knows."""
        return self.share.at_hand(second) + self.free


class SlotLease(_Held):
    """A limit on concurrent requests, as this process knows it."""

    __slots__ = ("share",)

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self.share = SlotShare()
        self.denied_least = 1

    def report(self, second: int, now: float) -> SlotReport:
        return self.share.report(second, need=len(self.waiting), want=len(self.waiting) + self.share.used // 4)

    def answered(self, answer: SlotGrant, report: SlotReport, now: float) -> None:
        self.share.renewed(answer)
        self.free, self.elsewhere = answer.free, answer.elsewhere
        if answer.granted < max(report.need, report.want):
            self.dry_until = now + DRY_FOR_S
        if answer.granted < min(report.need, 1):
            self.denied_until = now + DRY_FOR_S

    @property
    def runs_low(self) -> bool:
        return False

    def stale(self, second: int) -> bool:
        """True if there is something to report or to give back, or the lease must be renewed."""
        share = self.share
        return share.dirty or share.leased > share.used or (share.leased > 0 and share.valid < second + LEASE_S // 2)


Share = RateLease | SlotLease


class LimitLeases:
    """All leases of limits of one gateway process. All methods run on the event loop."""

    def __init__(
        self,
        store: Store,
        worker_id: str,
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = STORE_PATIENCE_S,
    ) -> None:
        """`patience_s`: how long a request waits for a store that does not answer."""
        self._store = store
        self._worker_id = worker_id
        self._executor = executor
        self.clock = clock
        self._patience_s = patience_s
        self._skew = 0.0
        """The store's clock less this process's, rather more than less (`ledger.windows`)."""
        self._rates: dict[str, RateLease] = {}
        self._slots: dict[str, SlotLease] = {}
        self._due: dict[Share, None] = {}
        self._next: asyncio.Future[Unavailable | None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._began = 0.0
        self._closing = False
        self.rounds = 0

    def rate(self, limit: Limit) -> RateLease:
        """This process's lease of a limit per minute; empty at first."""
        rate = self._rates.get(limit.limit_id)
        if rate is None:
            rate = self._rates[limit.limit_id] = RateLease(limit)
        rate.limit = limit
        return rate

    def slots(self, limit: Limit) -> SlotLease:
        """This process's slots of a concurrency limit; none at first."""
        slots = self._slots.get(limit.limit_id)
        if slots is None:
            slots = self._slots[limit.limit_id] = SlotLease(limit)
        slots.limit = limit
        return slots

    def second(self) -> int:
        """The store's current second, or the next one."""
        return int(self.clock() + self._skew)

    def refresh(self, known: Collection[str]) -> None:
        """After a change of limits: forget refusals, and the leases of limits that are not `known`."""
        for shares in (self._rates, self._slots):
            for limit_id in [each for each in shares if each not in known]:
                del shares[limit_id]
        for share in self._all():
            share.denied_until = share.dry_until = 0.0

    def nudge(self, share: Share) -> None:
        """Renew a lease in the background, unless the store has just had no more to give."""
        if self.clock() >= share.dry_until:
            self._ask(share)

    async def renew(self, wanted: Collection[tuple[Share, int]]) -> None:
        """Renew leases for a request that waits for these amounts. Raises Unavailable."""
        for share, amount in wanted:
            share.waiting.append(amount)
        try:
            for share, _ in wanted:
                done = self._ask(share)
            began = self._began if self._task is not None and self._began else self.clock()
            await asyncio.wait([done], timeout=max(began + self._patience_s - self.clock(), 0.0))
        finally:
            for share, amount in wanted:
                share.waiting.remove(amount)
        failure = done.result() if done.done() else Unavailable("The database does not answer.")
        if failure is not None:
            names = ", ".join(sorted({str(share.limit.kind) for share, _ in wanted}))
            raise Unavailable(
                f"Your limits ({names}) cannot be checked now: the database does not answer, and what this gateway"
                " had reserved is used up.",
                hint="Try again in a moment.",
            )

    async def beat(self) -> None:
        """Report changes to the store and give back unused permits. Call it once a second."""
        for share in self._all():
            if share.stale(self.second()):
                self._ask(share)
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._patience_s)

    async def give_back(self) -> None:
        """Give all permits back, at the end of the process.

        What was spent goes on counting; slots are freed by whoever closes the process's log (`meter.loader`).
        """
        self._closing = True
        await self.beat()

    def _all(self) -> list[Share]:
        return [*self._rates.values(), *self._slots.values()]

    def _ask(self, share: Share) -> "asyncio.Future[Unavailable | None]":
        """Renew a lease in the next round; returns a future of that round's end, with its failure if any."""
        self._due[share] = None
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._began = self.clock()
            self._task = asyncio.create_task(self._rounds())
        return self._next

    async def _rounds(self) -> None:
        try:
            while self._due:
                due, self._due = self._due, {}
                done, self._next = self._next, None
                self._began = self.clock()
                failure: Unavailable | None = None
                left = iter(due)
                while part := list(islice(left, ROUND_LIMITS)):
                    try:
                        await self._round(part)
                    except Unavailable as error:
                        failure = error
                        break
                    except Exception as error:  # nobody may wait for ever
                        log.exception("limits cannot be renewed")
                        failure = Unavailable(str(error))
                        break
                if done is not None and not done.done():
                    done.set_result(failure)
        finally:
            self._task = None
            self._began = 0.0

    async def _round(self, part: list[Share]) -> None:
        second, now = self.second(), self.clock()
        rates = {each: each.report(second, now, self._closing) for each in part if isinstance(each, RateLease)}
        slots = {each: each.report(second, now) for each in part if isinstance(each, SlotLease)}
        by_id = {each.limit.limit_id: report for each, report in rates.items()}
        slots_by_id = {each.limit.limit_id: report for each, report in slots.items()}
        self.rounds += 1
        try:
            answers, skew = await asyncio.get_running_loop().run_in_executor(
                self._executor, exchange_in, self._store, self._worker_id, by_id, slots_by_id, self.clock
            )
        except BaseException:
            for each in part:
                each.share.dirty = True
            raise
        self._skew = skew
        now, second = self.clock(), int(answers.time)
        for rate, report in rates.items():
            # A limit that was removed binds nobody any more.
            no_more = RateGrant(report.need, second + AHEAD_S, 0, 0, 0)
            rate.answered(answers.rates.get(rate.limit.limit_id, no_more), report, now)
        for slot, slot_report in slots.items():
            unbound = SlotGrant(slot_report.need, second + LEASE_S, 0, 0)
            slot.answered(answers.slots.get(slot.limit.limit_id, unbound), slot_report, now)


def exchange_in(
    store: Store,
    worker_id: str,
    rates: dict[str, RateReport],
    slots: dict[str, SlotReport],
    clock: Callable[[], float],
) -> tuple[LimitReply, float]:
    """Report to the store; returns its answers, and its clock less ours (an upper bound). Blocking."""
    before = clock()
    with store.write() as connection:
        answers = exchange(connection, worker_id, rates, slots)
    return answers, answers.time - before
