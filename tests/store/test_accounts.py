"""The books: balances are the sums of their entries, whatever is posted and however it fails."""

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from tests.store.conftest import new_tenant
from tests.store.databases import Databases
from tests.store.values import LONG_AGO, OCTOBER, assert_clean, balance_of, grant
from tests.support.examples import examples
from tidemill.ledger.money import MAX_NANOS, Nanos
from tidemill.ledger.posting import FUNDING_CREDIT, Discrepancy, Entry, credit_grant, tenant_account
from tidemill.store.accounts import (
    account_balance,
    balance_at,
    credits_between,
    find_transaction,
    post,
    tenant_balance,
    tenant_balances,
    verify_books,
)
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.tenants import Tenant

on_one_store = examples(0.25)


def test_a_grant_moves_both_accounts(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        assert tenant_balance(connection, acme.tenant_id) == 0
        grant(connection, acme.tenant_id, 700)
        grant(connection, acme.tenant_id, 5, at=OCTOBER + timedelta(days=1))
        assert tenant_balance(connection, acme.tenant_id, lock=True) == 705
        assert account_balance(connection, FUNDING_CREDIT, "CNY") == -705
        assert account_balance(connection, FUNDING_CREDIT, "USD") == 0
        assert tenant_balances(connection) == {acme.tenant_id: 705}
    assert_clean(store)


def test_a_transaction_is_found_as_it_was_posted(store: Store, acme: Tenant) -> None:
    memo = "für 'Kekse'; 饼干 " + "x" * 490
    posted = credit_grant(
        new_id("txn"), tenant_id=acme.tenant_id, currency="CNY", amount=Nanos(MAX_NANOS), at=OCTOBER, memo=memo
    )
    with store.write() as connection:
        post(connection, posted)
        assert find_transaction(connection, posted.transaction_id) == posted
        assert find_transaction(connection, "txn_none") is None


def test_a_transaction_is_posted_once(store: Store, acme: Tenant) -> None:
    posted = credit_grant("txn_1", tenant_id=acme.tenant_id, currency="CNY", amount=Nanos(3), at=OCTOBER)
    with store.write() as connection:
        post(connection, posted)
    with pytest.raises(Exception, match=r"(?i)unique"), store.write() as connection:
        post(connection, posted)
    assert balance_of(store, acme.tenant_id) == 3
    assert_clean(store)


def test_what_fails_half_way_moves_nothing(store: Store, acme: Tenant) -> None:
    with pytest.raises(RuntimeError), store.write() as connection:
        grant(connection, acme.tenant_id, 700)
        raise RuntimeError
    assert balance_of(store, acme.tenant_id) == 0
    with store.read() as connection:
        assert verify_books(connection) == {}


def test_grants_at_the_same_moment_are_all_kept(databases: Databases, store: Store) -> None:
    """Also the first ones ever, which open their accounts at the same moment."""
    with store.write() as connection:
        tenants = [new_tenant(connection, f"tenant {number}") for number in range(3)]

    def give(tenant: Tenant) -> None:
        mine = databases.again(store)
        for _ in range(5):
            with mine.write() as connection:
                grant(connection, tenant.tenant_id, 1)

    threads = [threading.Thread(target=give, args=(tenant,)) for tenant in tenants for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as connection:
        assert tenant_balances(connection) == {tenant.tenant_id: 10 for tenant in tenants}
        assert account_balance(connection, FUNDING_CREDIT, "CNY") == -30
    assert_clean(store)


def test_an_account_that_was_tampered_with_is_named(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        grant(connection, acme.tenant_id, 700)
        connection.execute(text("UPDATE accounts SET balance = balance + 1 WHERE account LIKE 'tenant:%'"))
        found = verify_books(connection)["CNY"]
    assert Discrepancy(tenant_account(acme.tenant_id), Nanos(701), Nanos(700)) in found
    assert any(each.account == "all:accounts" and each.kept == 1 for each in found)


def test_an_entry_that_was_lost_is_named(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        grant(connection, acme.tenant_id, 700)
        connection.execute(text("DELETE FROM entries WHERE account LIKE 'tenant:%'"))
        assert verify_books(connection)["CNY"] == (Discrepancy(tenant_account(acme.tenant_id), Nanos(700), Nanos(0)),)


amounts = st.integers(1, 10**12)
instants = st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31)).map(lambda at: at.replace(tzinfo=OCTOBER.tzinfo))
numbers: Iterator[int] = iter(range(10**9))


@on_one_store
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["USD", "CNY"]), amounts, instants), max_size=12)
)
def test_balances_are_the_sums_of_what_was_posted(store: Store, grants: list[tuple[str, str, int, datetime]]) -> None:
    with store.write() as connection:
        tenants = {
            (name, currency): new_tenant(connection, f"{name} {currency} {next(numbers)}", currency).tenant_id
            for name in "ab"
            for currency in ("USD", "CNY")
        }
        for name, currency, amount, at in grants:
            grant(connection, tenants[name, currency], amount, currency=currency, at=at)
    with store.read() as connection:
        for (name, currency), tenant_id in tenants.items():
            mine = [(amount, at) for who, code, amount, at in grants if (who, code) == (name, currency)]
            assert tenant_balance(connection, tenant_id) == sum(amount for amount, _ in mine)
            assert balance_at(connection, tenant_id, OCTOBER) == sum(amount for amount, at in mine if at < OCTOBER)
            listed = credits_between(connection, tenant_id, LONG_AGO, OCTOBER)
            expected = sorted((at, amount) for amount, at in mine if at < OCTOBER)
            assert [(each.at, each.amount_on(tenant_account(tenant_id))) for each in listed] == expected or sorted(
                (each.at, each.amount_on(tenant_account(tenant_id))) for each in listed
            ) == expected
            assert all(each.entries[0] == Entry(FUNDING_CREDIT, Nanos(-each.entries[1].amount)) for each in listed)
    assert_clean(store)
