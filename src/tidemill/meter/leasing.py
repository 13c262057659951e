"""Keeping the wallets filled: leases are taken from the store in the background, well before they are empty.

Only a tenant's first request in a process, and one that meets an empty wallet, waits for the store.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tidemill.errors import Unavailable
from tidemill.meter.wallet import Wallet
from tidemill.store.engine import Store
from tidemill.store.leases import extend_lease, return_lease

T = TypeVar("T")

SLICES = 8
"""A process takes at most this fraction of what a tenant has free, unless a hold needs more."""
LOW_WATER = 0.5
"""A wallet is refilled in the background when less than this share of its last grant is available."""
DRY_FOR_S = 0.25
"""How long a refusal of the store is believed before it is asked again."""
IDLE_FOR_S = 10.0
"""A wallet with nothing held for this long returns what it does not need."""


class Purse:
    """A wallet and the state of its refilling."""

    __slots__ = ("dry_until", "failure", "idle_since", "last_grant", "refill", "wallet")

    def __init__(self) -> None:
        self.wallet = Wallet()
        self.refill: asyncio.Task[None] | None = None
        self.dry_until = 0.0
        self.failure: Unavailable | None = None
        self.last_grant = 0
        self.idle_since = time.monotonic()


class Leasing:
    """The purses of one gateway process, by tenant. All methods run on the event loop."""

    def __init__(
        self,
        store: Store,
        worker_id: str,
        executor: ThreadPoolExecutor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._worker_id = worker_id
        self._executor = executor
        self._clock = clock
        self._purses: dict[str, Purse] = {}

    def purse(self, tenant_id: str) -> Purse:
        """The purse of a tenant, made empty at its first use."""
        purse = self._purses.get(tenant_id)
        if purse is None:
            purse = self._purses[tenant_id] = Purse()
        return purse

    def hold_now(self, tenant_id: str, amount: int) -> bool:
        """Hold `amount` if the wallet has it at hand; refill in the background when it runs low. The hot path."""
        purse = self.purse(tenant_id)
        if not purse.wallet.hold(amount):
            return False
        low = purse.wallet.available < purse.last_grant * LOW_WATER
        if low and purse.refill is None and self._clock() >= purse.dry_until:
            self._start_refill(tenant_id, purse, purse.last_grant)
        return True

    async def hold(self, tenant_id: str, amount: int) -> bool:
        """Hold `amount`, asking the store for more as long as it gives. False when the balance does not cover it.

        Raises Unavailable when the wallet is empty and the store does not answer.
        """
        purse = self.purse(tenant_id)
        while not purse.wallet.hold(amount):
            if purse.refill is None:
                if self._clock() < purse.dry_until:
                    return False
                self._start_refill(tenant_id, purse, amount - purse.wallet.available)
            assert purse.refill is not None
            await asyncio.shield(purse.refill)
            if purse.failure is not None and purse.wallet.available < amount:
                raise purse.failure
        return True

    def settle(self, tenant_id: str, hold: int, charge: int) -> None:
        """Turn a hold into a charge."""
        purse = self.purse(tenant_id)
        purse.wallet.settle(hold, charge)  # type: ignore[arg-type]
        if purse.wallet.holds == 0:
            purse.idle_since = self._clock()

    def refresh(self) -> None:
        """Forget refusals: a balance may have risen."""
        for purse in self._purses.values():
            purse.dry_until = 0.0

    async def return_idle(self, *, all_of_it: bool = False) -> None:
        """Give back what idle wallets have left (at shutdown: what every wallet has left)."""
        now = self._clock()
        for tenant_id, purse in list(self._purses.items()):
            wallet = purse.wallet
            idle = wallet.holds == 0 and now - purse.idle_since > IDLE_FOR_S
            if purse.refill is not None or not (idle or all_of_it):
                continue
            surplus = wallet.take_back()
            if surplus:
                purse.last_grant = 0
                try:
                    await self._in_thread(return_lease_in, tenant_id, surplus)
                except Unavailable:
                    wallet.grant(surplus)  # still ours as far as the store knows

    def _start_refill(self, tenant_id: str, purse: Purse, missing: int) -> None:
        purse.refill = asyncio.create_task(self._refill(tenant_id, purse, missing))

    async def _refill(self, tenant_id: str, purse: Purse, missing: int) -> None:
        try:
            granted = await self._in_thread(extend_lease_in, tenant_id, missing)
            if granted:
                purse.wallet.grant(granted)
                purse.last_grant = granted
            if granted < missing:
                purse.dry_until = self._clock() + DRY_FOR_S
            purse.failure = None
        except Unavailable as failure:
            purse.failure = failure
        finally:
            purse.refill = None

    async def _in_thread(self, call: Callable[[Store, str, str, int], T], tenant_id: str, amount: int) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, call, self._store, self._worker_id, tenant_id, amount)


def extend_lease_in(store: Store, worker_id: str, tenant_id: str, missing: int) -> int:
    """Lease at least `missing` nanos if they are free, and up to a slice of the balance beyond."""
    with store.write() as connection:
        return extend_lease(connection, worker_id=worker_id, tenant_id=tenant_id, need=missing, slices=SLICES)


def return_lease_in(store: Store, worker_id: str, tenant_id: str, amount: int) -> None:
    """Give `amount` nanos of a lease back. Raises Unavailable when the store surely has not taken them."""
    asked = False
    try:
        with store.write() as connection:
            return_lease(connection, worker_id=worker_id, tenant_id=tenant_id, amount=amount)
            asked = True
    except Unavailable:
        if not asked:
            raise
        # The commit's answer was lost. The store may have given the money to others, so it is ours no more; if it
        # has not, the lease lasts until this process ends.
