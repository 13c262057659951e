"""API keys: made here, shown once, stored as a digest.

A key may be bound to models and networks, and may expire.
"""

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, insert, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.errors import Conflict, NotFound
from tidemill.store.ids import new_id
from tidemill.store.revision import bump_revision
from tidemill.store.tables.tenants import keys
from tidemill.store.tenants import check_name

KEY_PREFIX = "sk-tm-"


class KeyPolicy(msgspec.Struct, frozen=True):
    """What a key may be used for. Nothing set: for everything, for ever."""

    expires_at: datetime | None = None
    models: tuple[str, ...] = ()
    """Names of models; none: all."""
    networks: tuple[str, ...] = ()
    """Where its requests may come from, in CIDR notation; none: from anywhere."""


ANYTHING = KeyPolicy()


class Key(msgspec.Struct, frozen=True):
    """What is known of an API key once it was handed out."""

    key_id: str
    tenant_id: str
    name: str
    hint: str
    """The few letters that may be shown, e.g. `sk-tm-...9f3a`."""
    created_at: datetime
    revoked_at: datetime | None
    policy: KeyPolicy = ANYTHING
    rotation_id: str | None = None
    """The first of the keys that were rotated into each other; None for that itself. All of them share its limits."""

    @property
    def first_id(self) -> str:
        """The first key of its rotation: what limits are set on."""
        return self.rotation_id or self.key_id


def digest_of(secret: str) -> str:
    """The SHA-256 of a key in hex.

    A key has 190 random bits, so a slow hash would protect nothing further.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(
    connection: Connection,
    *,
    tenant_id: str,
    name: str,
    now: datetime,
    policy: KeyPolicy = ANYTHING,
    rotation_id: str | None = None,
) -> tuple[Key, str]:
    """Make a key for a tenant. Returns what is stored, and the secret itself, which exists nowhere else."""
    secret = KEY_PREFIX + secrets.token_urlsafe(24).replace("-", "A").replace("_", "B")
    key = Key(
        key_id=new_id("key"),
        tenant_id=tenant_id,
        name=check_name("key", name),
        hint=f"{KEY_PREFIX}...{secret[-4:]}",
        created_at=now,
        revoked_at=None,
        policy=policy,
        rotation_id=rotation_id,
    )
    connection.execute(
        insert(keys).values(
            key_id=key.key_id,
            tenant_id=tenant_id,
            name=key.name,
            digest=digest_of(secret),
            hint=key.hint,
            created_at=to_micros(now),
            expires_at=None if policy.expires_at is None else to_micros(policy.expires_at),
            allowed_models=",".join(policy.models) or None,
            allowed_ips=",".join(policy.networks) or None,
            line_id=rotation_id,
        )
    )
    bump_revision(connection)
    return key, secret


def list_keys(connection: Connection, tenant_id: str | None = None) -> list[Key]:
    """The keys of a tenant, or of all, oldest first, revoked ones included."""
    query = select(keys).order_by(keys.c.created_at, keys.c.key_id)
    if tenant_id is not None:
        query = query.where(keys.c.tenant_id == tenant_id)
    return [_key(row) for row in connection.execute(query)]


def find_key(connection: Connection, key: str) -> Key:
    """A key, given by itself or by its id. Raises NotFound.

    The message never repeats what was given: it may be a secret.
    """
    row = connection.execute(select(keys).where((keys.c.key_id == key) | (keys.c.digest == digest_of(key)))).first()
    if row is None:
        raise NotFound("There is no such key.", hint="Give the key itself, or its id from `tidemill key list`.")
    return _key(row)


def revoke_key(connection: Connection, *, key: str, now: datetime) -> Key:
    """Revoke a key, given by itself or by its id; returns it as it is then. Raises NotFound.

    A key that was revoked already stays as it was.
    """
    found = find_key(connection, key)
    if found.revoked_at is not None:
        return found
    connection.execute(update(keys).where(keys.c.key_id == found.key_id).values(revoked_at=to_micros(now)))
    bump_revision(connection)
    return msgspec.structs.replace(found, revoked_at=now)


def rotate_key(connection: Connection, *, key: str, overlap: timedelta, now: datetime) -> tuple[Key, Key, str]:
    """Make a successor of a key and let the key expire after `overlap`.

    Returns the old key, the new one, and its secret.

    The successor has the same name, policies and limits, and lives as long as the old one was made for. Raises
    NotFound, and Conflict for a key that works no more.
    """
    old = find_key(connection, key)
    ends = old.policy.expires_at
    if old.revoked_at is not None or (ends is not None and ends <= now):
        what = "was revoked" if old.revoked_at is not None else "has expired"
        raise Conflict(f"The key {old.hint} {what}.", hint="Make a new one with `tidemill key create`.", param="key")
    lifetime = None if ends is None else ends - old.created_at
    policy = msgspec.structs.replace(old.policy, expires_at=None if lifetime is None else now + lifetime)
    new, secret = create_key(
        connection, tenant_id=old.tenant_id, name=old.name, now=now, policy=policy, rotation_id=old.first_id
    )
    last = now + overlap if ends is None else min(ends, now + overlap)
    connection.execute(update(keys).where(keys.c.key_id == old.key_id).values(expires_at=to_micros(last)))
    return msgspec.structs.replace(old, policy=msgspec.structs.replace(old.policy, expires_at=last)), new, secret


def _key(row: Row[Any]) -> Key:
    return Key(
        key_id=row.key_id,
        tenant_id=row.tenant_id,
        name=row.name,
        hint=row.hint,
        created_at=from_micros(row.created_at),
        revoked_at=None if row.revoked_at is None else from_micros(row.revoked_at),
        policy=policy_of(row.expires_at, row.allowed_models, row.allowed_ips),
        rotation_id=row.line_id,
    )


def policy_of(expires_at: int | None, allowed_models: str | None, allowed_ips: str | None) -> KeyPolicy:
    """The policy that these columns hold."""
    if expires_at is None and allowed_models is None and allowed_ips is None:
        return ANYTHING
    return KeyPolicy(
        expires_at=None if expires_at is None else from_micros(expires_at),
        models=tuple(allowed_models.split(",")) if allowed_models else (),
        networks=tuple(allowed_ips.split(",")) if allowed_ips else (),
    )
