"""What a gateway process knows by heart: keys, tenants and prices, as of one revision of the store."""

import hashlib
import time

import msgspec
from sqlalchemy import select

from tidemill.ledger.pricing import Price
from tidemill.store import schema
from tidemill.store.clock import from_micros
from tidemill.store.engine import Store
from tidemill.store.prices import current_prices
from tidemill.store.revision import current_revision


class Principal(msgspec.Struct, frozen=True):
    """Who a key belongs to."""

    tenant_id: str
    key_id: str
    currency: str


class PricePoint(msgspec.Struct, frozen=True):
    """The price in force for a model in a currency."""

    price_id: str
    price: Price


class Snapshot(msgspec.Struct, frozen=True):
    """An immutable view; a newer one replaces it whole."""

    revision: int
    keys: dict[bytes, Principal]
    """By the SHA-256 of the key."""
    prices: dict[tuple[str, str], PricePoint]
    """By model and currency."""


EMPTY = Snapshot(-1, {}, {})


def key_digest(secret: bytes) -> bytes:
    """What `Snapshot.keys` is keyed by."""
    return hashlib.sha256(secret).digest()


def read_snapshot(store: Store, known_revision: int = -1) -> Snapshot | None:
    """Read the store's current state; None when it still has the revision that is known. Blocking."""
    with store.read() as connection:
        revision = current_revision(connection)
        if revision == known_revision:
            return None
        keys, tenants = schema.keys.c, schema.tenants.c
        rows = connection.execute(
            select(keys.digest, keys.key_id, keys.tenant_id, tenants.currency)
            .join(schema.tenants, tenants.tenant_id == keys.tenant_id)
            .where(keys.revoked_at.is_(None))
        ).all()
        prices = current_prices(connection, from_micros(time.time_ns() // 1000 + 1_000_000))
    return Snapshot(
        revision=revision,
        keys={bytes.fromhex(row.digest): Principal(row.tenant_id, row.key_id, row.currency) for row in rows},
        prices={name: PricePoint(version.price_id, version.price) for name, version in prices.items()},
    )
