"""Leases: what all processes together may spend is never more than there is."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.conftest import new_tenant
from tests.store.databases import Databases
from tests.store.values import balance_of, grant
from tests.support.examples import examples
from tidemill.store.balance_leases import extend_lease, leased, leasing_workers, release_worker, return_lease
from tidemill.store.engine import Store
from tidemill.store.tenants import Tenant


def lease(store: Store, worker: str, tenant: Tenant, need: int, slices: int = 8) -> int:
    with store.write() as connection:
        return extend_lease(connection, worker_id=worker, tenant_id=tenant.tenant_id, need=need, slices=slices)


def give_back(store: Store, worker: str, tenant: Tenant, amount: int) -> None:
    with store.write() as connection:
        return_lease(connection, worker_id=worker, tenant_id=tenant.tenant_id, amount=amount)


def out(store: Store, tenant: Tenant) -> int:
    with store.read() as connection:
        return leased(connection, tenant.tenant_id)


@pytest.fixture
def rich(store: Store, acme: Tenant) -> Tenant:
    with store.write() as connection:
        grant(connection, acme.tenant_id, 800)
    return acme


def test_a_lease_is_the_need_or_a_slice_and_never_more_than_is_free(store: Store, rich: Tenant) -> None:
    assert lease(store, "w1", rich, 30) == 100  # an eighth of what is free
    assert lease(store, "w2", rich, 500) == 500  # the need
    assert lease(store, "w1", rich, 150) == 150
    assert lease(store, "w2", rich, 150) == 50  # the rest
    assert lease(store, "w1", rich, 1) == 0
    assert out(store, rich) == 800
    with store.read() as connection:
        assert leasing_workers(connection) == {"w1", "w2"}


def test_without_a_balance_there_is_no_lease(store: Store, acme: Tenant) -> None:
    assert lease(store, "w1", acme, 1) == 0
    with store.read() as connection:
        assert leasing_workers(connection) == set()


def test_what_is_given_back_is_free_again(store: Store, rich: Tenant) -> None:
    lease(store, "w1", rich, 800)
    give_back(store, "w1", rich, 300)
    assert out(store, rich) == 500
    give_back(store, "w1", rich, 501)  # more than there is: never below zero
    assert out(store, rich) == 0
    give_back(store, "w9", rich, 5)  # a lease that never was
    assert lease(store, "w2", rich, 800) == 800


def test_a_released_worker_holds_nothing_and_others_keep_theirs(store: Store, rich: Tenant) -> None:
    lease(store, "w1", rich, 100)
    lease(store, "w2", rich, 100)
    with store.write() as connection:
        release_worker(connection, "w1")
        release_worker(connection, "w1")
        assert leasing_workers(connection) == {"w2"}
    assert out(store, rich) == 100


def test_tenants_do_not_touch_each_other(store: Store, rich: Tenant) -> None:
    with store.write() as connection:
        other = new_tenant(connection, "other")
        grant(connection, other.tenant_id, 10)
    assert lease(store, "w1", rich, 800) == 800
    assert lease(store, "w1", other, 100) == 10
    give_back(store, "w1", rich, 800)
    assert (out(store, rich), out(store, other)) == (0, 10)


@examples(0.2)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3 * 10**5), st.integers(1, 16)), max_size=15),
)
def test_the_sum_of_the_leases_never_exceeds_the_balance(
    store: Store, balance: int, asked: list[tuple[str, int, int]]
) -> None:
    with store.write() as connection:
        tenant = new_tenant(connection, f"tenant {time.perf_counter_ns()}")
        if balance:
            grant(connection, tenant.tenant_id, balance)
    total = 0
    for worker, need, slices in asked:
        got = lease(store, worker, tenant, need, slices)
        free = balance - total
        assert got == min(max(need, free // slices), free)
        total += got
        assert out(store, tenant) == total <= balance


def test_many_processes_at_once_get_no_more_than_there_is(databases: Databases, store: Store, rich: Tenant) -> None:
    granted: list[int] = []

    def ask(worker: str) -> None:
        mine = databases.again(store)
        for _ in range(5):
            granted.append(lease(mine, worker, rich, 37, slices=1000))

    threads = [threading.Thread(target=ask, args=(f"w{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == out(store, rich) == 800 == balance_of(store, rich.tenant_id)


def test_a_lease_that_grows_while_some_of_it_is_given_back_loses_neither(
    databases: Databases, store: Store, rich: Tenant
) -> None:
    """Were the amount read before and written after, an extension in between would be lost, and leased twice."""
    other = databases.again(store)
    lease(store, "w1", rich, 400)

    def return_ones() -> None:
        for _ in range(100):
            give_back(other, "w1", rich, 1)

    thread = threading.Thread(target=return_ones)
    thread.start()
    granted = 400
    while thread.is_alive() and granted < 800:
        granted += lease(store, "w1", rich, 2, slices=1000)
    thread.join()
    assert out(store, rich) == granted - 100
