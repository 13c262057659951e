"""Device time: however often a meter is read, the readings add up to what its time costs."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ledger.values import NOVEMBER
from tidemill.ledger.devices import (
    MAX_HOUR,
    US_PER_HOUR,
    DeviceMeter,
    DevicePrice,
    DeviceSum,
    DeviceTier,
    charge_for,
    hold_for,
    read,
    seconds_text,
)
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.invoice import MonthUsage, make_invoice, to_json
from tidemill.ledger.invoice_text import WIDTH, display_width, to_text
from tidemill.ledger.money import ZERO, Nanos, parse_amount
from tidemill.ledger.period import parse_period

BEGAN = NOVEMBER.end - timedelta(hours=2)
PLENTY = 2**80
prices = st.integers(0, MAX_HOUR)


def meter(hour: int = parse_amount("2"), devices: int = 3, started: datetime = BEGAN, hold: int = 0) -> DeviceMeter:
    return DeviceMeter(
        meter_id="mtr_1",
        tenant_id="acme",
        currency="CNY",
        kind="h800-sxm",
        tier=DeviceTier.STANDARD,
        price_id="prc_1",
        hour=Nanos(hour),
        devices=devices,
        started_at=started,
        billed_until=started,
        hold=Nanos(hold),
    )


def test_an_hour_of_three_devices() -> None:
    (only,) = read(meter(), BEGAN + timedelta(hours=1), zone="Asia/Shanghai", available=PLENTY)
    assert (only.amount, only.device_us, only.month) == (parse_amount("6"), 3 * US_PER_HOUR, "2026-11")
    assert only.at == BEGAN + timedelta(hours=1, microseconds=-1)


@given(hour=prices, devices=st.integers(1, 1000), steps=st.lists(st.integers(0, 10**11), max_size=20))
def test_readings_add_up_to_one_reading_at_the_end(hour: int, devices: int, steps: list[int]) -> None:
    each, charged, counted = meter(hour, devices), 0, 0
    for step in steps:
        until = each.billed_until + timedelta(microseconds=step)
        slices = read(each, until, zone="Asia/Shanghai", available=PLENTY)
        assert all(one.amount >= 0 and one.uncollected == 0 for one in slices)
        assert all(parse_period(one.month, "Asia/Shanghai").start <= one.at < until for one in slices)
        charged += sum(one.amount for one in slices)
        counted += sum(one.device_us for one in slices)
        each = msgspec.structs.replace(each, billed_until=until)
    assert counted == each.device_us == devices * sum(steps)
    assert charged == charge_for(hour, devices * sum(steps))


def test_a_reading_over_midnight_is_of_two_months() -> None:
    slices = read(meter(), NOVEMBER.end + timedelta(hours=1), zone="Asia/Shanghai", available=PLENTY)
    assert [(one.month, one.amount) for one in slices] == [
        ("2026-11", parse_amount("12")),
        ("2026-12", parse_amount("6")),
    ]
    assert slices[0].at in NOVEMBER and slices[1].at not in NOVEMBER


def test_nothing_is_read_backwards() -> None:
    later = msgspec.structs.replace(meter(), billed_until=BEGAN + timedelta(hours=1))
    assert read(later, BEGAN, zone="UTC", available=PLENTY) == []


@given(hour=prices, us=st.integers(0, 10**10), available=st.integers(-10, 10**18))
def test_never_more_than_there_is(hour: int, us: int, available: int) -> None:
    slices = read(meter(hour, 1), BEGAN + timedelta(microseconds=us), zone="UTC", available=available)
    charged = sum(one.amount for one in slices)
    assert 0 <= charged <= max(available, 0)
    assert charged + sum(one.uncollected for one in slices) == charge_for(hour, us)


@given(hour=prices, devices=st.integers(1, 100), before=st.integers(0, 10**9), seconds=st.integers(0, 10_000))
def test_a_hold_covers_its_time_wherever_it_begins(hour: int, devices: int, before: int, seconds: int) -> None:
    each = meter(hour, devices)
    each = msgspec.structs.replace(each, billed_until=each.started_at + timedelta(microseconds=before))
    slices = read(each, each.billed_until + timedelta(seconds=seconds), zone="UTC", available=PLENTY)
    assert sum(one.amount for one in slices) <= hold_for(hour, devices, seconds)


def test_prices_have_bounds() -> None:
    for hour in (-1, MAX_HOUR + 1):
        with pytest.raises(LedgerError, match="per hour is not a valid price"):
            DevicePrice("prc_1", "cpu", "USD", DeviceTier.STANDARD, Nanos(hour), datetime(2026, 1, 1, tzinfo=UTC))


def test_seconds_are_written_exactly() -> None:
    assert [seconds_text(us) for us in (0, 1, 1_500_000, 7_200_000_000)] == ["0", "0.000001", "1.5", "7200"]


def invoice_of(*rows: DeviceSum) -> object:
    agreed = DevicePrice("prc_r", "h800-sxm", "CNY", DeviceTier.RESERVED, parse_amount("18.5"), NOVEMBER.start)
    cheap = DevicePrice("prc_p", "h800-sxm", "CNY", DeviceTier.PREEMPTIBLE, parse_amount("9.999999999"), BEGAN)
    usage = MonthUsage(
        tenant_id="acme", currency="CNY", period=NOVEMBER, requests=0, uncollected=ZERO, sums=(), devices=rows
    )
    return make_invoice(
        usage,
        tenant_name="Acme",
        prices={},
        device_prices={price.price_id: price for price in (agreed, cheap)},
        opening_balance=parse_amount("100000"),
        credits=(),
        as_of=NOVEMBER.end,
    )


ROWS = (
    DeviceSum(
        kind="h800-sxm",
        tier=DeviceTier.RESERVED,
        price_id="prc_r",
        device_us=8 * 720 * US_PER_HOUR,
        amount=Nanos(parse_amount("106560")),
        meters=1,
    ),
    DeviceSum(
        kind="h800-sxm",
        tier=DeviceTier.PREEMPTIBLE,
        price_id="prc_p",
        device_us=1_234_567,
        amount=Nanos(3_429_353),
        uncollected=Nanos(5),
        meters=4,
    ),
)


def test_device_time_on_an_invoice() -> None:
    invoice = invoice_of(*ROWS)
    assert invoice.subtotal == parse_amount("106560.003429353")  # type: ignore[attr-defined]
    assert invoice.uncollected == 5  # type: ignore[attr-defined]
    assert [line.tier.value for line in invoice.device_lines] == ["preemptible", "reserved"]  # type: ignore[attr-defined]
    plain = to_json(invoice)  # type: ignore[arg-type]
    assert plain["device_lines"][1]["device_seconds"] == str(8 * 720 * 3600)  # type: ignore[index]
    page = to_text(invoice)  # type: ignore[arg-type]
    assert "device time in November 2026" in page and "5,760.0000" in page and "106,560.003429353" in page
    assert all(display_width(line) <= WIDTH for line in page.splitlines())
    assert "No usage" not in page


def test_a_price_that_is_not_there_is_no_bill() -> None:
    with pytest.raises(LedgerError, match="the price prc_x of h800-sxm is missing"):
        invoice_of(msgspec.structs.replace(ROWS[0], price_id="prc_x"))
