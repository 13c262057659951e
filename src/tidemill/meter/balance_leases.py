"""Balance leases: wallets are refilled from the store in the background, before they are empty.

Only a tenant's first request in a process, and one that finds an empty wallet, waits for the store, and not for long.
A wallet is for a tenant's balance or one period of a budget; a request holds its maximum cost in each that pays for it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tidemill.errors import Unavailable
from tidemill.meter.wallet import LeasedBalance
from tidemill.store.balance_leases import extend_lease, return_lease
from tidemill.store.budgets import BudgetPeriod, extend_budget_lease, return_budget_lease
from tidemill.store.engine import Store

T = TypeVar("T")

PurseId = str | BudgetPeriod
"""A tenant's id for its balance, or a period of a budget."""

SLICES = 8
"""A process takes at most this fraction of what a tenant has free, unless a hold needs more."""
LOW_WATER = 0.5
"""A wallet is refilled in the background when less than this share of its last grant is available."""
DRY_FOR_S = 0.25
"""How long a refusal of the store is believed before it is asked again."""
IDLE_FOR_S = 10.0
"""A wallet with nothing held for this long returns what it does not need."""
STORE_PATIENCE_S = 3.0
"""How long a request waits for a store that does not answer."""


class Purse:
    """A wallet and the state of its refills."""

    __slots__ = (
        "asked_at",
        "dry_until",
        "failure",
        "idle_since",
        "last_grant",
        "let_go",
        "low_until",
        "refill",
        "wallet",
    )

    def __init__(self, now: float) -> None:
        self.wallet = LeasedBalance()
        self.refill: asyncio.Task[None] | None = None
        self.asked_at = 0.0
        self.dry_until = 0.0
        self.failure: Unavailable | None = None
        self.last_grant = 0
        self.low_until = 0.0
        """Until then it is not refilled in the background."""
        self.let_go = 0
        """Nanos that it has given back as too little, and may have again."""
        self.idle_since = now


