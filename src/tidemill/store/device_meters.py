"""Meters of device time: begun with a hold, read while they run, ended.

Each microsecond is charged once.

A reading moves `billed_until` and posts the charge in one transaction, so one that is repeated, or made again after a
kill, charges nothing twice. The tenant's account is locked before its meters, in this order everywhere.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, func, insert, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.errors import TidemillError
from tidemill.ledger.devices import DeviceMeter, DevicePrice, DeviceSum, DeviceTier, charge_for, hold_for, read
from tidemill.ledger.money import Nanos, format_amount
from tidemill.ledger.posting import REVENUE_DEVICES, device_charge
from tidemill.store.accounts import account_balance, post, tenant_balance
from tidemill.store.balance_leases import leased
from tidemill.store.bulk import dialect_insert
from tidemill.store.ids import new_id
from tidemill.store.reservations import ReservationState
from tidemill.store.tables.jobs import reservations
from tidemill.store.tables.usage import device_meters, device_usage


class InsufficientBalance(TidemillError):
    """The free balance does not cover what has to be held before devices are taken."""

    status = 402
    code = "insufficient_quota"


class MeterStart(msgspec.Struct, frozen=True, kw_only=True):
    """A meter to be begun."""

    price: DevicePrice
    tier: DeviceTier
    devices: int
    hold_s: float
    """The time that is held for, seconds."""
    job_id: str | None = None
    attempt: int | None = None
    reservation_id: str | None = None


class MeterReading(msgspec.Struct, frozen=True, kw_only=True):
    """A meter to be read up to `until`."""

    meter_id: str
    until: datetime
    hold_s: float = 0.0
    """The time that is held for afterwards, seconds."""
    final: bool = False
    """It ends there, and holds nothing any more."""


def begin_meters(
    connection: Connection, *, tenant_id: str, currency: str, starts: Sequence[MeterStart], now: datetime
) -> list[DeviceMeter]:
    """Begin meters, all or none. Raises InsufficientBalance."""
    holds = [hold_for(start.price.hour, start.devices, start.hold_s) for start in starts]
    free = tenant_balance(connection, tenant_id, lock=True) - leased(connection, tenant_id)
    if sum(holds) > free and sum(holds) > 0:
        raise InsufficientBalance(
            f"Insufficient balance: {format_amount(sum(holds))} {currency} must be available to start, but only"
            f" {format_amount(max(free, 0))} is.",
            hint="Top up the balance.",
        )
    begun = []
    for start, hold in zip(starts, holds, strict=True):
        meter = DeviceMeter(
            meter_id=new_id("mtr"),
            tenant_id=tenant_id,
            currency=currency,
            kind=start.price.kind,
            tier=start.tier,
            price_id=start.price.price_id,
            hour=start.price.hour,
            devices=start.devices,
            started_at=from_micros(to_micros(now)),
            billed_until=from_micros(to_micros(now)),
            hold=hold,
            job_id=start.job_id,
            attempt=start.attempt,
            reservation_id=start.reservation_id,
        )
        values = msgspec.structs.asdict(meter) | {
            "tier": meter.tier.value,
            "started_at": to_micros(now),
            "billed_until": to_micros(now),
        }
        connection.execute(insert(device_meters).values(**values))
        begun.append(meter)
    return begun


def start_meters(connection: Connection, *, job_id: str, attempt: int, at: datetime) -> list[DeviceMeter]:
    """Have the meters of an attempt count from `at`, when its processes ran.

    Not from when it got its devices.
    """
    connection.execute(
        update(device_meters)
        .where(
            device_meters.c.job_id == job_id,
            device_meters.c.attempt == attempt,
            device_meters.c.billed_until == device_meters.c.started_at,
            device_meters.c.ended_at.is_(None),
        )
        .values(started_at=to_micros(at), billed_until=to_micros(at))
    )
    return open_meters(connection, job_id=job_id, attempt=attempt)


def read_meters(
    connection: Connection, tenant_id: str, readings: Sequence[MeterReading], *, zone: str
) -> dict[str, bool]:
    """Read meters of one tenant and charge for what has passed.

    It is one ledger transaction for each billing month.

    Says of each whether its hold could be renewed in full; where not, what is left of it stays. A meter that has ended
    is passed over.
    """
    free = tenant_balance(connection, tenant_id, lock=True) - leased(connection, tenant_id)
    charges: dict[tuple[str, str], list[Any]] = {}
    covered = {}
    for reading in sorted(readings, key=lambda each: each.meter_id):
        query = select(device_meters).where(
            device_meters.c.meter_id == reading.meter_id, device_meters.c.tenant_id == tenant_id
        )
        row = connection.execute(query.with_for_update()).first()
        if row is None or row.ended_at is not None:
            continue
        meter = _meter(row)
        slices = read(meter, reading.until, zone=zone, available=meter.hold + max(free, 0))
        charged = sum(each.amount for each in slices)
        left = max(meter.hold - charged, 0)
        free -= max(charged - meter.hold, 0)
        wanted = 0 if reading.final else hold_for(meter.hour, meter.devices, reading.hold_s)
        hold = min(wanted, left + max(free, 0))
        free -= hold - left
        covered[meter.meter_id] = hold >= wanted
        until = max(reading.until, meter.billed_until)
        for each in slices:
            _count(connection, meter, each.month, each.device_us, each.amount, each.uncollected)
            if each.amount:
                charge = charges.setdefault((meter.currency, each.month), [0, each.at, 0])
                charge[0] += each.amount
                charge[1] = max(charge[1], each.at)
                charge[2] += 1
        connection.execute(
            update(device_meters)
            .where(device_meters.c.meter_id == meter.meter_id)
            .values(
                billed_until=to_micros(until),
                hold=hold,
                uncollected=meter.uncollected + sum(each.uncollected for each in slices),
                ended_at=to_micros(until) if reading.final else None,
            )
        )
    post(
        connection,
        *(
            device_charge(
                new_id("txn"),
                tenant_id=tenant_id,
                currency=currency,
                amount=Nanos(amount),
                at=at,
                memo=f"device time, {count} readings",
            )
            for (currency, _), (amount, at, count) in sorted(charges.items())
        ),
    )
    return covered


def _count(
    connection: Connection, meter: DeviceMeter, month: str, device_us: int, amount: int, uncollected: int
) -> None:
    there = (device_usage.c.meter_id == meter.meter_id, device_usage.c.month == month)
    more = {
        "device_us": device_usage.c.device_us + device_us,
        "amount": device_usage.c.amount + amount,
        "uncollected": device_usage.c.uncollected + uncollected,
    }
    if connection.execute(update(device_usage).where(*there).values(**more)).rowcount == 0:
        connection.execute(
            dialect_insert(connection, device_usage).values(
                meter_id=meter.meter_id,
                month=month,
                tenant_id=meter.tenant_id,
                device_us=device_us,
                amount=amount,
                uncollected=uncollected,
            )
        )


def open_meters(
    connection: Connection,
    *,
    job_id: str | None = None,
    attempt: int | None = None,
    reservation_id: str | None = None,
) -> list[DeviceMeter]:
    """The meters that run, of an attempt at a job or of a reservation."""
    query = select(device_meters).where(device_meters.c.ended_at.is_(None))
    if job_id is not None:
        query = query.where(device_meters.c.job_id == job_id, device_meters.c.attempt == attempt)
    if reservation_id is not None:
        query = query.where(device_meters.c.reservation_id == reservation_id)
    return [_meter(row) for row in connection.execute(query.order_by(device_meters.c.meter_id))]


def to_be_read(connection: Connection, *, tenant_id: str, before: datetime) -> bool:
    """Whether device time of a tenant before that instant may still be charged.

    Meters run that were not read since, or a reservation should have begun.
    """
    running = select(device_meters.c.meter_id).where(
        device_meters.c.tenant_id == tenant_id,
        device_meters.c.ended_at.is_(None),
        device_meters.c.billed_until < to_micros(before),
    )
    due = select(reservations.c.reservation_id).where(
        reservations.c.tenant_id == tenant_id,
        reservations.c.state == ReservationState.BOOKED.value,
        reservations.c.starts_at < to_micros(before),
    )
    return any(connection.execute(query.limit(1)).first() is not None for query in (running, due))


def last_reading(connection: Connection, *, reservation_id: str) -> datetime | None:
    """Up to when a reservation is billed; None when it never began."""
    query = select(func.max(device_meters.c.billed_until)).where(device_meters.c.reservation_id == reservation_id)
    found = connection.execute(query).scalar()
    return None if found is None else from_micros(found)


class MeterTotals(msgspec.Struct, frozen=True):
    """What one meter has counted in a month, or in all."""

    meter: DeviceMeter
    device_us: int
    amount: Nanos
    uncollected: Nanos


def meter_rows(
    connection: Connection, *, tenant_id: str, month: str | None = None, job_id: str | None = None
) -> list[MeterTotals]:
    """What a tenant's meters have counted, the earliest begun first: the records behind the sums."""
    query = (
        select(
            device_meters,
            func.sum(device_usage.c.device_us).label("sum_us"),
            func.sum(device_usage.c.amount).label("sum_amount"),
            func.sum(device_usage.c.uncollected).label("sum_uncollected"),
        )
        .join(device_usage, device_usage.c.meter_id == device_meters.c.meter_id)
        .where(device_usage.c.tenant_id == tenant_id)
        .group_by(*device_meters.c)
        .order_by(device_meters.c.started_at, device_meters.c.meter_id)
    )
    if month is not None:
        query = query.where(device_usage.c.month == month)
    if job_id is not None:
        query = query.where(device_meters.c.job_id == job_id)
    return [
        MeterTotals(_meter(row), int(row.sum_us), Nanos(int(row.sum_amount)), Nanos(int(row.sum_uncollected)))
        for row in connection.execute(query)
    ]


