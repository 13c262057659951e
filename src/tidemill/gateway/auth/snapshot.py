"""A snapshot of keys, tenants and prices at one revision of the store."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import select

from tidemill.clock import from_micros
from tidemill.gateway.auth.key_policy import KeyRules, rules_of
from tidemill.ledger.limits import Limit
from tidemill.ledger.pricing import Price, PriceTier, PriceVersion
from tidemill.store.budgets import warned
from tidemill.store.engine import Store
from tidemill.store.keys import policy_of
from tidemill.store.limits import list_limits
from tidemill.store.prices import current_prices
from tidemill.store.revision import current_revision
from tidemill.store.tables import tenants as tables


class Principal(msgspec.Struct, frozen=True):
    """The tenant and the rights of a key."""

    tenant_id: str
    key_id: str
    currency: str
    tier: PriceTier = PriceTier.STANDARD
    """The price that the request has: that of its class."""
    first_key_id: str = ""
    """The first key of its line of rotated keys: what limits are set on."""
    weight: int = 1
    """The tenant's share of a full model, relative to others'."""
    limits: tuple[Limit, ...] = ()
    """Those of the tenant that bind this key, for whatever model."""
    rules: KeyRules | None = None
    """What the key is bound to; None: to nothing."""


class PricePoint(msgspec.Struct, frozen=True):
    """The price in force for a model in a currency."""

    price_id: str
    price: Price


class AccessSnapshot(msgspec.Struct, frozen=True):
    """An immutable view; a newer one replaces it whole."""

    revision: int
    keys: dict[bytes, Principal]
    """By the SHA-256 of the key."""
    prices: dict[tuple[str, str], PricePoint]
    """By model and currency."""
    batch_prices: dict[tuple[str, str], PricePoint] = {}
    """The same, for the lines of batches."""
    limit_ids: frozenset[str] = frozenset()
    """All limits that there are."""
    warned: frozenset[tuple[str, str]] = frozenset()
    """Budgets, by limit id and period, whose soft limit is reached."""


EMPTY = AccessSnapshot(-1, {}, {})


def key_digest(secret: bytes) -> bytes:
    """The digest of a key, which is the key of `AccessSnapshot.keys`."""
    return hashlib.sha256(secret).digest()


def read_snapshot(store: Store, known_revision: int = -1) -> AccessSnapshot | None:
    """Read a snapshot from the store; None if its revision is the known one. Blocking."""
    with store.read() as connection:
        revision = current_revision(connection)
        if revision == known_revision:
            return None
        keys, tenants = tables.keys.c, tables.tenants.c
        rows = connection.execute(
            select(
                keys.digest,
                keys.key_id,
                keys.tenant_id,
                keys.expires_at,
                keys.allowed_models,
                keys.allowed_ips,
                keys.line_id,
                tenants.currency,
                tenants.weight,
            )
            .join(tables.tenants, tenants.tenant_id == keys.tenant_id)
            .where(keys.revoked_at.is_(None))
        ).all()
        limits = list_limits(connection)
        warnings = warned(connection) if limits else frozenset()
        now = from_micros(time.time_ns() // 1000 + 1_000_000)
        prices, batch_prices = (current_prices(connection, now, tier) for tier in (PriceTier.STANDARD, PriceTier.BATCH))
    return AccessSnapshot(
        revision=revision,
        keys=_principals(rows, limits),
        prices=_points(prices),
        batch_prices=_points(batch_prices),
        limit_ids=frozenset(limit.limit_id for limit in limits),
        warned=warnings,
    )


def _principals(rows: Sequence[Any], limits: Sequence[Limit]) -> dict[bytes, Principal]:
    of_tenant: dict[str, list[Limit]] = {}
    for limit in limits:
        of_tenant.setdefault(limit.tenant_id, []).append(limit)
    found = {}
    for row in rows:
        first = row.line_id or row.key_id
        found[bytes.fromhex(row.digest)] = Principal(
            row.tenant_id,
            row.key_id,
            row.currency,
            first_key_id=first,
            weight=row.weight,
            limits=tuple(each for each in of_tenant.get(row.tenant_id, ()) if each.key_id in (None, first)),
            rules=rules_of(policy_of(row.expires_at, row.allowed_models, row.allowed_ips)),
        )
    return found


def _points(versions: dict[tuple[str, str], PriceVersion]) -> dict[tuple[str, str], PricePoint]:
    return {name: PricePoint(version.price_id, version.price) for name, version in versions.items()}
