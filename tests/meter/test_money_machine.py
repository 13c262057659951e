"""The way of money as a state machine: gateway processes that start, hold, settle, stop and are killed in any order,
a loader that crashes, credits that come in; the real log, live table, leases, store and ledger throughout.

Always: the leases of a tenant are within its balance, a wallet's holds and spending within its budget, each lease
covers what its process may still spend, the books balance, and no balance is negative. In the end: one record for
each request, `balance = granted - charged`, and no lease.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from sqlalchemy import select

from tests.meter.values import START_US
from tests.store.databases import FlakyStore
from tests.store.values import LONG_AGO, ZONE, assert_clean, grant
from tests.support.examples import examples
from tests.support.prices import token_price
from tests.support.stores import migrated_store
from tidemill.errors import Unavailable
from tidemill.ledger.usage import RequestStatus, TokenUsage
from tidemill.meter.balance_leases import DRY_FOR_S, IDLE_FOR_S, BalanceLeases
from tidemill.meter.live import LiveTable
from tidemill.meter.loader import LIVE_FILE, Loader, claim_directory
from tidemill.meter.log import LogFull, UsageLog
from tidemill.meter.records import Opened, encode_settled, settle
from tidemill.store.accounts import tenant_balances
from tidemill.store.tables.money import leases
from tidemill.store.tenants import create_tenant
from tidemill.store.usage import records_between

PRICE = token_price(1_000_000, 250_000, 3_000_000)
"""One nano for an input token, a quarter for a cached one, three for an output token."""
TENANTS = 2


class Flight:
    def __init__(self, process: "Process", opened: Opened, slot: int, hold: int) -> None:
        self.process = process
        self.opened = opened
        self.slot = slot
        self.hold = hold
        self.noted = TokenUsage()


class Process:
    """A gateway process with the production's own meter, and a clock of its own."""

    def __init__(
        self, name: str, meter_dir: Path, store: FlakyStore, executor: ThreadPoolExecutor, machine: Any
    ) -> None:
        self.name = name
        self.directory, self._lock = claim_directory(meter_dir, name)
        self.log = UsageLog(self.directory, machine.loop, segment_bytes=8192)
        self.live = LiveTable(self.directory / LIVE_FILE, 32)
        self.leasing = BalanceLeases(store, name, executor, clock=lambda: machine.now)
        self.alive = True

    def die(self) -> None:
        self.alive = False
        self.log.close()
        os.close(self._lock)


