"""Stores from before there were components: they become what they were, and go back as long as nothing is lost."""

from datetime import timedelta
from itertools import count
from typing import Any

import msgspec
import pytest
from alembic import command
from alembic.config import Config
from hypothesis import given
from sqlalchemy import text

from tests.ledger.values import PRICES, record, usages
from tests.store.conftest import new_tenant
from tests.store.databases import Databases
from tests.store.test_usage import keep, kept, of, on_one_store
from tests.store.values import LONG_AGO, OCTOBER, ZONE
from tidemill.clock import to_micros
from tidemill.ledger.components import CATALOGUE, INPUT, OUTPUT, Component
from tidemill.ledger.money import Nanos
from tidemill.ledger.period import parse_period
from tidemill.ledger.pricing import Price, PriceTier, cost_of
from tidemill.ledger.usage import TokenUsage, UsageLabels, UsageRecord
from tidemill.store import migrate as migrate_module
from tidemill.store.engine import Store
from tidemill.store.migrate import migrate
from tidemill.store.prices import price_versions, set_price
from tidemill.store.tenants import Tenant
from tidemill.store.usage import batch_charge, device_use, month_usage, records_between, usage_totals

numbers = count(1)

BEFORE = "0007"

OLD_PRICES: list[dict[str, Any]] = [
    {"price_id": "prc_old", "model": "m", "tier": "standard", "valid_from": 5, "rates": (4 * 10**9, 10**9, 16 * 10**9)},
    {"price_id": "prc_batch", "model": "m", "tier": "batch", "valid_from": 5, "rates": (2 * 10**9, 5 * 10**8, 10**16)},
    {"price_id": "prc_free", "model": "tiny", "tier": "standard", "valid_from": 9, "rates": (0, 0, 0)},
]
RECORD_COLUMNS = (
    *("request_id", "tenant_id", "key_id", "model", "replica", "prompt_tokens", "cached_tokens", "completion_tokens"),
    *("estimated", "status", "streamed", "price_id", "currency", "charge_input", "charge_cached", "charge_output"),
    *("uncollected", "hold", "started_at", "first_token_at", "finished_at", "device_ns", "transaction_id"),
)


def go_to(store: Store, revision: str, move: Any = command.upgrade) -> None:
    with store.write() as connection:
        config = Config()
        config.set_main_option("script_location", str(migrate_module._SCRIPTS))
        config.attributes["connection"] = connection
        move(config, revision)


def rows_of(store: Store, table: str, columns: tuple[str, ...], order: str) -> list[tuple[Any, ...]]:
    with store.read() as connection:
        return [
            tuple(row) for row in connection.execute(text(f"SELECT {', '.join(columns)} FROM {table} ORDER BY {order}"))
        ]


def before_components(databases: Databases) -> Store:
    """A store as the last program that knew three prices has left it, with two records."""
    store = databases.empty()
    go_to(store, BEFORE)
    with store.write() as connection:
        connection.execute(
            text(
                "INSERT INTO tenants (tenant_id, name, currency, created_at, weight) VALUES ('ten_1', 'a', 'CNY', 1, 1)"
            )
        )
        for price in OLD_PRICES:
            values = {**price, **dict(zip(("input", "cached", "output"), price["rates"], strict=True))}
            del values["rates"]
            connection.execute(
                text(
                    "INSERT INTO prices (price_id, model, currency, input, cached_input, output, valid_from, tier)"
                    " VALUES (:price_id, :model, 'CNY', :input, :cached, :output, :valid_from, :tier)"
                ),
                values,
            )
        at = to_micros(OCTOBER)
        for number, first in enumerate((at + 5, None)):
            row = (
                *(f"req_{number}", "ten_1", "key_1", "m", "m/0", 1000, 200, 300, bool(number), "ok", True, "prc_old"),
                *("CNY", 3_200_000, 200_000, 4_800_000, number, 10**12, at, first, at + 1000, 7, None),
            )
            names = ", ".join(f":{name}" for name in RECORD_COLUMNS)
            connection.execute(
                text(f"INSERT INTO usage_records ({', '.join(RECORD_COLUMNS)}) VALUES ({names})"),
                dict(zip(RECORD_COLUMNS, row, strict=True)),
            )
    return store


OLD_TABLES = (
    ("prices", ("price_id", "model", "currency", "input", "cached_input", "output", "valid_from", "tier"), "price_id"),
    ("usage_records", RECORD_COLUMNS, "request_id"),
)


def test_an_older_store_is_what_it_was_and_goes_back_to_what_it_was(databases: Databases) -> None:
    store = before_components(databases)
    before = [rows_of(store, *table) for table in OLD_TABLES]
    migrate(store)
    with store.read() as connection:
        versions = {version.price_id: version for version in price_versions(connection)}
        records = list(records_between(connection, tenant_id=None, start=None, end=None))
        ((_, totals),) = usage_totals(connection, tenant_id="ten_1")
    assert {name: tuple(version.price.rates.values()) for name, version in versions.items()} == {
        str(price["price_id"]): price["rates"] for price in OLD_PRICES
    }
    assert versions["prc_batch"].tier is PriceTier.BATCH
    assert [each.charge for each in records] == [8_200_000, 8_200_000]
    assert records[0].usage == TokenUsage(1000, 200, 300)
    assert (records[0].labels, records[0].list_amount, totals.charge, totals.more) == (None, None, 16_400_000, {})
    go_to(store, BEFORE, command.downgrade)
    assert [rows_of(store, *table) for table in OLD_TABLES] == before
    migrate(store)
    with store.read() as connection:
        assert {version.price_id: version for version in price_versions(connection)} == versions
        assert list(records_between(connection, tenant_id=None, start=None, end=None)) == records


