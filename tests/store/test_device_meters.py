"""Meters in the store: charged once, never below zero, in the ledger and on the invoice to the nano."""

import contextlib
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from tests.store.conftest import new_tenant
from tests.store.values import LONG_AGO, OCTOBER, ZONE, assert_clean, balance_of, grant
from tests.support.examples import examples
from tidemill.ledger.devices import DeviceMeter, DeviceTier, charge_for, hold_for
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.period import parse_period
from tidemill.store.accounts import tenant_balance
from tidemill.store.balance_leases import extend_lease, leased, return_lease
from tidemill.store.device_meters import (
    InsufficientBalance,
    MeterReading,
    MeterStart,
    begin_meters,
    device_sums,
    meter_rows,
    read_meters,
    to_be_read,
    verify_meters,
)
from tidemill.store.device_prices import agreed_price, current_device_prices, device_price_versions, set_device_price
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.tables.usage import device_usage
from tidemill.store.tenants import Tenant
from tidemill.store.usage import month_usage

HOUR = parse_amount("3.6")


def price_of(store: Store, hour: int = HOUR, tier: DeviceTier = DeviceTier.PREEMPTIBLE) -> MeterStart:
    with store.write() as connection:
        price = set_device_price(connection, kind="h800", currency="CNY", tier=tier, hour=Nanos(hour), now=LONG_AGO)
    return MeterStart(price=price, tier=tier, devices=2, hold_s=100.0, job_id="job_1", attempt=1)


def begin(store: Store, acme: Tenant, wish: MeterStart, at: datetime = OCTOBER) -> DeviceMeter:
    with store.write() as connection:
        (meter,) = begin_meters(connection, tenant_id=acme.tenant_id, currency="CNY", starts=[wish], now=at)
    return meter


def read_at(store: Store, acme: Tenant, meter: DeviceMeter, seconds: float, *, final: bool = False) -> bool:
    until = meter.started_at + timedelta(seconds=seconds)
    wish = MeterReading(meter_id=meter.meter_id, until=until, hold_s=100.0, final=final)
    with store.write() as connection:
        return read_meters(connection, acme.tenant_id, [wish], zone=ZONE).get(meter.meter_id, True)


def assert_right(store: Store) -> None:
    assert_clean(store)
    with store.read() as connection:
        assert verify_meters(connection) == []


