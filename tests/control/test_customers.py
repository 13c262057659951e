"""Tenants, keys and credits."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.conftest import Api
from tests.control.world import FakePlatform, record
from tests.support.examples import examples
from tidemill.ledger.money import format_amount, parse_amount
from tidemill.store.accounts import verify_books
from tidemill.store.keys import digest_of
from tidemill.store.tables.tenants import keys as keys_table

in_a_world = examples(0.4)
NAMES = ["acme", "华东/智算中心", "a b&c=d?e#f%2F", "[red]", "ünï", "../etc", "x" * 128]


def balance(api: Api, tenant: str) -> str:
    [found] = api.get("/tenants", tenant=tenant)["tenants"]
    return str(found["balance"])


@pytest.mark.parametrize("name", NAMES)
def test_a_tenant_of_any_name_can_be_used_everywhere(api: Api, platform: FakePlatform, name: str) -> None:
    made = api.post("/tenants", name=f"  {name} ")
    assert made["name"] == name
    assert made["currency"] == "USD" and made["balance"] == "0.00" and made["warning"] is None
    assert platform.announced == platform.revision() > 0
    key = api.post("/keys", tenant=name)
    api.post("/credits", tenant=name, amount="1.5")
    assert [each["id"] for each in api.get("/keys", tenant=name)["keys"]] == [key["id"]]
    assert api.get("/usage", tenant=name)["tenant"] == name
    assert api.get("/invoices", tenant=name, month="2026-10")["tenant"] == {"id": made["id"], "name": name}
    assert balance(api, name) == balance(api, made["id"]) == "1.50"


def test_a_name_is_taken_once(api: Api) -> None:
    api.post("/tenants", name="acme")
    error = api.refused(409, "POST", "/tenants", json={"name": "acme"})
    assert error["code"] == "conflict" and error["param"] == "name"


def test_a_currency_without_prices_is_warned_of(api: Api) -> None:
    assert api.post("/tenants", name="a", currency="CNY")["warning"] is None
    assert "prices.MODEL.EUR" in api.post("/tenants", name="b", currency="EUR")["warning"]


def test_an_unknown_tenant_is_named_with_the_nearest(api: Api) -> None:
    api.post("/tenants", name="acme")
    for method, path, request in (
        ("GET", "/tenants", {"params": {"tenant": "acmee"}}),
        ("GET", "/usage", {"params": {"tenant": "acmee"}}),
        ("GET", "/keys", {"params": {"tenant": "acmee"}}),
        ("GET", "/invoices", {"params": {"tenant": "acmee", "month": "2026-10"}}),
        ("POST", "/keys", {"json": {"tenant": "acmee"}}),
        ("POST", "/credits", {"json": {"tenant": "acmee", "amount": "1"}}),
    ):
        error = api.refused(404, method, path, **request)
        assert error["param"] == "tenant" and error["hint"] == "Did you mean 'acme'?"


def test_the_balance_is_that_after_all_settled_usage(api: Api, platform: FakePlatform) -> None:
    tenant = api.post("/tenants", name="acme")["id"]
    assert api.post("/credits", tenant="acme", amount="10")["balance"] == "10.00"
    platform.settled.append(record(platform, "req_1", tenant))
    charge = platform.settled[0].charge
    assert balance(api, "acme") == format_amount(parse_amount("10") - charge)
    platform.settled.append(record(platform, "req_2", tenant))
    assert api.post("/credits", tenant="acme", amount="1")["balance"] == format_amount(parse_amount("11") - 2 * charge)


def test_a_key_is_shown_once_and_works_until_revoked(api: Api, platform: FakePlatform) -> None:
    api.post("/tenants", name="acme")
    made = api.post("/keys", tenant="acme", name="laptop")
    assert made["key"].startswith("sk-") and platform.announced == platform.revision()
    with platform.store.read() as connection:
        assert connection.execute(keys_table.select()).one().digest == digest_of(made["key"])
    listed = api.get("/keys")
    assert made["key"] not in str(listed)
    assert listed["keys"][0]["revoked_at"] is None and listed["keys"][0]["tenant"] == "acme"
    revoked = api.post("/keys/revoke", key=made["key"])
    assert revoked["id"] == made["id"] and revoked["revoked_at"]
    assert platform.announced == platform.revision()
    assert api.post("/keys/revoke", key=made["id"]) == revoked, "a second time changes nothing"
    assert api.get("/keys")["keys"] == [revoked]


def test_a_wrong_key_is_not_repeated(api: Api) -> None:
    error = api.refused(404, "POST", "/keys/revoke", json={"key": "sk-tm-secret"})
    assert "sk-tm-secret" not in str(error)


@pytest.mark.parametrize("amount", [100, 1.5, True, None, ["1"], {"units": 1}])
def test_an_amount_is_a_string(api: Api, amount: Any) -> None:
    api.post("/tenants", name="acme")
    error = api.refused(400, "POST", "/credits", json={"tenant": "acme", "amount": amount})
    assert error["param"] == "amount" and '"amount": "100"' in error["hint"]
    assert balance(api, "acme") == "0.00"


@pytest.mark.parametrize("amount", ["", "0", "-5", "1e3", "1,000", "0.0000000001", "NaN", "9223372037", "１"])
def test_an_amount_is_a_plain_positive_decimal(api: Api, amount: str) -> None:
    api.post("/tenants", name="acme")
    assert api.refused(400, "POST", "/credits", json={"tenant": "acme", "amount": amount})["param"] == "amount"
    assert balance(api, "acme") == "0.00"


def test_no_balance_outgrows_the_database(api: Api, platform: FakePlatform) -> None:
    for name in ("acme", "other"):
        api.post("/tenants", name=name)
    api.post("/credits", tenant="acme", amount="9223372036.854775807")
    for name in ("acme", "other"):
        error = api.refused(400, "POST", "/credits", json={"tenant": name, "amount": "0.000000001"})
        assert error["param"] == "amount"
    assert balance(api, "acme") == "9223372036.854775807"
    with platform.store.read() as connection:
        assert verify_books(connection) == {"USD": ()}


def test_a_memo_is_one_printable_line(api: Api) -> None:
    api.post("/tenants", name="acme")
    for memo in ("a\nb", "x" * 513):
        body = {"tenant": "acme", "amount": "1", "memo": memo}
        assert api.refused(400, "POST", "/credits", json=body)["param"] == "memo"
    assert api.post("/credits", tenant="acme", amount="1", memo=" 充值 ")["memo"] == "充值"


def test_a_grant_is_made_once_for_an_idempotency_key(api: Api) -> None:
    for name in ("acme", "other"):
        api.post("/tenants", name=name)
    first = api.post("/credits", tenant="acme", amount="100", memo="one", idempotency_key="order 17")
    again = api.post("/credits", tenant="acme", amount="100.00", memo="two", idempotency_key="order 17")
    assert not first["replayed"] and again == {**first, "replayed": True}
    error = api.refused(
        409, "POST", "/credits", json={"tenant": "acme", "amount": "101", "idempotency_key": "order 17"}
    )
    assert error["param"] == "idempotency_key" and "100.00 USD" in error["message"]
    assert not api.post("/credits", tenant="other", amount="1", idempotency_key="order 17")["replayed"]
    assert (balance(api, "acme"), balance(api, "other")) == ("100.00", "1.00")
    for key in ("", " ", "x" * 256, "a\tb"):
        body = {"tenant": "acme", "amount": "1", "idempotency_key": key}
        assert api.refused(400, "POST", "/credits", json=body)["param"] == "idempotency_key"


grants = st.lists(st.tuples(st.integers(1, 10**12), st.none() | st.sampled_from(["a", "b", "c"])), max_size=8)


@in_a_world
@given(grants)
def test_the_books_hold_whatever_is_granted(
    api: Api, platform: FakePlatform, asked: list[tuple[int, str | None]]
) -> None:
    name = f"tenant {datetime.now(UTC).timestamp()}"
    api.post("/tenants", name=name)
    expected, seen = 0, dict[str, int]()
    for nanos, key in asked:
        body = {"tenant": name, "amount": format_amount(nanos), "idempotency_key": key}
        answer = api.client.post("/api/v1/credits", json=body)
        if key is not None and seen.setdefault(key, nanos) != nanos:
            assert answer.status_code == 409
        elif answer.json()["replayed"]:
            assert key in seen
        else:
            expected += nanos
    repeats = [n for n, k in asked if k is not None]
    assert balance(api, name) == format_amount(expected)
    assert expected == sum(seen.values()) + sum(n for n, k in asked if k is None), repeats
    with platform.store.read() as connection:
        assert verify_books(connection).get("USD", ()) == ()
