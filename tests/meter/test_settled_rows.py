"""Rows straight from the log: what the ledger's records would be in the store, to the column and to the nano."""

import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, insert, select, update

from tests.ledger.values import further
from tests.meter.test_loader import World, world
from tests.meter.values import START_US, opened
from tests.store.conftest import new_tenant
from tests.store.databases import Databases
from tests.store.values import ZONE, assert_clean, grant
from tests.support.prices import token_price
from tidemill.clock import to_micros
from tidemill.ledger.components import CATALOGUE
from tidemill.ledger.limits import Limit, LimitKind, Per
from tidemill.ledger.period import parse_period
from tidemill.ledger.pricing import Price, PriceTier
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageLabels
from tidemill.meter.loader import Loader
from tidemill.meter.records import Settled, encode_settled, settle, to_record
from tidemill.meter.settled_rows import SettledReader
from tidemill.store.accounts import account_balance
from tidemill.store.balance_leases import extend_lease
from tidemill.store.engine import Store
from tidemill.store.ids import new_ids_in_order
from tidemill.store.limits import set_limit
from tidemill.store.record_rows import RecordRow, WholeRecordRow
from tidemill.store.tables.limits import budgets
from tidemill.store.tables.money import accounts, entries, leases, transactions
from tidemill.store.tables.tenants import tenants
from tidemill.store.tables.usage import usage_records
from tidemill.store.usage import _row

__all__ = ["world"]

MIDNIGHT_US = to_micros(parse_period("2026-11", ZONE).start)
numbers = itertools.count(1)

prices = st.sampled_from(
    [
        token_price(4_000_000_000, 1_000_000_000, 16_000_000_000),
        token_price(0, 0, 0),
        Price.of(input=3 * 10**9, output=15 * 10**9, cache_write=4 * 10**9, search=2 * 10**9),
    ]
)
tokens = st.integers(0, 100_000)


@st.composite
def settled(draw: st.DrawFn, request_ids: st.SearchStrategy[str], tenants: list[str]) -> Settled:
    """A settled request of one of these tenants, in October or November."""
    request = msgspec.structs.replace(
        opened(draw(request_ids), draw(st.sampled_from(tenants)), price=draw(prices)),
        started_us=START_US,
        tier=draw(st.sampled_from(list(PriceTier))),
        counted={each: 1 for each in draw(further) if CATALOGUE[each].part_of is None},
        labels=draw(st.sampled_from([None, None, UsageLabels("reserved", "", "p", ("a", '\u00e9"b'), "r")])),
    )
    made = settle(
        request,
        TokenUsage(draw(tokens), draw(tokens), draw(tokens), draw(st.one_of(st.just({}), further))),
        status=draw(st.sampled_from(list(RequestStatus))),
        estimated=draw(st.booleans()),
        hold=draw(st.sampled_from([10**12, 1000])),
        first_token_us=draw(st.sampled_from([0, START_US + 1])),
        finished_us=draw(st.sampled_from([START_US + 5, MIDNIGHT_US - 1, MIDNIGHT_US])),
        device_ns=draw(st.integers(0, 2**62)),
    )
    return msgspec.structs.replace(made, list_amount=draw(st.sampled_from([None, None, 7])))


def test_the_rows_are_the_columns_of_the_table() -> None:
    names = tuple(column.name for column in usage_records.columns)
    assert WholeRecordRow.__struct_fields__ == names
    assert names[: len(RecordRow.__struct_fields__)] == RecordRow.__struct_fields__
    assert all(column.nullable for column in list(usage_records.columns)[len(RecordRow.__struct_fields__) :])


ids = st.integers(1, 10**9).map(lambda number: f"req_{number}")


@given(settled(ids, ["ten_1"]))
def test_a_row_is_what_the_store_would_make_of_the_record(made: Settled) -> None:
    found = SettledReader(ZONE).read([encode_settled(made)])
    assert found is not None
    (row,) = found.rows
    values = msgspec.structs.astuple(row)
    expected = _row(to_record(made), None)
    assert values == expected[: len(values)]
    assert not any(each is not None for each in expected[len(values) :])
    assert found.spent() == ([("ten_1", made.charge)] if made.charge else [])