def test_a_meter_from_its_beginning_to_its_end(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        grant(connection, acme.tenant_id, parse_amount("10"))
    meter = begin(store, acme, price_of(store))
    with store.read() as connection:
        assert leased(connection, acme.tenant_id) == meter.hold == hold_for(HOUR, 2, 100)
    assert read_at(store, acme, meter, 1000)
    assert balance_of(store, acme.tenant_id) == parse_amount("8")
    assert read_at(store, acme, meter, 1000)  # again: nothing
    assert read_at(store, acme, meter, 1500, final=True)
    assert read_at(store, acme, meter, 9999, final=True)  # it has ended
    assert balance_of(store, acme.tenant_id) == parse_amount("7")
    with store.read() as connection:
        assert leased(connection, acme.tenant_id) == 0
        (row,) = meter_rows(connection, tenant_id=acme.tenant_id)
        assert (row.device_us, row.amount, row.meter.job_id) == (3_000_000_000, parse_amount("3"), "job_1")
    assert_right(store)


def test_what_a_meter_holds_no_gateway_can_lease(store: Store, acme: Tenant) -> None:
    wish = price_of(store)
    hold = hold_for(HOUR, 2, 100)
    with store.write() as connection:
        grant(connection, acme.tenant_id, hold + 7)
    begin(store, acme, wish)
    with store.write() as connection:
        assert extend_lease(connection, worker_id="w", tenant_id=acme.tenant_id, need=10**12, slices=8) == 7
    with pytest.raises(
        InsufficientBalance, match="Insufficient balance: .* must be available to start, but only 0.00 is"
    ):
        begin(store, acme, wish)


def test_a_meter_that_cannot_be_covered_says_so_in_time(store: Store, acme: Tenant) -> None:
    """Its hold pays for what it needs to end; the balance is never below zero, and nothing is lost."""
    with store.write() as connection:
        grant(connection, acme.tenant_id, hold_for(HOUR, 2, 100) + charge_for(HOUR, 2 * 30 * 1_000_000))
    meter = begin(store, acme, price_of(store))
    assert read_at(store, acme, meter, 30)
    assert not read_at(store, acme, meter, 40)
    assert read_at(store, acme, meter, 130, final=True)
    assert 0 <= balance_of(store, acme.tenant_id) <= 2
    with store.read() as connection:
        assert meter_rows(connection, tenant_id=acme.tenant_id)[0].uncollected == 0
    assert_right(store)


def test_what_goes_beyond_hold_and_balance_is_the_operators_loss(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        grant(connection, acme.tenant_id, hold_for(HOUR, 2, 100))
    meter = begin(store, acme, price_of(store))
    assert read_at(store, acme, meter, 1000, final=True)
    assert balance_of(store, acme.tenant_id) == 0
    with store.read() as connection:
        assert meter_rows(connection, tenant_id=acme.tenant_id)[0].uncollected > 0
    assert_right(store)


def test_months_and_their_invoice(store: Store, acme: Tenant) -> None:
    october, november = parse_period("2026-10", ZONE), parse_period("2026-11", ZONE)
    with store.write() as connection:
        grant(connection, acme.tenant_id, parse_amount("100"))
    meter = begin(store, acme, price_of(store), october.end - timedelta(seconds=500))
    read_at(store, acme, meter, 900, final=True)
    with store.read() as connection:
        sums = {
            period.month: month_usage(connection, tenant_id=acme.tenant_id, currency="CNY", period=period).devices
            for period in (october, november)
        }
        whole = device_sums(connection, tenant_id=acme.tenant_id)
    assert [row.amount for row in sums["2026-10"]] == [parse_amount("1")]
    assert [row.amount for row in sums["2026-11"]] == [parse_amount("0.8")]
    assert [(row.amount, row.meters) for row in whole] == [(parse_amount("1.8"), 1)]
    assert_right(store)


@examples(0.3)
@given(
    balance=st.integers(0, 10**10),
    hour=st.integers(1, 10**12),
    steps=st.lists(st.tuples(st.integers(0, 10**9), st.booleans()), max_size=8),
)
def test_books_are_right_whatever_is_read_when(
    store: Store, acme: Tenant, balance: int, hour: int, steps: list[tuple[int, bool]]
) -> None:
    before = balance_of(store, acme.tenant_id)
    if balance:
        with store.write() as connection:
            grant(connection, acme.tenant_id, balance)
    try:
        meter = begin(store, acme, price_of(store, hour))
    except InsufficientBalance:
        return
    at = 0
    for step, final in steps:
        at += step
        read_at(store, acme, meter, at / 1e6, final=final)
        with store.read() as connection:
            promised = leased(connection, acme.tenant_id)
        assert 0 <= promised <= balance_of(store, acme.tenant_id) <= before + balance
    read_at(store, acme, meter, at / 1e6, final=True)
    assert_right(store)


def test_a_month_may_still_be_charged_until_its_meters_were_read(store: Store, acme: Tenant) -> None:
    october = parse_period("2026-10", ZONE)

    def open_still() -> bool:
        with store.read() as connection:
            return to_be_read(connection, tenant_id=acme.tenant_id, before=october.end)

    with store.write() as connection:
        grant(connection, acme.tenant_id, parse_amount("100"))
    assert not open_still()
    meter = begin(store, acme, price_of(store), october.end - timedelta(seconds=500))
    read_at(store, acme, meter, 499.9)
    assert open_still()
    read_at(store, acme, meter, 500)
    assert not open_still()
    later = begin(store, acme, price_of(store), october.end - timedelta(seconds=1))
    assert open_still()
    read_at(store, acme, later, 0.5, final=True)
    assert not open_still()


STEPS = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 3), st.integers(0, 10**12), st.integers(0, 10**9)),
    st.tuples(st.just("read"), st.integers(0, 5), st.integers(-(10**9), 10**11), st.booleans()),
    st.tuples(st.just("lease"), st.integers(0, 1), st.integers(0, 10**10), st.just(0)),
    st.tuples(st.just("return"), st.integers(0, 1), st.integers(0, 10**10), st.just(0)),
    st.tuples(st.just("grant"), st.integers(0, 10**11), st.just(0), st.just(0)),
)


@examples(0.4)
@given(steps=st.lists(STEPS, max_size=25))
def test_meters_and_gateways_never_promise_more_than_there_is(
    store: Store, steps: list[tuple[str, int, int, int]]
) -> None:
    """Against a model: many meters over the end of a month, clocks that go back, and gateways that lease."""
    with store.write() as connection:
        tenant = new_tenant(connection, new_id("name"))
    start = parse_period("2026-10", ZONE).end - timedelta(seconds=1000)
    granted, running = 0, {}
    billed: dict[str, int] = {}
    every: dict[str, DeviceMeter] = {}
    for what, first, second, third in steps:
        if what == "grant" and first:
            granted += first
            with store.write() as connection:
                grant(connection, tenant.tenant_id, first)
        elif what == "begin":
            wish = msgspec.structs.replace(price_of(store, second), devices=first)
            with contextlib.suppress(InsufficientBalance):
                meter = begin(store, tenant, wish, start + timedelta(microseconds=third))
                running[meter.meter_id] = every[meter.meter_id] = meter
                billed[meter.meter_id] = 0
        elif what == "read" and running:
            meter = list(running.values())[first % len(running)]
            at = billed[meter.meter_id] + second
            read_at(store, tenant, meter, at / 1e6, final=bool(third))
            billed[meter.meter_id] = max(billed[meter.meter_id], round(at / 1e6 * 1e6))
            if third:
                del running[meter.meter_id]
        elif what in ("lease", "return"):
            with store.write() as connection:
                if what == "lease":
                    extend_lease(connection, worker_id=f"w{first}", tenant_id=tenant.tenant_id, need=second, slices=8)
                else:
                    return_lease(connection, worker_id=f"w{first}", tenant_id=tenant.tenant_id, amount=second)
        with store.read() as connection:
            promised = leased(connection, tenant.tenant_id)
            rows = meter_rows(connection, tenant_id=tenant.tenant_id)
        balance = balance_of(store, tenant.tenant_id)
        assert 0 <= promised <= balance
        assert balance == granted - sum(row.amount for row in rows)
        for row in rows:
            expected = row.meter.devices * billed[row.meter.meter_id]
            assert row.device_us == expected
            assert row.amount + row.uncollected == charge_for(row.meter.hour, expected)
    assert_right(store)