class Money(RuleBasedStateMachine):
    flights = Bundle("flights")

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.directory = Path(tempfile.mkdtemp(prefix="tm-money-", dir=memory if os.access(memory, os.W_OK) else None))
        self.meter_dir = self.directory / "meter"
        self.meter_dir.mkdir()
        opened = migrated_store(self.directory)
        self.store = FlakyStore(opened.engine)
        self.loader_store = FlakyStore(opened.engine)
        self.loader = Loader(self.loader_store, self.meter_dir, zone=ZONE)
        self.loop = asyncio.new_event_loop()
        self.executor = ThreadPoolExecutor(2)
        self.now = 1000.0
        self.processes: list[Process] = []
        self.names = iter(f"gw-{number}" for number in range(10**6))
        self.requests = iter(range(10**9))
        self.granted: dict[str, int] = {}
        self.charged: dict[str, int] = {}
        """What was settled or must be recovered, by request id."""
        self.payer: dict[str, str] = {}
        self.lost_leases = False

    @initialize()
    def begin(self) -> None:
        with self.store.write() as connection:
            for number in range(TENANTS):
                tenant = create_tenant(connection, name=f"tenant {number}", currency="CNY", now=LONG_AGO)
                grant(connection, tenant.tenant_id, 10_000)
                self.granted[tenant.tenant_id] = 10_000
        self.start()

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def living(self, number: int) -> Process | None:
        alive = [process for process in self.processes if process.alive]
        return alive[number % len(alive)] if alive else None

    # What happens

    @rule(tenant=st.integers(0, TENANTS - 1), amount=st.integers(1, 20_000))
    def credit(self, tenant: int, amount: int) -> None:
        tenant_id = list(self.granted)[tenant]
        with self.store.write() as connection:
            grant(connection, tenant_id, amount)
        self.granted[tenant_id] += amount
        for process in self.processes:
            process.leasing.refresh()

    @precondition(lambda self: sum(process.alive for process in self.processes) < 3)
    @rule()
    def start(self) -> None:
        self.processes.append(Process(next(self.names), self.meter_dir, self.store, self.executor, self))

    @rule(
        target=flights,
        process=st.integers(0, 2),
        tenant=st.integers(0, TENANTS - 1),
        holds=st.lists(st.integers(0, 3_000), min_size=1, max_size=4),
    )
    def ask(self, process: int, tenant: int, holds: list[int]) -> Any:
        """Requests arrive at the same moment; each that gets its hold is opened."""
        return multiple(*self.ask_for(process, tenant, holds))

    def ask_for(self, process: int, tenant: int, holds: list[int]) -> list[Flight]:
        chosen, tenant_id = self.living(process), list(self.granted)[tenant]
        if chosen is None:
            return []

        async def hold(amount: int) -> bool:
            try:
                return chosen.leasing.hold_now(tenant_id, amount) or await chosen.leasing.hold(tenant_id, amount)
            except Unavailable:
                return False

        async def all_at_once() -> list[bool]:
            return await asyncio.gather(*map(hold, holds))

        made = []
        for amount, held in zip(holds, self.run(all_at_once()), strict=True):
            if not held:
                continue
            request_id = f"req_{next(self.requests)}"
            opened = Opened(request_id, tenant_id, "key", "m", "m/0", "prc", "CNY", PRICE, True, START_US)
            try:
                chosen.log.reserve()
            except LogFull:
                chosen.leasing.settle(tenant_id, amount, 0)
                continue
            flight = Flight(chosen, opened, chosen.live.open(opened, amount), amount)
            self.payer[request_id] = tenant_id
            self.charged[request_id] = 0
            made.append(flight)
        return made

    @rule(flight=flights, prompt=st.integers(0, 500), cached=st.integers(0, 100), completion=st.integers(0, 1000))
    def tokens_pass(self, flight: Flight, prompt: int, cached: int, completion: int) -> None:
        if not flight.process.alive:
            return
        flight.noted = TokenUsage(prompt, cached, completion)
        usage = flight.noted
        flight.process.live.count(
            flight.slot, usage.prompt, usage.cached, usage.completion, START_US, flight.hold, False
        )
        self.charged[flight.opened.request_id] = self.rated(flight, usage)

    def rated(self, flight: Flight, usage: TokenUsage) -> int:
        return int(self.outcome(flight, usage).charge)

    def outcome(self, flight: Flight, usage: TokenUsage) -> Any:
        return settle(
            flight.opened,
            usage,
            status=RequestStatus.OK,
            estimated=False,
            hold=flight.hold,
            first_token_us=START_US,
            finished_us=START_US + 1,
            device_ns=1,
        )

    @rule(
        flight=consumes(flights),
        usage=st.builds(TokenUsage, st.integers(0, 500), st.integers(0, 100), st.integers(0, 1000)),
        killed=st.sampled_from(["", "", "", "", "", "before the log", "before the slot"]),
    )
    def settle(self, flight: Flight, usage: TokenUsage, killed: str) -> None:
        self.finish(flight, usage, killed)

    def finish(self, flight: Flight, usage: TokenUsage, killed: str) -> None:
        process = flight.process
        if not process.alive:
            return
        if killed == "before the log":
            process.die()  # what had been noted is what will be billed
            return
        outcome = self.outcome(flight, usage)
        process.leasing.settle(flight.opened.tenant_id, flight.hold, outcome.charge)

        async def write() -> None:
            await process.log.append(encode_settled(outcome))

        self.run(write())
        self.charged[flight.opened.request_id] = outcome.charge
        if killed == "before the slot":
            process.die()
            return
        process.live.close_slot(flight.slot)

    @rule(
        process=st.integers(0, 2),
        tenant=st.integers(0, TENANTS - 1),
        asked=st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 1000)), min_size=1, max_size=4),
    )
    def serve(self, process: int, tenant: int, asked: list[tuple[int, int]]) -> None:
        """Requests from their beginning to their end."""
        for amount, completion in asked:
            flights = self.ask_for(process, tenant, [amount])
            for flight in flights:
                self.finish(flight, TokenUsage(10, 0, completion), "")

    @rule(process=st.integers(0, 2), how=st.sampled_from(["killed", "stopped"]))
    def end(self, process: int, how: str) -> None:
        """A `kill -9`, or a clean end as far as requests in flight allow: these are recovered in both cases."""
        chosen = self.living(process)
        if chosen is None:
            return
        if how == "stopped":
            self.run(chosen.leasing.return_idle(all_of_it=True))
        chosen.die()

    @rule(seconds=st.sampled_from([DRY_FOR_S, IDLE_FOR_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for process in self.processes:
            if process.alive:
                self.run(process.leasing.return_idle())

    @rule(lost=st.booleans())
    def answer_of_a_return_is_lost(self, lost: bool) -> None:
        """The store takes a lease back and the process does not hear of it."""
        self.now += IDLE_FOR_S + 1
        for process in self.processes:
            if process.alive:
                self.store.lose_commit = lost
                self.run(process.leasing.return_idle())
                self.store.lose_commit = False

    @rule()
    def drain(self) -> None:
        self.loader.drain()

    @rule(how=st.sampled_from(["down", "lose_commit", "killed"]))
    def loader_fails(self, how: str) -> None:
        if how == "killed":
            self.loader = Loader(self.loader_store, self.meter_dir, zone=ZONE)
            return
        setattr(self.loader_store, how, True)
        with contextlib.suppress(Unavailable):
            self.loader.drain()
        self.loader_store.down = self.loader_store.lose_commit = False

    # What holds at all times

    @invariant()
    def nobody_can_spend_what_is_not_there(self) -> None:
        with self.store.read() as connection:
            balances = tenant_balances(connection)
            rows = connection.execute(select(leases)).all()
        for tenant_id in self.granted:
            balance = balances.get(tenant_id, 0)
            assert balance >= 0
            assert sum(row.amount for row in rows if row.tenant_id == tenant_id) <= balance
        leased = {(row.worker_id, row.tenant_id): row.amount for row in rows}
        for process in self.processes:
            if not process.alive:
                continue
            for tenant_id in self.granted:
                wallet = process.leasing.purse(tenant_id).wallet
                assert min(wallet.spent, wallet.held, wallet.available) >= 0
                assert wallet.spent + wallet.held <= wallet.budget
                assert leased.get((process.name, tenant_id), 0) >= wallet.held + wallet.available
        for tenant_id, granted in self.granted.items():
            assert self.total(tenant_id) <= granted

    @invariant()
    def the_books_balance(self) -> None:
        assert_clean(self.store)

    def total(self, tenant_id: str) -> int:
        return sum(charge for request, charge in self.charged.items() if self.payer[request] == tenant_id)

    # The end

    async def refills(self) -> None:
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    def teardown(self) -> None:
        try:
            self.run(self.refills())
            for process in self.processes:
                if process.alive:
                    process.die()
            self.loader.drain()
            assert Loader(self.store, self.meter_dir, zone=ZONE).drain().records == 0
            with self.store.read() as connection:
                assert connection.execute(select(leases)).all() == []
                found = list(records_between(connection, tenant_id=None, start=None, end=None))
                balances = tenant_balances(connection)
            assert {record.request_id: record.charge for record in found} == self.charged
            for tenant_id, granted in self.granted.items():
                assert balances.get(tenant_id, 0) == granted - self.total(tenant_id)
            assert_clean(self.store)
            assert list(self.meter_dir.iterdir()) == []
        finally:
            self.executor.shutdown()
            self.loop.close()
            self.store.close()
            shutil.rmtree(self.directory, ignore_errors=True)


TestMoney = Money.TestCase
TestMoney.settings = examples(0.3, stateful_step_count=60)
