"""Limits and keys' policies in the store, and what gateway processes have of them, on both databases."""

import threading
import time
from datetime import timedelta

import pytest

from tests.store.databases import Databases
from tests.store.values import OCTOBER
from tidemill.errors import Conflict, NotFound
from tidemill.ledger.limits import Limit, LimitKind, Per
from tidemill.ledger.slots import SlotReport
from tidemill.ledger.windows import AHEAD_S, RateReport, RateShare
from tidemill.store.balance_leases import leasing_workers, release_worker
from tidemill.store.engine import Store
from tidemill.store.keys import KeyPolicy, create_key, find_key, rotate_key
from tidemill.store.limit_leases import LimitReply, exchange, rates_in_force, slots_in_use
from tidemill.store.limits import find_limit, list_limits, remove_limit, set_limit
from tidemill.store.revision import current_revision
from tidemill.store.tenants import Tenant


def put(store: Store, tenant: Tenant, kind: str, amount: int, **more: object) -> Limit:
    values = {"limit_id": "", "tenant_id": tenant.tenant_id, "kind": LimitKind(kind), "amount": amount, **more}
    with store.write() as connection:
        return set_limit(connection, Limit(**values), now=OCTOBER)  # type: ignore[arg-type]


def ask(store: Store, worker: str, limit: Limit, need: int = 0, *, spent: int = 0, held: int = 0) -> LimitReply:
    """A report of a limit per minute."""
    report = RateReport({int(time.time()): spent} if spent else {}, held, need=need, least=max(need, 1), want=need)
    with store.write() as connection:
        return exchange(connection, worker, {limit.limit_id: report}, {})


def test_a_limit_is_set_changed_found_and_removed(store: Store, acme: Tenant) -> None:
    made = put(store, acme, "rpm", 100)
    changed = put(store, acme, "rpm", 50)
    narrow = put(store, acme, "rpm", 7, model="big")
    budget = put(store, acme, "budget", 10**9, per=Per.DAY, soft_percent=80)
    monthly = put(store, acme, "budget", 10**10, per=Per.MONTH)
    assert made.limit_id == changed.limit_id and len({narrow.limit_id, budget.limit_id, made.limit_id}) == 3
    with store.read() as connection:
        assert list_limits(connection, acme.tenant_id) == [budget, monthly, changed, narrow]
        assert list_limits(connection, budgets_only=True) == [budget, monthly]
        assert find_limit(connection, budget.limit_id) == budget
        with pytest.raises(NotFound) as refused:
            find_limit(connection, budget.limit_id[:-1])
        assert budget.limit_id in refused.value.hint
        before = current_revision(connection)
    ask(store, "w1", changed, 3)
    with store.write() as connection:
        assert remove_limit(connection, made.limit_id) == changed
        assert current_revision(connection) > before
        assert rates_in_force(connection, int(time.time())) == {}
        assert list_limits(connection, acme.tenant_id) == [budget, monthly, narrow]
    assert ask(store, "w1", changed, 3).rates == {}, "a limit that is gone binds nobody"


def test_permits_are_granted_once(store: Store, acme: Tenant) -> None:
    limit = put(store, acme, "rpm", 100)
    assert ask(store, "w1", limit, 60).rates[limit.limit_id].granted == 60
    assert ask(store, "w2", limit, 60).rates[limit.limit_id].granted == 0, "it does not suffice, so it is left"
    assert ask(store, "w2", limit, 40).rates[limit.limit_id].granted == 40
    assert ask(store, "w1", limit, 0, spent=10, held=20).rates[limit.limit_id].free == 30
    with store.read() as connection:
        assert rates_in_force(connection, int(time.time())) == {limit.limit_id: 70}
        assert rates_in_force(connection, int(time.time()) + AHEAD_S + 62) == {limit.limit_id: 0}


def test_the_shares_of_the_dead_are_forgotten_once_they_do_not_count(store: Store, acme: Tenant) -> None:
    limit = put(store, acme, "rpm", 100)
    old = RateReport({int(time.time()) - 200: 100}, 0)
    with store.write() as connection:
        exchange(connection, "dead", {limit.limit_id: old}, {})
        release_worker(connection, "dead")
    assert ask(store, "w1", limit, 100).rates[limit.limit_id].granted == 100
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM rate_shares WHERE worker_id = 'dead'").scalar() == 0


def test_slots_come_back_from_a_worker_that_died(store: Store, acme: Tenant) -> None:
    limit = put(store, acme, "concurrency", 3)
    with store.write() as connection:
        got = exchange(connection, "w1", {}, {limit.limit_id: SlotReport(0, 0, need=3)})
        assert got.slots[limit.limit_id].granted == 3
        assert (
            exchange(connection, "w2", {}, {limit.limit_id: SlotReport(0, 0, need=1)}).slots[limit.limit_id].granted
            == 0
        )
        assert slots_in_use(connection, int(time.time())) == {limit.limit_id: 3}
        assert leasing_workers(connection) == {"w1"}
        release_worker(connection, "w1")
        assert (
            exchange(connection, "w2", {}, {limit.limit_id: SlotReport(0, 0, need=1)}).slots[limit.limit_id].granted
            == 1
        )
        exchange(connection, "w2", {}, {limit.limit_id: SlotReport(0, 0)})
        assert leasing_workers(connection) == set()


def test_many_processes_at_once_are_granted_exactly_the_limit(databases: Databases, acme: Tenant, store: Store) -> None:
    """Threads with a store of their own each take one by one, of three limits in one transaction."""
    limits = [put(store, acme, "rpm", 120), put(store, acme, "tpm", 120), put(store, acme, "rpm", 120, model="big")]
    admitted = [0] * 6
    failures: list[BaseException] = []

    def work(number: int) -> None:
        mine = databases.again(store)
        shares = {limit.limit_id: RateShare() for limit in limits}
        try:
            while True:
                now = time.time()
                second = int(now) + 1
                reports = {id: share.report(second, now, need=1, reserve_s=1.0) for id, share in shares.items()}
                with mine.write() as connection:
                    answers = exchange(connection, f"w{number}", reports, {})
                for id, share in shares.items():
                    share.renewed(answers.rates[id])
                if not all(share.at_hand(second) for share in shares.values()):
                    return
                while all(share.at_hand(second) for share in shares.values()):
                    admitted[number] += all(share.take(1, second) for share in shares.values())
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert 100 <= sum(admitted) <= 120, admitted


def test_a_rotated_key_has_a_successor_with_its_policies(store: Store, acme: Tenant) -> None:
    policy = KeyPolicy(expires_at=OCTOBER + timedelta(days=90), models=("big",), networks=("10.0.0.0/8",))
    with store.write() as connection:
        first, secret = create_key(connection, tenant_id=acme.tenant_id, name="a", now=OCTOBER, policy=policy)
        later = OCTOBER + timedelta(days=10)
        old, new, new_secret = rotate_key(connection, key=secret, overlap=timedelta(hours=1), now=later)
        assert old.policy.expires_at == later + timedelta(hours=1)
        assert new.policy.expires_at == later + timedelta(days=90), "it lives as long as the old one was made for"
        assert (new.policy.models, new.policy.networks, new.name) == (("big",), ("10.0.0.0/8",), "a")
        _, third, _ = rotate_key(connection, key=new.key_id, overlap=timedelta(0), now=later)
        assert new.first_id == third.first_id == first.key_id == first.first_id
        assert find_key(connection, new_secret).policy.expires_at == later
        with pytest.raises(Conflict, match="has expired"):
            rotate_key(connection, key=new.key_id, overlap=timedelta(0), now=later)
        assert find_key(connection, third.key_id) == third
