"""Usage records: stored once, with their charge, and added up by the database as the ledger adds them up."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from tests.ledger.values import PRICES, UNCAPPED, record, usages
from tests.store.conftest import new_tenant
from tests.store.values import LONG_AGO, OCTOBER, ZONE, assert_clean, balance_of, grant
from tests.support.examples import examples
from tests.support.prices import token_price
from tidemill.ledger.components import MAX_PRICE, MAX_TOKENS
from tidemill.ledger.invoice import LineSum, MonthUsage, sum_month
from tidemill.ledger.money import MAX_NANOS, Nanos
from tidemill.ledger.period import parse_period, period_of
from tidemill.ledger.posting import REVENUE_USAGE, TransactionKind
from tidemill.ledger.pricing import PriceVersion
from tidemill.ledger.statement import usage_statement
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord
from tidemill.store.accounts import account_balance, find_transaction
from tidemill.store.engine import Store
from tidemill.store.tables.money import transactions
from tidemill.store.tables.usage import usage_records
from tidemill.store.tenants import Tenant
from tidemill.store.usage import (
    device_use,
    known_requests,
    month_usage,
    records_between,
    store_records,
    usage_totals,
)

ids = count(1)
on_one_store = examples(0.25)


def of(tenant: Tenant, **values: Any) -> UsageRecord:
    return record(f"req_{next(ids):08}", tenant_id=tenant.tenant_id, **{"at": OCTOBER, **values})


def keep(store: Store, *records: UsageRecord) -> list[UsageRecord]:
    with store.write() as connection:
        return store_records(connection, records, zone=ZONE)


def kept(store: Store, **asked: Any) -> list[UsageRecord]:
    with store.read() as connection:
        return list(records_between(connection, **{"tenant_id": None, "start": None, "end": None, **asked}))


def test_a_record_comes_back_as_it_was_and_is_charged(store: Store, acme: Tenant) -> None:
    made = of(acme, usage=TokenUsage(1000, 200, 300), device_ns=10**15)
    with store.write() as connection:
        grant(connection, acme.tenant_id, 10**9)
    assert keep(store, made) == [made]
    assert kept(store) == [made]
    assert balance_of(store, acme.tenant_id) == 10**9 - made.charge
    assert made.charge > 0
    with store.read() as connection:
        assert account_balance(connection, REVENUE_USAGE, "CNY") == made.charge
        name = connection.execute(select(usage_records.c.transaction_id)).scalar_one()
        transaction = find_transaction(connection, name)
    assert transaction is not None and transaction.kind is TransactionKind.USAGE_CHARGE
    assert transaction.at == made.finished_at
    assert_clean(store)


def test_a_record_counts_once_however_often_it_comes(store: Store, acme: Tenant) -> None:
    first, second, third = of(acme), of(acme), of(acme)
    assert keep(store, first, second, first) == [first, second]
    assert keep(store, second, third) == [third]
    assert keep(store, first, second, third) == []
    assert keep(store) == []
    assert len(kept(store)) == 3
    assert balance_of(store, acme.tenant_id) == -(first.charge + second.charge + third.charge)
    assert_clean(store)


def test_the_first_word_on_a_request_stands(store: Store, acme: Tenant) -> None:
    """What recovery says of a request that was settled after all does not change it."""
    settled = of(acme, usage=TokenUsage(10, 0, 10))
    keep(store, settled)
    guessed = record(settled.request_id, tenant_id=acme.tenant_id, usage=TokenUsage(10, 0, 3), at=OCTOBER)
    assert keep(store, guessed) == []
    assert kept(store) == [settled]


def test_free_records_are_kept_without_a_transaction(store: Store, acme: Tenant) -> None:
    keep(store, of(acme, price=PRICES["prc_free"]), of(acme, usage=TokenUsage(), status=RequestStatus.ENGINE_ERROR))
    assert len(kept(store)) == 2
    with store.read() as connection:
        assert connection.execute(select(transactions)).first() is None
        assert connection.execute(select(usage_records.c.transaction_id)).scalars().all() == [None, None]


def test_the_largest_figures_fit(store: Store, acme: Tenant) -> None:
    """On both databases, to the nano: the price and the token counts at the limits of the ledger."""
    dear = PriceVersion("prc_dear", "m", "CNY", token_price(MAX_PRICE, MAX_PRICE, MAX_PRICE), LONG_AGO)
    made = of(acme, price=dear, usage=TokenUsage(MAX_TOKENS, 0, MAX_TOKENS), device_ns=MAX_NANOS)
    keep(store, made)
    assert kept(store) == [made]
    assert made.charge > 2**62
    assert balance_of(store, acme.tenant_id) == -made.charge
    with store.read() as connection:
        ((_, totals),) = usage_totals(connection, tenant_id=acme.tenant_id)
    assert totals.charge == made.charge


def test_a_batch_of_several_tenants_and_months_is_one_transaction_for_each(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        other = new_tenant(connection, "other")
    midnight = parse_period("2026-11", ZONE).start
    last, first = midnight - timedelta(microseconds=1), midnight
    batch = [of(acme, at=last), of(acme, at=first), of(other, at=last), of(acme, at=last)]
    keep(store, *batch)
    with store.read() as connection:
        rows = connection.execute(select(transactions)).all()
        assert sorted((row.tenant_id, period_of_micros(row.at)) for row in rows) == sorted(
            [(acme.tenant_id, "2026-10"), (acme.tenant_id, "2026-11"), (other.tenant_id, "2026-10")]
        )
        october = month_usage(
            connection, tenant_id=acme.tenant_id, currency="CNY", period=parse_period("2026-10", ZONE)
        )
        november = month_usage(
            connection, tenant_id=acme.tenant_id, currency="CNY", period=parse_period("2026-11", ZONE)
        )
    assert (october.requests, november.requests) == (2, 1)
    assert_clean(store)


def period_of_micros(micros: int) -> str:
    from tidemill.clock import from_micros

    return period_of(from_micros(micros), ZONE).month


def test_a_record_of_nobody_is_refused_and_takes_nothing_with_it(store: Store, acme: Tenant) -> None:
    good = of(acme)
    with pytest.raises(Exception, match="(?i)foreign key"):
        keep(store, good, record("req_nobody", tenant_id="ten_nobody", at=OCTOBER))
    assert kept(store) == []
    assert balance_of(store, acme.tenant_id) == 0
    assert keep(store, good) == [good]


def test_known_requests_are_found_among_thousands(store: Store, acme: Tenant) -> None:
    batch = [of(acme) for _ in range(1200)]
    keep(store, *batch)
    with store.read() as connection:
        asked = [each.request_id for each in batch] + ["req_unknown"]
        assert known_requests(connection, asked) == set(asked[:-1])
        assert known_requests(connection, []) == set()


def test_pages_go_on_where_the_page_before_ended(store: Store, acme: Tenant) -> None:
    batch = [of(acme, at=OCTOBER + timedelta(seconds=number // 3)) for number in range(10)]
    keep(store, *reversed(batch))
    pages, after = [], None
    while page := kept(store, after=after, limit=4):
        pages.append(page)
        after = (page[-1].finished_at, page[-1].request_id)
    assert [len(page) for page in pages] == [4, 4, 2]
    assert [each for page in pages for each in page] == batch


def test_records_are_asked_for_by_tenant_time_and_model(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        other = new_tenant(connection, "other")
    mine = of(acme, at=OCTOBER)
    late = of(acme, at=OCTOBER + timedelta(hours=1), price=PRICES["prc_big"])
    theirs = of(other, at=OCTOBER)
    keep(store, mine, late, theirs)
    assert kept(store, tenant_id=acme.tenant_id) == [mine, late]
    assert kept(store, start=late.finished_at) == [late]
    assert kept(store, end=late.finished_at) == sorted([mine, theirs], key=lambda each: each.request_id)
    assert kept(store, model="deepseek-r1") == [late]
    with store.read() as connection:
        uses = device_use(connection, start=OCTOBER, end=OCTOBER + timedelta(hours=1))
    assert {(use.tenant_id, use.charge, use.device_ns) for use in uses} == {
        (acme.tenant_id, mine.charge, mine.device_ns),
        (other.tenant_id, theirs.charge, theirs.device_ns),
    }


def test_a_fallback_earns_for_the_model_that_was_asked_for_and_costs_the_one_that_served(
    store: Store, acme: Tenant
) -> None:
    own = of(acme)
    own = msgspec.structs.replace(own, replica=f"{own.model}/0#life")
    lent = msgspec.structs.replace(of(acme), replica="org/spare/1")
    keep(store, own, lent)
    with store.read() as connection:
        uses = device_use(connection, start=OCTOBER, end=OCTOBER + timedelta(hours=1))
    assert sorted((use.model, use.charge, use.device_ns) for use in uses) == [
        ("org/spare", 0, lent.device_ns),
        (own.model, own.charge + lent.charge, own.device_ns),
    ]


# Around Shanghai's midnights of 1 October and 1 November 2026.
finishes = st.datetimes(datetime(2026, 9, 30, 15), datetime(2026, 10, 31, 17)).map(lambda at: at.replace(tzinfo=UTC))
edges = st.sampled_from([parse_period("2026-10", ZONE).start, parse_period("2026-10", ZONE).end]).flatmap(
    lambda edge: st.integers(-2, 2).map(lambda micros: edge + timedelta(microseconds=micros))
)
asked = st.lists(
    st.tuples(
        st.sampled_from(sorted(PRICES)),
        usages,
        st.just(UNCAPPED) | st.integers(0, 10**9).map(Nanos),
        finishes | edges,
        st.sampled_from(list(RequestStatus)),
        st.booleans(),
    ),
    max_size=15,
)


@on_one_store
@given(asked)
def test_the_database_adds_up_as_the_ledger_does(store: Store, asked: list[Any]) -> None:
    with store.write() as connection:
        tenant = new_tenant(connection, f"tenant {next(ids)}")
        other = new_tenant(connection, f"tenant {next(ids)}")
    everything = [
        of(tenant if mine else other, price=PRICES[price], usage=usage, cap=cap, at=at, status=status)
        for price, usage, cap, at, status, mine in asked
    ]
    keep(store, *everything)
    for each in (tenant, other):
        records = [one for one in everything if one.tenant_id == each.tenant_id]
        assert balance_of(store, each.tenant_id) == -sum(one.charge for one in records)
        with store.read() as connection:
            found = dict(usage_totals(connection, tenant_id=each.tenant_id))
        assert found == usage_statement(records, tenant_id=each.tenant_id, currency="CNY").by_model
        for month in ("2026-09", "2026-10", "2026-11"):
            period = parse_period(month, ZONE)
            own = [one for one in records if one.finished_at in period]
            assert {
                one.request_id for one in kept(store, tenant_id=each.tenant_id, start=period.start, end=period.end)
            } == {one.request_id for one in own}
            with store.read() as connection:
                by_database = month_usage(connection, tenant_id=each.tenant_id, currency="CNY", period=period)
            by_ledger = sum_month(own, tenant_id=each.tenant_id, currency="CNY", period=period)
            assert sorted_sums(by_database) == sorted_sums(by_ledger)
            assert (by_database.requests, by_database.uncollected) == (by_ledger.requests, by_ledger.uncollected)
    assert_clean(store)


def sorted_sums(month: MonthUsage) -> list[LineSum]:
    return sorted(month.sums, key=lambda row: (row.model, row.price_id, row.component))
