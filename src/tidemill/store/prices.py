"""Price versions: appended, never edited."""

from datetime import datetime

from sqlalchemy import Connection, Row, insert, select

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.pricing import Price, PriceTier, PriceVersion
from tidemill.store.ids import new_id
from tidemill.store.revision import bump_revision
from tidemill.store.tables.money import prices


def set_price(
    connection: Connection,
    *,
    model: str,
    currency: str,
    price: Price,
    now: datetime,
    tier: PriceTier = PriceTier.STANDARD,
) -> PriceVersion:
    """Put `price` in force for a model, currency and tier from `now` on; the same again makes no new version."""
    latest = connection.execute(
        select(prices)
        .where(prices.c.model == model, prices.c.currency == currency, prices.c.tier == tier.value)
        .order_by(prices.c.valid_from.desc(), prices.c.price_id.desc())
        .limit(1)
    ).first()
    if latest is not None and _version(latest).price == price:
        return _version(latest)
    valid_from = to_micros(now)
    if latest is not None:
        valid_from = max(valid_from, latest.valid_from + 1)
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
            price_id=version.price_id,
            model=model,
            currency=currency,
            input=price.input,
            cached_input=price.cached_input,
            output=price.output,
            valid_from=valid_from,
            tier=tier.value,
        )
    )
    bump_revision(connection)
    return version


def price_versions(connection: Connection, price_ids: set[str] | None = None) -> list[PriceVersion]:
    """All versions, oldest first; or only those named."""
    query = select(prices).order_by(prices.c.valid_from, prices.c.model, prices.c.currency, prices.c.price_id)
    if price_ids is not None:
        query = query.where(prices.c.price_id.in_(price_ids))
    return [_version(row) for row in connection.execute(query)]


def current_prices(
    connection: Connection, now: datetime, tier: PriceTier = PriceTier.STANDARD
) -> dict[tuple[str, str], PriceVersion]:
    """A tier's version in force at `now`, by (model, currency)."""
    return {
        (version.model, version.currency): version
        for version in price_versions(connection)
        if version.tier is tier and version.valid_from <= now
    }


def _version(row: Row[tuple[object, ...]]) -> PriceVersion:
    values = row._mapping
    return PriceVersion(
        price_id=values["price_id"],
        model=values["model"],
        currency=values["currency"],
        price=Price(input=values["input"], cached_input=values["cached_input"], output=values["output"]),
        valid_from=from_micros(values["valid_from"]),
        tier=PriceTier(values["tier"]),
    )