class BalanceLeases:
    """The wallets of one gateway process. All methods run on the event loop."""

    def __init__(
        self,
        store: Store,
        worker_id: str,
        executor: ThreadPoolExecutor,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = STORE_PATIENCE_S,
    ) -> None:
        """`patience_s`: how long a request waits for a store that does not answer."""
        self._store = store
        self._worker_id = worker_id
        self._executor = executor
        self._clock = clock
        self._patience_s = patience_s
        self._purses: dict[PurseId, Purse] = {}
        self.shortages = 0
        """Holds that found too little at hand, and asked the store for more."""

    def purse(self, purse_id: PurseId) -> Purse:
        """The wallet of a tenant or budget, created empty at its first use."""
        purse = self._purses.get(purse_id)
        if purse is None:
            purse = self._purses[purse_id] = Purse(self._clock())
        return purse

    def hold_now(self, purse_id: PurseId, amount: int) -> bool:
        """Hold `amount` if the wallet covers it, and refill a low wallet in the background. The hot path."""
        purse = self.purse(purse_id)
        if not purse.wallet.hold(amount):
            return False
        low = purse.wallet.available < purse.last_grant * LOW_WATER
        if low and purse.refill is None and self._clock() >= max(purse.dry_until, purse.low_until):
            self._start_refill(purse_id, purse, purse.last_grant, need=0)  # a slice: others need some, too
        return True

    async def hold(self, purse_id: PurseId, amount: int) -> bool:
        """Hold `amount`, leasing more from the store as needed; False if the balance does not cover it.

        Raises Unavailable when the wallet is empty and the store does not answer in time.
        """
        purse = self.purse(purse_id)
        if purse.wallet.available < amount:
            self.shortages += 1
        while not purse.wallet.hold(amount):
            if purse.refill is None:
                if self._clock() < purse.dry_until:
                    return False
                self._start_refill(purse_id, purse, amount - purse.wallet.available)
            refill = purse.refill
            assert refill is not None
            await asyncio.wait([refill], timeout=max(purse.asked_at + self._patience_s - self._clock(), 0.0))
            if not refill.done():
                raise Unavailable("The database does not answer.", hint="Try again in a moment.")
            refill.result()  # raises what nobody has foreseen, rather than asking again for ever
            if purse.failure is not None and purse.wallet.available < amount:
                raise purse.failure
        return True

    def settle(self, purse_id: PurseId, hold: int, charge: int) -> None:
        """Turn a hold into a charge."""
        purse = self.purse(purse_id)
        purse.wallet.settle(hold, charge)  # type: ignore[arg-type]
        if purse.wallet.holds == 0:
            purse.idle_since = self._clock()

    def hold_all_now(self, purse_ids: Sequence[PurseId], amount: int) -> bool:
        """Hold `amount` in every wallet, or in none. The hot path."""
        for at, purse_id in enumerate(purse_ids):
            if not self.hold_now(purse_id, amount):
                self.settle_all(purse_ids[:at], amount, 0)
                return False
        return True

    async def hold_all(self, purse_ids: Sequence[PurseId], amount: int) -> PurseId | None:
        """Hold `amount` in every wallet, or in none; then returns the first that does not cover it.

        Raises Unavailable as `hold` does, with nothing held.
        """
        for at, purse_id in enumerate(purse_ids):
            covered = False
            try:
                covered = await self.hold(purse_id, amount)
            finally:
                if not covered:
                    self.settle_all(purse_ids[:at], amount, 0)
            if not covered:
                return purse_id
        return None

    def settle_all(self, purse_ids: Sequence[PurseId], hold: int, charge: int) -> None:
        """Turn the holds of one request into its charge."""
        for purse_id in purse_ids:
            self.settle(purse_id, hold, charge)

    def let_go(self, purse_id: PurseId) -> None:
        """After a refusal, give back the rest of the lease in the background.

        Else processes that each have a little of a tenant's money would all refuse what together they could pay for.
        """
        purse = self.purse(purse_id)
        if not purse.wallet.holds and purse.wallet.available and purse.refill is None:
            purse.let_go = purse.wallet.available
            purse.dry_until = self._clock() + DRY_FOR_S  # others shall have it first
            purse.refill = asyncio.create_task(self._give_back(purse_id, purse))

    def free(self, purse_id: PurseId) -> int:
        """The amount available in this process's wallet, or just given back from it."""
        purse = self.purse(purse_id)
        return purse.wallet.available + purse.let_go

    def refresh(self) -> None:
        """Forget refusals: a balance may have risen."""
        for purse in self._purses.values():
            purse.dry_until = 0.0

    async def return_idle(self, *, all_of_it: bool = False) -> None:
        """Give back what idle wallets have left (at shutdown: what every wallet has left)."""
        now = self._clock()
        for purse_id, purse in list(self._purses.items()):
            wallet = purse.wallet
            idle = wallet.holds == 0 and now - purse.idle_since > IDLE_FOR_S
            if purse.refill is not None or not (idle or all_of_it):
                continue
            await self._take_back(purse_id, purse)
            if isinstance(purse_id, BudgetPeriod) and not (wallet.holds or wallet.available or purse.refill):
                del self._purses[purse_id]  # its day may be over; what was spent of it, the store learns from the log

    async def _give_back(self, purse_id: PurseId, purse: Purse) -> None:
        try:
            await self._take_back(purse_id, purse)
        finally:
            purse.refill = None

    async def _take_back(self, purse_id: PurseId, purse: Purse) -> None:
        surplus = purse.wallet.take_back()
        if surplus:
            purse.last_grant = 0
            try:
                await self._in_thread(return_lease_in, purse_id, surplus)
            except Unavailable:
                purse.wallet.grant(surplus)  # still ours as far as the store knows

    def _start_refill(self, purse_id: PurseId, purse: Purse, missing: int, *, need: int | None = None) -> None:
        """Ask the store for `missing` nanos, of which `need` (all, unless said) must not be less."""
        purse.asked_at = self._clock()
        purse.refill = asyncio.create_task(self._refill(purse_id, purse, missing, missing if need is None else need))

    async def _refill(self, purse_id: PurseId, purse: Purse, missing: int, need: int) -> None:
        try:
            granted = await self._in_thread(extend_lease_in, purse_id, need)
            if granted:
                purse.wallet.grant(granted)
                purse.last_grant = granted
            purse.let_go = 0
            if granted < need:
                purse.dry_until = self._clock() + DRY_FOR_S
            elif granted < missing:
                purse.low_until = self._clock() + DRY_FOR_S
            purse.failure = None
        except Unavailable as failure:
            purse.failure = failure
        finally:
            purse.refill = None

    async def _in_thread(self, call: Callable[[Store, str, PurseId, int], T], purse_id: PurseId, amount: int) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, call, self._store, self._worker_id, purse_id, amount)


def extend_lease_in(store: Store, worker_id: str, purse_id: PurseId, missing: int) -> int:
    """Lease at least `missing` nanos if available, and up to a slice of the balance beyond."""
    with store.write() as connection:
        if isinstance(purse_id, BudgetPeriod):
            return extend_budget_lease(connection, worker_id=worker_id, period=purse_id, need=missing, slices=SLICES)
        return extend_lease(connection, worker_id=worker_id, tenant_id=purse_id, need=missing, slices=SLICES)


def return_lease_in(store: Store, worker_id: str, purse_id: PurseId, amount: int) -> None:
    """Give `amount` nanos of a lease back. Raises Unavailable if the store has certainly not booked it."""
    asked = False
    try:
        with store.write() as connection:
            if isinstance(purse_id, BudgetPeriod):
                return_budget_lease(connection, worker_id=worker_id, period=purse_id, amount=amount)
            else:
                return_lease(connection, worker_id=worker_id, tenant_id=purse_id, amount=amount)
            asked = True
    except Unavailable:
        if not asked:
            raise
        # The commit's answer was lost. The store may have given the money to others, so it is ours no more; if it
        # has not, the lease lasts until this process ends.
