"""Budgets: leased like balances, spent with the records, on both databases; warned of once."""

import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import structlog

from tests.meter.conftest import OCTOBER
from tests.store.conftest import new_tenant
from tests.store.databases import Databases
from tests.store.values import grant
from tests.support.prices import token_price
from tidemill.clock import to_micros
from tidemill.ledger.limits import Limit, LimitKind, Per, span_of
from tidemill.ledger.usage import RequestStatus, TokenUsage
from tidemill.meter.balance_leases import extend_lease_in, return_lease_in
from tidemill.meter.frames import allocate_segment, frame
from tidemill.meter.loader import Loader, claim_directory
from tidemill.meter.records import Opened, encode_settled, settle
from tidemill.store.budgets import BudgetPeriod, leased_in, spent_in, verify_budgets, warned
from tidemill.store.engine import Store
from tidemill.store.keys import create_key, rotate_key
from tidemill.store.limits import remove_limit, set_limit
from tidemill.store.tenants import Tenant

ZONE = "Asia/Shanghai"
CHARGE = 1_000_000
"""Nanos of each request here: one token at 1000 units a million."""


class Books:
    """A store with a rich tenant, and a gateway process whose log is loaded."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store = store
        with store.write() as connection:
            self.tenant: Tenant = new_tenant(connection, "rich")
            grant(connection, self.tenant.tenant_id, 10**12)
            key, _ = create_key(connection, tenant_id=self.tenant.tenant_id, name="k", now=OCTOBER)
        self.key_id = key.key_id
        self.meter = directory / "meter"
        self.meter.mkdir()
        self.worker, self.lock = claim_directory(self.meter, "w1")
        self._fd = allocate_segment(self.worker, 1)
        self._offset = 0
        self._count = 0
        self.loader = Loader(store, self.meter, zone=ZONE)

    def budget(self, amount: int, per: Per = Per.DAY, **more: object) -> Limit:
        values = {"limit_id": "", "tenant_id": self.tenant.tenant_id, "kind": LimitKind.BUDGET, "per": per, **more}
        with self.store.write() as connection:
            return set_limit(connection, Limit(amount=amount, **values), now=OCTOBER)  # type: ignore[arg-type]

    def period(self, limit: Limit, days: int = 0) -> BudgetPeriod:
        assert limit.per is not None
        return BudgetPeriod(limit.limit_id, span_of(OCTOBER + timedelta(days=days), limit.per, ZONE))

    def lease(self, limit: Limit, need: int, worker: str = "w1", days: int = 0) -> int:
        return extend_lease_in(self.store, worker, self.period(limit, days), need)

    def request(self, *, model: str = "m", key: str = "", days: float = 0, tokens: int = 1) -> None:
        """One request begins, ends and is logged."""
        self._count += 1
        opened = Opened(
            request_id=f"req_{self._count}",
            tenant_id=self.tenant.tenant_id,
            key_id=key or self.key_id,
            model=model,
            replica="m/0",
            price_id="prc_1",
            currency="CNY",
            price=token_price(CHARGE * 1_000_000, CHARGE * 1_000_000, 0),
            streamed=False,
            started_us=to_micros(OCTOBER + timedelta(days=days)),
        )
        usage = TokenUsage(tokens, 0, 0)
        finished_us = opened.started_us + 3_600_000_000
        outcome = settle(
            opened,
            usage,
            status=RequestStatus.OK,
            estimated=False,
            hold=10**9,
            first_token_us=0,
            finished_us=finished_us,
            device_ns=1,
        )
        data = frame(encode_settled(outcome))
        os.pwrite(self._fd, data, self._offset)
        self._offset += len(data)

    def spent(self, limit: Limit, days: int = 0) -> int:
        with self.store.read() as connection:
            assert verify_budgets(connection, zone=ZONE) == []
            return spent_in(connection, limit, self.period(limit, days).span)

    def leased(self, limit: Limit, days: int = 0) -> int:
        with self.store.read() as connection:
            return leased_in(connection, limit, self.period(limit, days).span)


@pytest.fixture
def books(store: Store, tmp_path: Path) -> Books:
    return Books(store, tmp_path)


def test_leases_and_spending_are_never_more_than_the_budget(books: Books) -> None:
    limit = books.budget(800)
    assert books.lease(limit, 30) == 100  # an eighth
    assert books.lease(limit, 600, "w2") == 600
    assert books.lease(limit, 200) == 100  # the rest
    assert books.lease(limit, 1) == 0
    return_lease_in(books.store, "w2", books.period(limit), 50)
    assert books.leased(limit) == 750
    assert books.lease(limit, 800, days=1) == 800, "a new day, a new budget"


def test_charges_are_booked_on_each_budget_that_binds(books: Books) -> None:
    everything, by_month = books.budget(10**9), books.budget(10**9, Per.MONTH)
    of_key = books.budget(10**9, key_id=books.key_id)
    of_model = books.budget(10**9, model="big")
    books.lease(everything, 10 * CHARGE)
    with books.store.write() as connection:
        _, successor, _ = rotate_key(connection, key=books.key_id, overlap=timedelta(1), now=OCTOBER)
        other, _ = create_key(connection, tenant_id=books.tenant.tenant_id, name="other", now=OCTOBER)
    books.request()
    books.request(model="big")
    books.request(key=successor.key_id)
    books.request(key=other.key_id)
    books.request(days=1)
    books.loader.drain()
    books.loader.drain()
    assert books.spent(everything) == 4 * CHARGE and books.spent(everything, 1) == CHARGE
    assert books.spent(by_month) == 5 * CHARGE
    assert books.spent(of_key) == 3 * CHARGE, "a key and its successors share their limits"
    assert books.spent(of_model) == CHARGE
    assert books.leased(everything) == 125_000_000 - 4 * CHARGE, "an eighth of the budget, less what was spent"


def test_a_request_counts_for_the_period_in_which_it_began(books: Books) -> None:
    """Its hold was taken there; midnight in Shanghai is sixteen o'clock UTC, and it runs for an hour."""
    limit = books.budget(10**9)
    books.request(days=3.5 / 24)
    books.loader.drain()
    assert books.spent(limit) == CHARGE and books.spent(limit, 1) == 0