def test_an_older_price_that_is_asked_again_makes_no_new_version(databases: Databases) -> None:
    store = before_components(databases)
    migrate(store)
    with store.write() as connection:
        price = Price.of(input=4 * 10**9, cached_input=10**9, output=16 * 10**9)
        assert set_price(connection, model="m", currency="CNY", price=price, now=OCTOBER).price_id == "prc_old"
        dearer = Price.of(input=4 * 10**9, cached_input=10**9, output=16 * 10**9, cache_write=5 * 10**9)
        assert set_price(connection, model="m", currency="CNY", price=dearer, now=OCTOBER).price_id != "prc_old"
        assert len(price_versions(connection)) == 4


@pytest.mark.parametrize("what", ["price", "record", "labels"])
def test_going_back_is_refused_where_something_would_be_lost(databases: Databases, what: str) -> None:
    store = before_components(databases)
    migrate(store)
    with store.write() as connection:
        if what == "price":
            set_price(connection, model="m", currency="CNY", price=Price.of(search=1), now=OCTOBER)
    usage = TokenUsage(100, 20, 30, {Component.CACHE_WRITE: 5} if what == "record" else {})
    one = record("req_9", tenant_id="ten_1", at=OCTOBER, usage=usage)
    if what != "price":
        keep(store, msgspec.structs.replace(one, labels=UsageLabels(project="p") if what == "labels" else None))
    lost = "1 price versions and 0" if what == "price" else "0 price versions and 1"
    with pytest.raises(RuntimeError, match=f"cannot go back to schema 0007.*{lost} usage records have others"):
        go_to(store, BEFORE, command.downgrade)
    with store.read() as connection:
        assert len(price_versions(connection)) == (4 if what == "price" else 3)  # nothing has changed


def test_a_new_store_goes_back_and_forth(databases: Databases) -> None:
    store = databases.migrated()
    go_to(store, BEFORE, command.downgrade)
    assert rows_of(store, *OLD_TABLES[0]) == []
    migrate(store)
    with store.write() as connection:
        set_price(connection, model="m", currency="CNY", price=Price.of(input=1), now=OCTOBER)


# What records say of components, and how the database adds it up


@on_one_store
@given(usages)
def test_a_record_with_components_comes_back_as_it_was(store: Store, usage: TokenUsage) -> None:
    with store.write() as connection:
        tenant = new_tenant(connection, f"tenant {next(numbers)}")
    labels = UsageLabels("reserved", "thinking", "search engine", ("team a", "b"), "rul_1")
    made = [
        msgspec.structs.replace(
            of(tenant, price=price, usage=usage, at=OCTOBER + timedelta(seconds=number)),
            labels=labels if number else None,
            list_amount=Nanos(number) if number else None,
        )
        for number, price in enumerate(PRICES.values())
    ]
    keep(store, *made)
    assert kept(store, tenant_id=tenant.tenant_id) == made


def test_sums_are_exact_beyond_what_a_double_holds(store: Store, acme: Tenant) -> None:
    price = PRICES["prc_rank"]
    made = [
        msgspec.structs.replace(
            of(acme, price=price, usage=TokenUsage(0, 0, 0, {Component.SEARCH: 1})),
            charges={Component.SEARCH: Nanos(2**60 + number)},
        )
        for number in range(3)
    ]
    keep(store, *made)
    period = parse_period("2026-10", ZONE)
    with store.read() as connection:
        (line,) = month_usage(connection, tenant_id=acme.tenant_id, currency="CNY", period=period).sums
        ((_, totals),) = usage_totals(connection, tenant_id=acme.tenant_id)
    assert line.amount == totals.charge == totals.more[Component.SEARCH].charge == 3 * 2**60 + 3


def test_what_a_model_cost_counts_each_token_once(store: Store, acme: Tenant) -> None:
    usage = TokenUsage(
        1000, 200, 300, {Component.CACHE_WRITE: 100, Component.REASONING_OUTPUT: 50, Component.REQUEST: 1}
    )
    keep(store, of(acme, price=PRICES["prc_cache"], usage=usage), of(acme, price=PRICES["prc_cache"]))
    with store.read() as connection:
        (used,) = device_use(connection, start=LONG_AGO, end=OCTOBER + timedelta(days=1))
    assert used.quantities == {
        INPUT: 1500,
        Component.CACHED_INPUT: 400,
        Component.CACHE_WRITE: 100,
        OUTPUT: 550,
        Component.REASONING_OUTPUT: 50,
        Component.REQUEST: 1,
    }
    assert sum(used.quantities[each] for each in used.quantities if CATALOGUE[each].unit == "tokens") == 2600
    assert cost_of(used.quantities, Price.of(input=10**6, output=2 * 10**6)) == 2000 + 1200


def test_what_a_batch_has_cost_has_all_components_in_it(store: Store, acme: Tenant) -> None:
    usage = TokenUsage(10, 0, 0, {Component.SEARCH: 3})
    lines: list[UsageRecord] = [
        record(f"batch_1_{number}", tenant_id=acme.tenant_id, price=PRICES["prc_rank"], usage=usage, at=OCTOBER)
        for number in range(2)
    ]
    keep(store, *lines)
    with store.read() as connection:
        assert batch_charge(connection, "batch_1") == 2 * 6_000_000
