"""Tenants, their keys, prices, and the revision that tells gateways of a change."""

import threading
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.conftest import new_tenant
from tests.store.databases import Databases
from tests.store.values import LONG_AGO, OCTOBER
from tests.support.prices import token_price
from tidemill.clock import from_micros, to_micros
from tidemill.errors import BadInput, Conflict, NotFound
from tidemill.ledger.money import MoneyError
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.keys import create_key, digest_of, list_keys, revoke_key
from tidemill.store.prices import current_prices, price_versions, set_price
from tidemill.store.revision import bump_revision, current_revision
from tidemill.store.tenants import Tenant, create_tenant, find_tenant, list_tenants


def revision(store: Store) -> int:
    with store.read() as connection:
        return current_revision(connection)


# Tenants


def test_a_tenant_is_found_by_name_and_by_id(store: Store, acme: Tenant) -> None:
    with store.read() as connection:
        assert find_tenant(connection, "acme") == find_tenant(connection, acme.tenant_id) == acme
        assert list_tenants(connection) == [acme]
        assert acme.created_at == LONG_AGO


def test_a_name_is_taken_once(store: Store, acme: Tenant) -> None:
    before = revision(store)
    with pytest.raises(Conflict, match="already a tenant named 'acme'"), store.write() as connection:
        new_tenant(connection, "  acme ")
    assert revision(store) == before


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "a\0b", "x" * 129, "\u200b"])
def test_an_unusable_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(BadInput, match="is not a valid tenant name"), store.write() as connection:
        new_tenant(connection, name)


def test_names_of_any_script_are_kept(store: Store) -> None:
    for name in ("潮汐磨坊", "Ünïcode ☃", "x" * 128, "'; DROP TABLE tenants; --", "100%"):
        with store.write() as connection:
            made = new_tenant(connection, name)
            assert find_tenant(connection, name) == made


@pytest.mark.parametrize("currency", ["", "usd", "EURO", "U$D"])
def test_an_unusable_currency_is_refused(store: Store, currency: str) -> None:
    with pytest.raises(MoneyError), store.write() as connection:
        create_tenant(connection, name="acme", currency=currency, now=LONG_AGO)


def test_a_typing_error_is_answered_with_the_nearest_name(store: Store, acme: Tenant) -> None:
    with store.read() as connection:
        with pytest.raises(NotFound) as near:
            find_tenant(connection, "acne")
        assert near.value.hint == "Did you mean 'acme'?"
        with pytest.raises(NotFound) as far:
            find_tenant(connection, "zzz")
        assert far.value.hint == ""


# Keys


def test_a_key_is_shown_once_and_stored_as_its_digest(databases: Databases, store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        key, secret = create_key(connection, tenant_id=acme.tenant_id, name="laptop", now=OCTOBER)
    assert secret.startswith("sk-tm-") and len(secret) > 36 and secret.isascii()
    assert key.hint == f"sk-tm-...{secret[-4:]}"
    with store.read() as connection:
        assert list_keys(connection) == list_keys(connection, acme.tenant_id) == [key]
        assert list_keys(connection, "ten_other") == []
        row = connection.exec_driver_sql("SELECT * FROM keys").first()
        assert row is not None and digest_of(secret) in tuple(row)
        assert not any(secret in str(value) or secret[6:-4] in str(value) for value in row)


def test_a_key_is_revoked_by_itself_or_by_its_id_once(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        first, secret = create_key(connection, tenant_id=acme.tenant_id, name="one", now=LONG_AGO)
        second, _ = create_key(connection, tenant_id=acme.tenant_id, name="two", now=LONG_AGO)
        before = current_revision(connection)
        assert revoke_key(connection, key=secret, now=OCTOBER).revoked_at == OCTOBER
        assert revoke_key(connection, key=second.key_id, now=OCTOBER).key_id == second.key_id
        assert current_revision(connection) == before + 2
        again = revoke_key(connection, key=first.key_id, now=OCTOBER + timedelta(days=1))
        assert again.revoked_at == OCTOBER
        assert current_revision(connection) == before + 2


def test_an_unknown_key_is_never_repeated_in_the_answer(store: Store) -> None:
    with pytest.raises(NotFound) as refused, store.write() as connection:
        revoke_key(connection, key="sk-tm-secret", now=OCTOBER)
    assert "secret" not in str(refused.value)


# Prices

FOUR = token_price(4, 1, 16)


def test_a_price_is_a_version_and_the_same_price_is_no_new_one(store: Store) -> None:
    with store.write() as connection:
        first = set_price(connection, model="m", currency="CNY", price=FOUR, now=LONG_AGO)
        at = current_revision(connection)
        assert set_price(connection, model="m", currency="CNY", price=FOUR, now=OCTOBER) == first
        assert current_revision(connection) == at
        second = set_price(connection, model="m", currency="CNY", price=token_price(5, 1, 16), now=OCTOBER)
        back = set_price(connection, model="m", currency="CNY", price=FOUR, now=OCTOBER)  # the same instant
        assert back.valid_from == OCTOBER + timedelta(microseconds=1)
        assert price_versions(connection) == [first, second, back]
        assert price_versions(connection, {second.price_id}) == [second]
        assert price_versions(connection, set()) == []
        assert current_prices(connection, OCTOBER) == {("m", "CNY"): second}
        assert current_prices(connection, OCTOBER + timedelta(seconds=1)) == {("m", "CNY"): back}
        assert current_prices(connection, LONG_AGO - timedelta(microseconds=1)) == {}


def test_prices_of_models_and_currencies_do_not_touch_each_other(store: Store) -> None:
    with store.write() as connection:
        made = {
            (model, currency): set_price(connection, model=model, currency=currency, price=FOUR, now=LONG_AGO)
            for model in ("a", "b/c:d")
            for currency in ("USD", "CNY")
        }
        set_price(connection, model="a", currency="USD", price=token_price(9, 9, 9), now=OCTOBER)
        now = current_prices(connection, OCTOBER)
    assert {key: version.price_id for key, version in now.items() if key != ("a", "USD")} == {
        key: version.price_id for key, version in made.items() if key != ("a", "USD")
    }
    assert now["a", "USD"].price == token_price(9, 9, 9)


def test_the_dearest_price_fits(store: Store) -> None:
    price = token_price(10**16, 10**16, 10**16)
    with store.write() as connection:
        set_price(connection, model="m", currency="CNY", price=price, now=LONG_AGO)
        assert current_prices(connection, OCTOBER)["m", "CNY"].price == price


# The revision


def test_two_changes_at_a_time_raise_the_revision_twice(databases: Databases, store: Store) -> None:
    with store.write() as connection:
        bump_revision(connection)
    before = revision(store)

    def change() -> None:
        mine = databases.again(store)
        for _ in range(5):
            with mine.write() as connection:
                bump_revision(connection)

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert revision(store) == before + 20


# Instants and identifiers


@given(st.integers(-(2**51), 2**53))
def test_instants_pass_through_unchanged(micros: int) -> None:
    assert to_micros(from_micros(micros)) == micros


def test_a_naive_instant_is_refused() -> None:
    with pytest.raises(ValueError, match="must be aware"):
        to_micros(OCTOBER.replace(tzinfo=None))


def test_identifiers_are_short_distinct_and_readable() -> None:
    made = {new_id("ten") for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(each) <= 32 and each.startswith("ten_") and not set(each[4:]) & set("ilou") for each in made)