def device_sums(connection: Connection, *, tenant_id: str, month: str | None = None) -> list[DeviceSum]:
    """A tenant's device time by kind, tier and price version, in a billing month or in all."""
    columns = device_meters.c
    query = (
        select(
            columns.kind,
            columns.tier,
            columns.price_id,
            func.sum(device_usage.c.device_us).label("device_us"),
            func.sum(device_usage.c.amount).label("amount"),
            func.sum(device_usage.c.uncollected).label("uncollected"),
            func.count(columns.meter_id.distinct()).label("meters"),
        )
        .join(device_usage, device_usage.c.meter_id == columns.meter_id)
        .where(device_usage.c.tenant_id == tenant_id)
        .group_by(columns.kind, columns.tier, columns.price_id)
        .order_by(columns.kind, columns.tier, columns.price_id)
    )
    if month is not None:
        query = query.where(device_usage.c.month == month)
    return [
        DeviceSum(
            kind=row.kind,
            tier=DeviceTier(row.tier),
            price_id=row.price_id,
            device_us=int(row.device_us),
            amount=Nanos(int(row.amount)),
            uncollected=Nanos(int(row.uncollected)),
            meters=row.meters,
        )
        for row in connection.execute(query)
    ]


def verify_meters(connection: Connection) -> list[str]:
    """Say where device time, its charges and the ledger do not agree; nothing if all is well."""
    wrong = []
    counted = {
        row.meter_id: row
        for row in connection.execute(
            select(
                device_usage.c.meter_id,
                func.sum(device_usage.c.device_us).label("device_us"),
                func.sum(device_usage.c.amount + device_usage.c.uncollected).label("worth"),
            ).group_by(device_usage.c.meter_id)
        )
    }
    for row in connection.execute(select(device_meters)):
        meter, sums = _meter(row), counted.get(row.meter_id)
        device_us, worth = (0, 0) if sums is None else (int(sums.device_us), int(sums.worth))
        if device_us != meter.device_us:
            wrong.append(
                f"meter {meter.meter_id}: {device_us} us are counted, but {meter.device_us} us until its last reading"
            )
        if worth != charge_for(meter.hour, meter.device_us):
            due = format_amount(charge_for(meter.hour, meter.device_us))
            wrong.append(f"meter {meter.meter_id}: {format_amount(Nanos(worth))} are charged, but its time costs {due}")
        if meter.ended_at is not None and meter.hold:
            wrong.append(f"meter {meter.meter_id} has ended, but still holds {format_amount(meter.hold)}")
    charged = connection.execute(
        select(device_meters.c.currency, func.sum(device_usage.c.amount))
        .join(device_usage, device_usage.c.meter_id == device_meters.c.meter_id)
        .group_by(device_meters.c.currency)
    ).all()
    for currency, amount in charged:
        earned = account_balance(connection, REVENUE_DEVICES, currency)
        if earned != int(amount):
            wrong.append(
                f"{currency}: meters have charged {format_amount(Nanos(int(amount)))}, {REVENUE_DEVICES} has"
                f" {format_amount(Nanos(earned))}"
            )
    return wrong


def _meter(row: Row[Any]) -> DeviceMeter:
    return DeviceMeter(
        meter_id=row.meter_id,
        tenant_id=row.tenant_id,
        currency=row.currency,
        kind=row.kind,
        tier=DeviceTier(row.tier),
        price_id=row.price_id,
        hour=Nanos(row.hour),
        devices=row.devices,
        started_at=from_micros(row.started_at),
        billed_until=from_micros(row.billed_until),
        ended_at=None if row.ended_at is None else from_micros(row.ended_at),
        hold=Nanos(row.hold),
        uncollected=Nanos(row.uncollected),
        job_id=row.job_id,
        attempt=row.attempt,
        reservation_id=row.reservation_id,
    )
