"""API keys: made here, shown once, stored as a digest."""

import hashlib
import secrets
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, insert, select, update

from tidemill.errors import NotFound
from tidemill.store.clock import from_micros, to_micros
from tidemill.store.ids import new_id
from tidemill.store.revision import bump_revision
from tidemill.store.schema import keys
from tidemill.store.tenants import check_name

KEY_PREFIX = "sk-tm-"


class Key(msgspec.Struct, frozen=True):
    """What is known of an API key once it was handed out."""

    key_id: str
    tenant_id: str
    name: str
    hint: str
    """The few letters that may be shown, e.g. `sk-tm-...9f3a`."""
    created_at: datetime
    revoked_at: datetime | None


def digest_of(secret: str) -> str:
    """The SHA-256 of a key in hex. A key has 190 random bits, so a slow hash would protect nothing further."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create_key(connection: Connection, *, tenant_id: str, name: str, now: datetime) -> tuple[Key, str]:
    """Make a key for a tenant. Returns what is stored, and the secret itself, which exists nowhere else."""
    secret = KEY_PREFIX + secrets.token_urlsafe(24).replace("-", "A").replace("_", "B")
    key = Key(
        key_id=new_id("key"),
        tenant_id=tenant_id,
        name=check_name("key", name),
        hint=f"{KEY_PREFIX}...{secret[-4:]}",
        created_at=now,
        revoked_at=None,
    )
    connection.execute(
        insert(keys).values(
            key_id=key.key_id,
            tenant_id=tenant_id,
            name=key.name,
            digest=digest_of(secret),
            hint=key.hint,
            created_at=to_micros(now),
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


def revoke_key(connection: Connection, *, key: str, now: datetime) -> Key:
    """Revoke a key, given by itself or by its id; returns it as it is then. Raises NotFound.

    A key that was revoked already stays as it was. The message never repeats what was given: it may be a secret.
    """
    row = connection.execute(select(keys).where((keys.c.key_id == key) | (keys.c.digest == digest_of(key)))).first()
    if row is None:
        raise NotFound("There is no such key.", hint="Give the key itself, or its id from `tidemill key list`.")
    found = _key(row)
    if found.revoked_at is not None:
        return found
    connection.execute(update(keys).where(keys.c.key_id == found.key_id).values(revoked_at=to_micros(now)))
    bump_revision(connection)
    return msgspec.structs.replace(found, revoked_at=now)


def _key(row: Row[Any]) -> Key:
    return Key(
        key_id=row.key_id,
        tenant_id=row.tenant_id,
        name=row.name,
        hint=row.hint,
        created_at=from_micros(row.created_at),
        revoked_at=None if row.revoked_at is None else from_micros(row.revoked_at),
    )
