"""The first start, and what each start sees to.

Schema, settings, prices, the first tenant and its key.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import Connection, func, select

from tidemill.app.config.schema.platform import Config
from tidemill.clock import from_micros, to_micros
from tidemill.errors import ConfigError
from tidemill.ledger.money import parse_amount
from tidemill.ledger.period import period_of
from tidemill.ledger.posting import credit_grant
from tidemill.ledger.pricing import PriceTier
from tidemill.store.accounts import post
from tidemill.store.device_prices import set_device_price
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.keys import create_key
from tidemill.store.migrate import migrate
from tidemill.store.prices import set_price
from tidemill.store.revision import get_setting, set_setting
from tidemill.store.tables.money import transactions
from tidemill.store.tables.tenants import tenants
from tidemill.store.tables.usage import usage_records
from tidemill.store.tenants import create_tenant


class FirstTenant(NamedTuple):
    """What was made at the first start."""

    name: str
    key: str


def prepare_store(store: Store, config: Config, keep_key: Callable[[str], None]) -> FirstTenant | None:
    """Bring the store up to date with the program and the configuration.

    It is one transaction after the migration.

    Returns the first tenant when it was made now. Its key is handed to `keep_key` before the commit, as a kill behind
    it would leave a tenant whose key nobody knows. Raises ConfigError when the configuration contradicts the store.
    """
    migrate(store)
    now = datetime.now(UTC)
    with store.write() as connection:
        _settle_currency(connection, config)
        _settle_zone(connection, config.timezone, now)
        set_setting(connection, "issuer", config.issuer)
        for model, currencies in config.prices.items():
            for currency, price in currencies.items():
                set_price(connection, model=model, currency=currency, price=price.price(), now=now)
                batch = price.batch_price()
                set_price(connection, model=model, currency=currency, price=batch, now=now, tier=PriceTier.BATCH)
        for kind, by_currency in config.device_prices.items():
            for currency, device_price in by_currency.items():
                for tier, hour in device_price.hours().items():
                    set_device_price(connection, kind=kind, currency=currency, tier=tier, hour=hour, now=now)
        if connection.execute(select(tenants.c.tenant_id).limit(1)).first() is not None:
            return None
        first = _first_tenant(connection, config, now)
        keep_key(first.key)
        return first


def _settle_currency(connection: Connection, config: Config) -> None:
    known = get_setting(connection, "currency")
    if known is not None and known != config.currency:
        raise ConfigError(
            f"currency: this installation uses {known}; it cannot be changed to {config.currency}.",
            hint=f'Write currency = "{known}", and give tenants their own with `tidemill tenant create --currency`.',
        )
    set_setting(connection, "currency", config.currency)


def _settle_zone(connection: Connection, zone: str, now: datetime) -> None:
    """Another zone moves the bounds of all months.

    It is taken only if nothing that was booked changes its month.
    """
    known = get_setting(connection, "zone")
    if known is not None and known != zone:
        moved = _first_moved(connection, known, zone, now)
        if moved is not None:
            raise ConfigError(
                f"timezone: this installation bills months of {known}; in {zone}, usage already booked at"
                f" {moved:%Y-%m-%d %H:%M} UTC would move to another month's invoice.",
                hint=f'Write timezone = "{known}".',
            )
    set_setting(connection, "zone", zone)


def _first_moved(connection: Connection, known: str, zone: str, now: datetime) -> datetime | None:
    """The first booking or usage that is of one month in `known` and of another in `zone`.

    None when there is none.
    """
    instants = (transactions.c.at, usage_records.c.finished_at)
    begun = [connection.execute(select(func.min(each))).scalar() for each in instants]
    if not any(begun):
        return None
    month, other = (period_of(from_micros(min(filter(None, begun))), each) for each in (known, zone))
    other = min(other, other.next, other.previous, key=lambda each: abs(each.start - month.start))
    while month.start <= now or other.start <= now:
        window = sorted((to_micros(month.start), to_micros(other.start)))
        for each in instants:
            found = connection.execute(select(func.min(each)).where(each >= window[0], each < window[1])).scalar()
            if found is not None:
                return from_micros(found)
        month, other = month.next, other.next
    return None


def _first_tenant(connection: Connection, config: Config, now: datetime) -> FirstTenant:
    first = config.first_tenant
    tenant = create_tenant(connection, name=first.name, currency=config.currency, now=now)
    credit = parse_amount(first.credit)
    if credit > 0:
        post(
            connection,
            credit_grant(
                new_id("txn"),
                tenant_id=tenant.tenant_id,
                currency=tenant.currency,
                amount=credit,
                at=now,
                memo="first credit",
            ),
        )
    _, secret = create_key(connection, tenant_id=tenant.tenant_id, name="first key", now=now)
    return FirstTenant(tenant.name, secret)
