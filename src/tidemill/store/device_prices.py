"""Price versions of device time: appended, never edited."""

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.devices import DevicePrice, DeviceTier
from tidemill.ledger.money import Nanos
from tidemill.store.ids import new_id
from tidemill.store.tables.money import device_prices


def set_device_price(
    connection: Connection, *, kind: str, currency: str, tier: DeviceTier, hour: Nanos, now: datetime
) -> DevicePrice:
    """Put a price in force for a kind, currency and tier from `now` on.

    The same again makes no new version.
    """
    latest = connection.execute(
        select(device_prices)
        .where(device_prices.c.kind == kind, device_prices.c.currency == currency, device_prices.c.tier == tier.value)
        .order_by(device_prices.c.valid_from.desc(), device_prices.c.price_id.desc())
        .limit(1)
    ).first()
    if latest is not None and latest.hour == hour:
        return _price(latest)
    valid_from = to_micros(now) if latest is None else max(to_micros(now), latest.valid_from + 1)
    price = DevicePrice(new_id("prc"), kind, currency, tier, hour, from_micros(valid_from))
    _insert(connection, price)
    return price


def agreed_price(connection: Connection, *, kind: str, currency: str, hour: Nanos, now: datetime) -> DevicePrice:
    """The price of a reservation: a version of its own, or an earlier one of the same amount."""
    found = connection.execute(
        select(device_prices).where(
            device_prices.c.kind == kind,
            device_prices.c.currency == currency,
            device_prices.c.tier == DeviceTier.RESERVED.value,
            device_prices.c.hour == hour,
        )
    ).first()
    if found is not None:
        return _price(found)
    price = DevicePrice(new_id("prc"), kind, currency, DeviceTier.RESERVED, hour, from_micros(to_micros(now)))
    _insert(connection, price)
    return price


def device_price_versions(connection: Connection, price_ids: Collection[str] | None = None) -> list[DevicePrice]:
    """All versions, oldest first; or only those named."""
    query = select(device_prices).order_by(device_prices.c.valid_from, device_prices.c.price_id)
    if price_ids is not None:
        query = query.where(device_prices.c.price_id.in_(price_ids))
    return [_price(row) for row in connection.execute(query)]


def current_device_prices(connection: Connection, now: datetime) -> dict[tuple[str, str, DeviceTier], DevicePrice]:
    """The version in force at `now`, by kind, currency and tier.

    Agreed prices of reservations are not among them.
    """
    return {
        (price.kind, price.currency, price.tier): price
        for price in device_price_versions(connection)
        if price.valid_from <= now and price.tier is not DeviceTier.RESERVED
    }


def _insert(connection: Connection, price: DevicePrice) -> None:
    connection.execute(
        insert(device_prices).values(
            price_id=price.price_id,
            kind=price.kind,
            currency=price.currency,
            tier=price.tier.value,
            hour=price.hour,
            valid_from=to_micros(price.valid_from),
        )
    )


def _price(row: Row[Any]) -> DevicePrice:
    return DevicePrice(
        price_id=row.price_id,
        kind=row.kind,
        currency=row.currency,
        tier=DeviceTier(row.tier),
        hour=Nanos(row.hour),
        valid_from=from_micros(row.valid_from),
    )