@given(st.lists(settled(ids, ["ten_1", "ten_2"]), max_size=4), st.data())
def test_a_batch_that_is_not_ordinary_is_left_alone(batch: list[Settled], data: st.DataObject) -> None:
    payloads = [encode_settled(each) for each in batch]
    distinct = len({each.opened.request_id for each in batch}) == len(batch)
    assert (SettledReader(ZONE).read(payloads) is not None) == distinct
    odd = data.draw(st.sampled_from(["negative", "status", "format", "rubbish"]))
    one = opened("req_odd")
    made = msgspec.structs.replace(settle_one(one), charge_output=-1) if odd == "negative" else settle_one(one)
    if odd == "status":
        made = msgspec.structs.replace(made, status="unheard of")
    payload = b"\xc1" if odd == "rubbish" else encode_settled(made)
    if odd == "format":
        plain = msgspec.msgpack.decode(payload)
        payload = msgspec.msgpack.encode([99, *plain[1:]])
    assert SettledReader(ZONE).read([*payloads, payload]) is None


def settle_one(request: Any) -> Settled:
    return settle(
        request,
        TokenUsage(10, 0, 10),
        status=RequestStatus.OK,
        estimated=False,
        hold=10**12,
        first_token_us=0,
        finished_us=START_US + 1,
        device_ns=1,
    )


def test_ids_in_order_are_in_order_and_never_the_same() -> None:
    made = [*new_ids_in_order("txn", 300), *new_ids_in_order("txn", 20)]
    assert made[:300] == sorted(made[:300]) and len(set(made)) == 320
    assert max(map(len, new_ids_in_order("txn", 2))) <= 32


# The whole way, beside the store's general one


class Slow(Loader):
    """Takes each batch the general way."""

    def _store_new(self, *arguments: Any) -> None:
        return None


def books(store: Store) -> Any:
    """All that a loader writes, without the names of transactions."""
    with store.read() as connection:
        records = connection.execute(select(usage_records).order_by(usage_records.c.request_id)).all()
        posted = {
            row.transaction_id: (row.kind, row.tenant_id, row.currency, row.at, row.memo)
            for row in connection.execute(select(transactions))
            if row.kind == "usage_charge"
        }
        lines = sorted(
            (posted[row.transaction_id], row.line, row.account, row.currency, row.amount)
            for row in connection.execute(select(entries))
            if row.transaction_id in posted
        )
        return (
            [(row._replace(transaction_id=None), posted.get(row.transaction_id)) for row in map(_named, records)],
            lines,
            sorted(map(tuple, connection.execute(select(accounts)))),
            sorted(map(tuple, connection.execute(select(leases)))),
        )


class _Named(tuple[Any, ...]):
    transaction_id: str | None

    def _replace(self, **changes: Any) -> tuple[Any, ...]:
        place = usage_records.columns.keys().index("transaction_id")
        return (*self[:place], changes["transaction_id"], *self[place + 1 :])


def _named(row: Any) -> _Named:
    named = _Named(row)
    named.transaction_id = row.transaction_id
    return named


