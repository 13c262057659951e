"""Device time and what it costs: whole devices, rented by the hour, billed to the microsecond.

A *meter* counts n devices of one kind at one price, from the moment they were taken: an attempt at a job, or a
reservation. It is read again and again while it runs. Each reading charges the difference of two cumulative amounts,

    charge(until) - charge(billed so far),     charge(t) = round(price an hour x device time up to t / an hour)

so the readings of a meter add up to what one reading at its end would charge, to the nano, however often it was read.

Time that the balance does not cover must not pass: a meter *holds* what the time until its next reading can cost, and
what its devices need to be given back. A meter whose hold cannot be renewed is ended while the hold still covers that.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from enum import StrEnum

import msgspec

from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, check_currency, format_amount, round_ratio
from tidemill.ledger.period import period_of

US_PER_HOUR = 3_600_000_000
MAX_HOUR = 10**15
"""The highest price, nanos per device and hour: a million currency units."""
MAX_DEVICES = 100_000
"""Of one meter. With MAX_HOUR, a second of it still fits the 64 bits of a database column."""

_MICROSECOND = timedelta(microseconds=1)


class DeviceTier(StrEnum):
    """What the price of a kind of device depends on beside the currency."""

    STANDARD = "standard"
    """Of a job that keeps its devices until it ends."""
    PREEMPTIBLE = "preemptible"
    """Of a job that gives them back when something more urgent comes."""
    RESERVED = "reserved"
    """Of devices that are kept for a tenant, used or not."""


class DevicePrice(msgspec.Struct, frozen=True):
    """One kind's price in one currency and tier from `valid_from` (aware UTC) until the next version."""

    price_id: str
    kind: str
    """A kind of the catalogue, e.g. `h800-sxm`, `cpu`."""
    currency: str
    tier: DeviceTier
    hour: Nanos
    """For one device and hour."""
    valid_from: datetime

    def __post_init__(self) -> None:
        check_currency(self.currency)
        check_hour(self.hour)
        if self.valid_from.utcoffset() is None:
            raise LedgerError(f"price {self.price_id}: valid_from {self.valid_from} has no time zone")


class DeviceMeter(msgspec.Struct, frozen=True, kw_only=True):
    """`devices` devices of one kind, counted from `started_at`; billed up to `billed_until`.

    Instants are aware UTC.
    """

    meter_id: str
    tenant_id: str
    currency: str
    kind: str
    tier: DeviceTier
    price_id: str
    hour: Nanos
    """The price in force when it began holds to its end."""
    devices: int
    started_at: datetime
    billed_until: datetime
    ended_at: datetime | None = None
    hold: Nanos = Nanos(0)
    """What of the balance is kept for time that is not billed yet."""
    uncollected: Nanos = Nanos(0)
    """What its time was worth beyond hold and balance; the operator's loss, never the tenant's."""
    job_id: str | None = None
    attempt: int | None = None
    reservation_id: str | None = None

    @property
    def device_us(self) -> int:
        """The device time that is billed, microseconds."""
        return self.devices * ((self.billed_until - self.started_at) // _MICROSECOND)


class DeviceTimeSlice(msgspec.Struct, frozen=True):
    """Device time of one meter in one billing month, read at one time."""

    month: str
    device_us: int
    amount: Nanos
    uncollected: Nanos
    at: datetime
    """When the charge takes effect: the last instant of the time that it is for."""


class DeviceSum(msgspec.Struct, frozen=True, kw_only=True):
    """Device time of one tenant by kind, tier and price version, summed over its meters."""

    kind: str
    tier: DeviceTier
    price_id: str
    device_us: int
    amount: Nanos
    uncollected: Nanos = Nanos(0)
    meters: int
    """How many attempts at jobs, or reservations, it is of."""


def check_hour(hour: int) -> Nanos:
    """Return a price an hour that can be taken, else raise LedgerError."""
    if not 0 <= hour <= MAX_HOUR:
        raise LedgerError(
            f"{format_amount(hour)} per hour is not a valid price; it must be from 0 to {format_amount(MAX_HOUR)}"
        )
    return Nanos(hour)


def charge_for(hour: int, device_us: int) -> Nanos:
    """What `device_us` microseconds of device time cost at `hour` nanos a device-hour."""
    return Nanos(round_ratio(hour * device_us, US_PER_HOUR))


def hold_for(hour: int, devices: int, seconds: float) -> Nanos:
    """The most that `devices` devices can be charged for the next `seconds`, whatever was charged before."""
    device_us = devices * round(seconds * 1_000_000)
    return Nanos(-(-hour * device_us // US_PER_HOUR) + (1 if hour else 0))


def read(meter: DeviceMeter, until: datetime, *, zone: str, available: int) -> list[DeviceTimeSlice]:
    """Charge a meter from where it is billed up to `until`.

    One slice for each billing month in the operator's zone.

    `available` is what may be charged at the most, hold and free balance together; what goes beyond is uncollected.
    Nothing when `until` lies before what is billed already.
    """
    slices = []
    begin = meter.billed_until
    while begin < until:
        period = period_of(begin, zone)
        end = min(until, period.end)
        before, after = (meter.devices * ((each - meter.started_at) // _MICROSECOND) for each in (begin, end))
        worth = charge_for(meter.hour, after) - charge_for(meter.hour, before)
        amount = min(worth, max(available, 0))
        available -= amount
        slices.append(
            DeviceTimeSlice(
                month=period.month,
                device_us=after - before,
                amount=Nanos(amount),
                uncollected=Nanos(worth - amount),
                at=end - _MICROSECOND,
            )
        )
        begin = end
    return slices


def sum_devices(rows: Iterable[DeviceSum]) -> tuple[Nanos, Nanos]:
    """What is charged and what is uncollected, in all."""
    sums: Sequence[DeviceSum] = tuple(rows)
    return Nanos(sum(row.amount for row in sums)), Nanos(sum(row.uncollected for row in sums))


def seconds_text(device_us: int) -> str:
    """Device time in seconds, exactly: 1500000 -> "1.5"."""
    whole, rest = divmod(device_us, 1_000_000)
    fraction = f"{rest:06d}".rstrip("0")
    return f"{whole}.{fraction}" if fraction else str(whole)
