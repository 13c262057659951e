"""Price versions: appended, never edited."""

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.components import BY_KEY, Component
from tidemill.ledger.pricing import Price, PriceTier, PriceVersion
from tidemill.store.ids import new_id
from tidemill.store.revision import bump_revision
from tidemill.store.tables.money import price_rates, prices


def set_price(
    connection: Connection,
    *,
    model: str,
    currency: str,
    price: Price,
    now: datetime,
    tier: PriceTier = PriceTier.STANDARD,
) -> PriceVersion:
    """Put `price` in force for a model, currency and tier from `now` on.

    The same again makes no new version.
    """
    row = connection.execute(
        select(prices)
        .where(prices.c.model == model, prices.c.currency == currency, prices.c.tier == tier.value)
        .order_by(prices.c.valid_from.desc(), prices.c.price_id.desc())
        .limit(1)
    ).first()
    valid_from = to_micros(now)
    if row is not None:
        (latest,) = _versions(connection, [row])
        if latest.price == price:
            return latest
        valid_from = max(valid_from, row.valid_from + 1)
    version = PriceVersion(
        price_id=new_id("prc"),
        model=model,
        currency=currency,
        price=price,
        valid_from=from_micros(valid_from),
        tier=tier,
    )
    connection.execute(
        insert(prices).values(
            price_id=version.price_id, model=model, currency=currency, valid_from=valid_from, tier=tier.value
        )
    )
    connection.execute(
        insert(price_rates),
        [
            {"price_id": version.price_id, "component": component.key, "rate": rate}
            for component, rate in price.rates.items()
        ],
    )
    bump_revision(connection)
    return version


def price_versions(connection: Connection, price_ids: set[str] | None = None) -> list[PriceVersion]:
    """All versions, oldest first; or only those named."""
    query = select(prices).order_by(prices.c.valid_from, prices.c.model, prices.c.currency, prices.c.price_id)
    if price_ids is not None:
        query = query.where(prices.c.price_id.in_(price_ids))
    return _versions(connection, list(connection.execute(query)))


def current_prices(
    connection: Connection, now: datetime, tier: PriceTier = PriceTier.STANDARD
) -> dict[tuple[str, str], PriceVersion]:
    """A tier's version in force at `now`, by (model, currency)."""
    return {
        (version.model, version.currency): version
        for version in price_versions(connection)
        if version.tier is tier and version.valid_from <= now
    }


FEW = 100
"""So many versions or fewer are looked up by their ids."""


def _versions(connection: Connection, rows: list[Row[Any]]) -> list[PriceVersion]:
    """Rows of `prices` with their rates."""
    query = select(price_rates)
    if len(rows) <= FEW:
        query = query.where(price_rates.c.price_id.in_([row.price_id for row in rows]))
    rates: dict[str, dict[Component, int]] = {}
    for rate in connection.execute(query):
        rates.setdefault(rate.price_id, {})[BY_KEY[rate.component]] = rate.rate
    return [
        PriceVersion(
            price_id=row.price_id,
            model=row.model,
            currency=row.currency,
            price=Price(rates.get(row.price_id, {})),
            valid_from=from_micros(row.valid_from),
            tier=PriceTier(row.tier),
        )
        for row in rows
    ]