few_ids = st.integers(1, 12).map(lambda number: f"req_{number}")
lines_of_batches = st.integers(1, 3).map(lambda number: f"batch_1_{number}")


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_it_writes_what_the_general_way_writes(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever comes twice, or again, whoever has an account: two stores, two loaders, the same books."""
    names = ["ten_rich", "ten_poor", "ten_new"]
    batches = data.draw(st.lists(st.lists(settled(few_ids | lines_of_batches, names), max_size=8), max_size=4))
    found = []
    for kind in (Loader, Slow):
        store = databases.migrated()
        with store.write() as connection:
            for name in names:
                tenant = new_tenant(connection, name)
                connection.execute(_rename(tenant.tenant_id, name))
            rich = msgspec.structs.replace(tenant, tenant_id="ten_rich")  # who is granted something below
            grant(connection, "ten_poor", 10**9)
        directory = tmp_path_factory.mktemp("meter")
        world = World(databases, store, rich, directory / "meter")
        worker = world.worker()
        with store.write() as connection:
            for name in names[:2]:
                extend_lease(connection, worker_id=worker.name, tenant_id=name, need=10**8, slices=10**15)
        loader = kind(store, world.meter_dir, zone=ZONE)
        for batch in batches:
            worker.write(*batch)
            loader.drain()
        assert_clean(store)
        found.append(books(store))
        worker.die()
        store.close()
    for one, other in zip(*found, strict=True):
        assert one == other


def _rename(tenant_id: str, name: str) -> Any:
    return update(tenants).where(tenants.c.tenant_id == tenant_id).values(tenant_id=name)


# What is not as it nearly always is


def taken_at_once(store: Store) -> Iterator[list[str]]:
    """The statements that touch records."""
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "usage_records" in statement:
            seen.append(" ".join(statement.split()[:3]))

    event.listen(store.engine, "before_cursor_execute", note)
    yield seen
    event.remove(store.engine, "before_cursor_execute", note)


def test_new_records_are_stored_without_a_look_and_known_ones_after_one(world: World) -> None:
    worker = world.worker()
    worker.lease(world.tenant, 10**12 // 2)
    first, again = settle_one(world.request()), settle_one(world.request())
    worker.write(first)
    world.loader().drain()  # which opens the account of the revenue
    seen = taken_at_once(world.store)
    statements = next(seen)
    loader = world.loader()
    worker.write(again)
    loader.drain()
    assert statements == ["INSERT INTO usage_records"]
    statements.clear()
    worker.write(again, fresh := settle_one(world.request()))
    assert loader.drain().records == 1
    assert statements[0] == "INSERT INTO usage_records", "it is tried"
    assert any(each.startswith("SELECT") for each in statements)
    next(seen, None)
    assert {record.request_id for record in world.records()} == {
        each.opened.request_id for each in (first, again, fresh)
    }
    charged = sum(each.charge for each in (first, again, fresh))
    assert world.balance == 10**12 - charged
    assert world.leased() == 10**12 // 2 - charged
    assert_clean(world.store)


def test_an_account_that_is_not_open_is_opened(world: World) -> None:
    with world.store.write() as connection:
        tenant = new_tenant(connection, "never had a credit")
    worker = world.worker()
    worker.write(settle_one(opened("req_1", tenant.tenant_id)))
    world.loader().drain()
    with world.store.read() as connection:
        assert account_balance(connection, f"tenant:{tenant.tenant_id}", "CNY") < 0  # type: ignore[arg-type]
    assert_clean(world.store)


def test_only_tenants_with_a_budget_have_it_charged(world: World) -> None:
    with world.store.write() as connection:
        other = new_tenant(connection, "without")
        grant(connection, other.tenant_id, 10**12)
        wanted = Limit(
            limit_id="",
            tenant_id=world.tenant.tenant_id,
            kind=LimitKind.BUDGET,
            amount=10**12,
            per=Per.MONTH,
        )
        limit = set_limit(connection, wanted, now=to_record(settle_one(opened())).started_at)
    worker = world.worker()
    batch = [settle_one(world.request()), settle_one(opened("req_other", other.tenant_id)), settle_one(world.request())]
    worker.write(*batch)
    world.loader().drain()
    with world.store.read() as connection:
        (row,) = connection.execute(select(budgets)).all()
    assert (row.limit_id, row.spent) == (limit.limit_id, batch[0].charge + batch[2].charge)


def test_a_record_of_nobody_is_refused_as_before(world: World) -> None:
    worker = world.worker()
    worker.write(settle_one(world.request()), settle_one(opened("req_bad", "ten_nobody")))
    with pytest.raises(Exception, match="(?i)foreign key"):
        world.loader().drain()
    assert world.records() == []
    with world.store.write() as connection:
        connection.execute(insert(tenants).values(tenant_id="ten_nobody", name="n", currency="CNY", created_at=1))
    assert world.loader().drain().records == 2


def test_midnight_divides_a_batch_into_months(world: World) -> None:
    made = [
        msgspec.structs.replace(settle_one(world.request()), finished_us=at)
        for at in (MIDNIGHT_US - 1, MIDNIGHT_US, MIDNIGHT_US - 2, MIDNIGHT_US + to_us(timedelta(days=30)))
    ]
    found = SettledReader(ZONE).read([encode_settled(each) for each in made])
    assert found is not None
    assert sorted((charge.at, len(charge.rows)) for charge in found.charges) == [
        (MIDNIGHT_US - 1, 2),
        (MIDNIGHT_US, 1),
        (made[3].finished_us, 1),
    ]


def to_us(span: timedelta) -> int:
    return span // timedelta(microseconds=1)