@examples(0.3)
@given(beyond=st.integers(0, 10**9), seconds=st.lists(st.integers(0, 300), min_size=2, max_size=4))
def test_meters_that_are_read_together_share_what_is_free(store: Store, beyond: int, seconds: list[int]) -> None:
    """And what the one gives back when it ends, another may have."""
    with store.write() as connection:
        tenant = new_tenant(connection, new_id("name"))
        grant(connection, tenant.tenant_id, hold_for(HOUR, 2, 100) * len(seconds) + beyond)
    wish = price_of(store)
    meters = [begin(store, tenant, wish) for _ in seconds]
    wishes = [
        MeterReading(
            meter_id=meter.meter_id,
            until=meter.started_at + timedelta(seconds=second),
            hold_s=100.0,
            final=second > 250,
        )
        for meter, second in zip(meters, seconds, strict=True)
    ]
    for again in (wishes, [msgspec.structs.replace(each, final=True) for each in wishes]):
        with store.write() as connection:
            read_meters(connection, tenant.tenant_id, again, zone=ZONE)
        with store.read() as connection:
            assert 0 <= leased(connection, tenant.tenant_id) <= tenant_balance(connection, tenant.tenant_id)
    with store.read() as connection:
        assert leased(connection, tenant.tenant_id) == 0
    assert_right(store)


def test_meters_and_gateways_at_the_same_time(store: Store, acme: Tenant) -> None:
    """Whoever comes first has the money, and nobody waits in a ring."""
    with store.write() as connection:
        grant(connection, acme.tenant_id, hold_for(HOUR, 2, 100) * 4)
    wish = price_of(store)
    failures: list[BaseException] = []

    def meters() -> None:
        for _ in range(6):
            with contextlib.suppress(InsufficientBalance):
                meter = begin(store, acme, wish)
                for second in (10, 20, 150):
                    read_at(store, acme, meter, second)
                read_at(store, acme, meter, 160, final=True)

    def gateway(worker: str) -> None:
        for _ in range(20):
            with store.write() as connection:
                got = extend_lease(connection, worker_id=worker, tenant_id=acme.tenant_id, need=10**7, slices=8)
            with store.write() as connection:
                return_lease(connection, worker_id=worker, tenant_id=acme.tenant_id, amount=got)

    def watch() -> None:
        for _ in range(30):
            with store.read() as connection:  # one state of the database throughout
                assert 0 <= leased(connection, acme.tenant_id) <= tenant_balance(connection, acme.tenant_id)

    def safely(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    acts = (meters, meters, lambda: gateway("w1"), lambda: gateway("w2"), watch)
    threads = [threading.Thread(target=safely, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with store.read() as connection:
        assert leased(connection, acme.tenant_id) == 0
    assert balance_of(store, acme.tenant_id) >= 0
    assert_right(store)


def test_a_wrong_book_is_noticed(store: Store, acme: Tenant) -> None:
    with store.write() as connection:
        grant(connection, acme.tenant_id, parse_amount("10"))
    meter = begin(store, acme, price_of(store))
    read_at(store, acme, meter, 10)
    with store.write() as connection:
        connection.execute(update(device_usage).values(amount=device_usage.c.amount + 1))
    with store.read() as connection:
        assert len(verify_meters(connection)) == 2


def test_prices_are_versions(store: Store) -> None:
    first = price_of(store, HOUR).price
    assert price_of(store, HOUR).price == first
    second = price_of(store, HOUR + 1).price
    assert second.valid_from > first.valid_from
    with store.write() as connection:
        agreed = agreed_price(connection, kind="h800", currency="CNY", hour=Nanos(5), now=OCTOBER)
        again = agreed_price(connection, kind="h800", currency="CNY", hour=Nanos(5), now=OCTOBER + timedelta(days=1))
        assert agreed == again and agreed.tier is DeviceTier.RESERVED
    with store.read() as connection:
        assert len(device_price_versions(connection)) == 3
        assert current_device_prices(connection, OCTOBER) == {("h800", "CNY", DeviceTier.PREEMPTIBLE): second}