def test_a_budget_that_is_set_late_begins_with_what_was_spent(books: Books) -> None:
    books.request()
    books.loader.drain()
    limit = books.budget(5 * CHARGE)
    assert books.spent(limit) == CHARGE
    assert books.lease(limit, 5 * CHARGE) == 4 * CHARGE
    books.request()
    books.loader.drain()
    assert books.spent(limit) == 2 * CHARGE


def test_a_dead_worker_gives_back_its_lease(books: Books) -> None:
    limit = books.budget(100 * CHARGE)
    books.lease(limit, 50 * CHARGE)
    books.request()
    os.close(books.lock)  # as its death does
    books.loader.drain()
    assert (books.spent(limit), books.leased(limit)) == (CHARGE, 0)


def test_a_soft_limit_is_warned_of_once_a_period(books: Books) -> None:
    limit = books.budget(10 * CHARGE, soft_percent=50)
    with structlog.testing.capture_logs() as logs:
        for _ in range(8):
            books.request()
            books.loader.drain()
    assert [(each["event"], each["spent"]) for each in logs] == [("a budget's soft limit is reached", "0.005")]
    with books.store.read() as connection:
        assert warned(connection) == {(limit.limit_id, "2026-10-15")}
    books.budget(100 * CHARGE, soft_percent=50)
    with books.store.read() as connection:
        assert warned(connection) == frozenset(), "it was raised"


def test_a_removed_budget_binds_nobody(books: Books) -> None:
    limit = books.budget(10)
    books.lease(limit, 5)
    with books.store.write() as connection:
        remove_limit(connection, limit.limit_id)
    assert books.lease(limit, 500) == 500
    return_lease_in(books.store, "w1", books.period(limit), 500)
    books.request()
    books.loader.drain()


def test_processes_and_the_loader_at_once_never_exceed_a_budget(databases: Databases, books: Books) -> None:
    """Six processes lease what they can, give half of it back, and the loader books charges beside them."""
    limit = books.budget(100 * CHARGE)
    failures: list[BaseException] = []
    leases = [0] * 6

    def work(number: int) -> None:
        mine = databases.again(books.store)
        try:
            for _ in range(15):
                got = extend_lease_in(mine, f"p{number}", books.period(limit), 3 * CHARGE)
                leases[number] += got
                if got > CHARGE:
                    return_lease_in(mine, f"p{number}", books.period(limit), got // 2)
                    leases[number] -= got // 2
        except BaseException as failure:
            failures.append(failure)

    books.lease(limit, 20 * CHARGE)
    for _ in range(20):
        books.request()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    books.loader.drain()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert books.spent(limit) == 20 * CHARGE
    with books.store.read() as connection:
        out = leased_in(connection, limit, books.period(limit).span)
    assert out == sum(leases) and out + 20 * CHARGE <= 100 * CHARGE
