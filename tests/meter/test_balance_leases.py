"""Leasing: wallets are filled from the store in time, and never with money that somebody else may spend too."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.meter.conftest import OCTOBER
from tests.store.databases import Databases, FlakyStore
from tests.store.values import balance_of, grant
from tidemill.errors import Unavailable
from tidemill.meter.balance_leases import DRY_FOR_S, IDLE_FOR_S, SLICES, BalanceLeases
from tidemill.store.balance_leases import leased
from tidemill.store.tenants import create_tenant

TENANT_BALANCE = 8000


class World:
    """A tenant with a balance, a clock, and as many gateway processes as are asked for."""

    def __init__(self, databases: Databases, executor: ThreadPoolExecutor) -> None:
        self.databases = databases
        self.executor = executor
        self.store = FlakyStore(databases.migrated().engine)
        self.now = 1000.0
        with self.store.write() as connection:
            tenant = create_tenant(connection, name="acme", currency="CNY", now=OCTOBER)
            grant(connection, tenant.tenant_id, TENANT_BALANCE)
        self.tenant = tenant.tenant_id

    def process(self, name: str = "w1") -> BalanceLeases:
        return BalanceLeases(self.store, name, self.executor, clock=lambda: self.now)

    def leased(self) -> int:
        with self.store.read() as connection:
            return leased(connection, self.tenant)


@pytest.fixture
def world(databases: Databases) -> Iterator[World]:
    with ThreadPoolExecutor(2) as executor:
        yield World(databases, executor)


async def settled(leasing: BalanceLeases, tenant: str) -> None:
    """Until the background refill is over."""
    while (refill := leasing.purse(tenant).refill) is not None:
        await asyncio.gather(refill, return_exceptions=True)


async def test_the_first_request_waits_for_a_lease_and_the_next_do_not(world: World) -> None:
    leasing = world.process()
    assert not leasing.hold_now(world.tenant, 10)
    assert await leasing.hold(world.tenant, 10)
    assert world.leased() == TENANT_BALANCE // SLICES == leasing.purse(world.tenant).wallet.budget
    assert leasing.hold_now(world.tenant, 10)
    assert leasing.purse(world.tenant).refill is None


async def test_a_wallet_that_runs_low_is_refilled_in_the_background(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 10)
    assert leasing.hold_now(world.tenant, 500)
    assert leasing.purse(world.tenant).refill is not None
    assert leasing.hold_now(world.tenant, 400)  # meanwhile
    await settled(leasing, world.tenant)
    assert leasing.purse(world.tenant).wallet.available > 500
    assert world.leased() == leasing.purse(world.tenant).wallet.budget


async def test_a_hold_larger_than_a_slice_gets_what_it_needs(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 6000)
    assert world.leased() == 6000
    assert not await leasing.hold(world.tenant, 2001)
    assert leasing.purse(world.tenant).wallet.available == 2000
    assert await leasing.hold(world.tenant, 2000)
    assert world.leased() == TENANT_BALANCE


async def test_a_burst_gets_what_the_balance_pays_for_and_not_one_more(world: World) -> None:
    """Two hundred at once, of which the balance covers ten; over three processes."""
    processes = [world.process(name) for name in ("w1", "w2", "w3")]
    asked = [processes[number % 3].hold(world.tenant, TENANT_BALANCE // 10) for number in range(200)]
    answers = await asyncio.gather(*asked)
    assert sum(answers) <= 10
    assert sum(answers) >= 8  # slices may strand a little in each process
    held = sum(process.purse(world.tenant).wallet.held for process in processes)
    assert held == sum(answers) * TENANT_BALANCE // 10 <= TENANT_BALANCE
    assert world.leased() <= TENANT_BALANCE


async def test_a_single_process_lets_a_burst_use_all_of_the_balance(world: World) -> None:
    leasing = world.process()
    answers = await asyncio.gather(*(leasing.hold(world.tenant, TENANT_BALANCE // 10) for _ in range(200)))
    assert sum(answers) == 10


async def test_processes_that_each_have_too_little_put_it_together(world: World) -> None:
    """Else each would refuse what they could pay for together, as long as each is asked (litellm 28247)."""
    processes = [world.process(name) for name in ("w1", "w2", "w3", "w4")]
    for process in processes:
        assert await process.hold(world.tenant, 1800)
        process.settle(world.tenant, 1800, 1000)
    for process in processes[:3]:  # 800 are free, and each of the four has 800
        assert not await process.hold(world.tenant, 4000)
        assert process.free(world.tenant) >= 800, "what the message names"
        process.let_go(world.tenant)
        assert process.free(world.tenant) >= 800
        await settled(process, world.tenant)
    assert await processes[3].hold(world.tenant, 4000)
    assert world.leased() == TENANT_BALANCE
    assert not await processes[0].hold(world.tenant, 1)


async def test_what_is_held_is_not_let_go(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 600)
    leasing.let_go(world.tenant)
    assert leasing.purse(world.tenant).refill is None and world.leased() == 1000


async def test_a_refill_in_the_background_takes_a_slice_and_leaves_the_rest_to_others(world: World) -> None:
    leasing, other = world.process("w1"), world.process("w2")
    assert await leasing.hold(world.tenant, 1)
    assert await other.hold(world.tenant, 6000)  # 1000 are free
    assert leasing.hold_now(world.tenant, 600)  # runs low; its last grant was 1000
    await settled(leasing, world.tenant)
    assert world.leased() == 7000 + 1000 // SLICES
    assert leasing.hold_now(world.tenant, 200)
    assert leasing.purse(world.tenant).refill is None, "and is not asked again at once"
    assert await leasing.hold(world.tenant, 600), "a request that needs more gets it all the same"


async def test_a_refusal_is_believed_for_a_moment_and_forgotten_when_the_balance_rises(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, TENANT_BALANCE)
    assert not await leasing.hold(world.tenant, 5)
    with world.store.write() as connection:
        grant(connection, world.tenant, 100)
    assert not await leasing.hold(world.tenant, 5)
    leasing.refresh()
    assert await leasing.hold(world.tenant, 5)
    assert not await leasing.hold(world.tenant, 500)
    with world.store.write() as connection:
        grant(connection, world.tenant, 1000)
    world.now += DRY_FOR_S + 0.01
    assert await leasing.hold(world.tenant, 500)


async def test_a_dry_store_is_not_asked_with_each_request(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, TENANT_BALANCE - 100)
    assert not await leasing.hold(world.tenant, 101)
    leasing.purse(world.tenant).last_grant = 1000
    assert leasing.hold_now(world.tenant, 1)
    assert leasing.purse(world.tenant).refill is None
    world.now += DRY_FOR_S + 0.01
    assert leasing.hold_now(world.tenant, 1)
    assert leasing.purse(world.tenant).refill is not None
    await settled(leasing, world.tenant)


async def test_while_the_store_is_down_what_is_leased_can_be_spent(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 10)
    world.store.down = True
    assert leasing.hold_now(world.tenant, 900)
    await settled(leasing, world.tenant)
    with pytest.raises(Unavailable, match="does not answer"):
        await leasing.hold(world.tenant, 900)
    assert leasing.purse(world.tenant).wallet.available == 90
    assert leasing.hold_now(world.tenant, 90)
    world.store.down = False
    assert await leasing.hold(world.tenant, 900)


async def test_all_that_wait_for_a_store_that_is_down_are_told(world: World) -> None:
    leasing = world.process()
    world.store.down = True
    answers = await asyncio.gather(*(leasing.hold(world.tenant, 1) for _ in range(20)), return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in answers)
    assert leasing.purse(world.tenant).wallet.held == 0


async def test_one_who_gives_up_waiting_does_not_take_the_lease_from_the_others(world: World) -> None:
    leasing = world.process()
    first = asyncio.create_task(leasing.hold(world.tenant, 10))
    second = asyncio.create_task(leasing.hold(world.tenant, 10))
    await asyncio.sleep(0)
    first.cancel()
    assert await second
    assert leasing.purse(world.tenant).wallet.held == 10


async def test_an_idle_wallet_gives_back_what_it_has_left(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 600)
    leasing.settle(world.tenant, 600, 100)
    await leasing.return_idle()
    assert world.leased() == 1000
    world.now += IDLE_FOR_S + 0.1
    await leasing.return_idle()
    assert world.leased() == 100  # spent, and not drained yet
    assert leasing.purse(world.tenant).wallet.available == 0
    assert await leasing.hold(world.tenant, 50)


async def test_a_wallet_in_use_is_not_idle(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 600)
    world.now += 10 * IDLE_FOR_S
    await leasing.return_idle()
    assert world.leased() == 1000
    leasing.settle(world.tenant, 600, 0)
    await leasing.return_idle()
    assert world.leased() == 1000


async def test_at_the_end_everything_but_what_is_held_or_spent_goes_back(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 600)
    assert await leasing.hold(world.tenant, 50)
    leasing.settle(world.tenant, 600, 100)
    await leasing.return_idle(all_of_it=True)
    assert world.leased() == 150


async def test_what_the_store_did_not_take_back_is_still_there(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 600)
    leasing.settle(world.tenant, 600, 0)
    world.store.down = True
    await leasing.return_idle(all_of_it=True)
    assert leasing.purse(world.tenant).wallet.available == 1000
    world.store.down = False
    assert world.leased() == 1000


async def test_what_the_store_may_have_taken_back_is_spent_by_nobody_here(world: World) -> None:
    """The commit went through and its answer was lost: another process may have leased the money by now."""
    leasing, other = world.process("w1"), world.process("w2")
    assert await leasing.hold(world.tenant, TENANT_BALANCE)
    leasing.settle(world.tenant, TENANT_BALANCE, 0)
    world.store.lose_commit = True
    await leasing.return_idle(all_of_it=True)
    assert await other.hold(world.tenant, TENANT_BALANCE)
    assert not leasing.hold_now(world.tenant, 1)
    assert not await leasing.hold(world.tenant, 1)


async def test_a_lease_whose_answer_was_lost_is_spent_by_nobody(world: World) -> None:
    leasing = world.process()
    world.store.lose_commit = True
    with pytest.raises(Unavailable):
        await leasing.hold(world.tenant, 600)
    assert leasing.purse(world.tenant).wallet.budget == 0
    assert world.leased() == 1000  # until the process ends
    assert await leasing.hold(world.tenant, 7000)
    assert world.leased() == TENANT_BALANCE


async def test_a_charge_goes_to_the_wallet_of_its_tenant(world: World) -> None:
    leasing = world.process()
    assert await leasing.hold(world.tenant, 600)
    leasing.settle(world.tenant, 600, 200)
    wallet = leasing.purse(world.tenant).wallet
    assert (wallet.budget, wallet.spent, wallet.held) == (1000, 200, 0)
    assert balance_of(world.store, world.tenant) == TENANT_BALANCE  # until it is drained


async def test_a_fault_that_nobody_has_foreseen_is_raised_and_not_repeated_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("tidemill.meter.balance_leases.extend_lease_in", broken)
    leasing = world.process()
    async with asyncio.timeout(5):
        with pytest.raises(ZeroDivisionError):
            await leasing.hold(world.tenant, 10)


async def test_a_store_that_hangs_is_not_waited_for_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def hangs(*arguments: object) -> int:
        gate.wait(10)
        return 1000

    monkeypatch.setattr("tidemill.meter.balance_leases.extend_lease_in", hangs)
    monkeypatch.setattr("tidemill.meter.balance_leases.STORE_PATIENCE_S", 0.05)
    leasing = world.process()
    with pytest.raises(Unavailable, match="does not answer"):
        await leasing.hold(world.tenant, 10)
    gate.set()
    await settled(leasing, world.tenant)
    assert leasing.hold_now(world.tenant, 10)  # what came late is not lost


async def test_several_purses_are_held_all_or_none(world: World) -> None:
    with world.store.write() as connection:
        other = create_tenant(connection, name="poor", currency="CNY", now=OCTOBER).tenant_id
    leasing = world.process()
    assert await leasing.hold_all([world.tenant, other], 10) == other
    assert leasing.purse(world.tenant).wallet.held == 0
    assert not leasing.hold_all_now([world.tenant, other], 10)
    assert leasing.purse(world.tenant).wallet.held == 0
    assert await leasing.hold_all([world.tenant], 10) is None
    leasing.settle_all([world.tenant], 10, 4)
    assert (leasing.purse(world.tenant).wallet.held, leasing.purse(world.tenant).wallet.spent) == (0, 4)
