"""/api/v1/keys"""

from datetime import UTC, datetime
from typing import Annotated

from litestar import get, post
from litestar.params import FromQuery, JSONBody
from msgspec import Meta, convert, field

from tidemill.control import changes, queries
from tidemill.control.api.access import Running, change, read
from tidemill.control.api.schemas import CONFLICT, FAILURES, Answer, Body, Instant, TenantRef


class KeySchema(Answer):
    """An API key, as far as it can be known once it was handed out."""

    id: str
    tenant: Annotated[str, Meta(description="The tenant's name.")]
    name: str
    hint: Annotated[str, Meta(description="The part of the key that may be shown.", examples=["sk-tm-...9f3a"])]
    created_at: Instant
    revoked_at: Annotated[str | None, Meta(description="ISO 8601, UTC; null while the key works.")]
    expires_at: Annotated[str | None, Meta(description="ISO 8601, UTC; null: never.")]
    models: Annotated[list[str], Meta(description="The models that it may be used for; empty: all.")]
    ips: Annotated[list[str], Meta(description="The networks that it may be used from; empty: any.")]
    first_id: Annotated[str, Meta(description="The first key of its line of rotated keys, whose limits it shares.")]


class Keys(Answer):
    """Keys, oldest first, revoked ones included."""

    keys: list[KeySchema]


class KeyRequest(Body):
    """A key to be made."""

    tenant: TenantRef
    name: Annotated[str, Meta(description="Name of the key.")] = "default"
    expires: Annotated[
        str | None,
        Meta(description="A time from now, a day (to its end), or an instant.", examples=["90d", "2027-01-31"]),
    ] = None
    models: Annotated[list[str], Meta(description="Models that it may be used for; empty: all.")] = field(
        default_factory=list
    )
    ips: Annotated[
        list[str], Meta(description="Networks (CIDR) that it may be used from; empty: any.", examples=[["10.1.0.0/16"]])
    ] = field(default_factory=list)


class NewKey(KeySchema):
    """A key that was made."""

    key: Annotated[str, Meta(description="The key itself. Only its digest is stored: it will not be shown again.")]


class RotateRequest(Body):
    """A key to be replaced by a new one."""

    key: Annotated[str, Meta(description="The key itself, or its id.")]
    overlap: Annotated[str, Meta(description="How long the old key keeps working.", examples=["24h", "7d", "0s"])] = (
        "24h"
    )


class RotatedKey(NewKey):
    """A key that was made in the place of another."""

    replaces: Annotated[KeySchema, Meta(description="The other, with the time at which it expires.")]


class RevokeRequest(Body):
    """A key to be revoked."""

    key: Annotated[str, Meta(description="The key itself, or its id.")]


@get("/keys", responses=FAILURES)
async def list_keys(platform: Running, tenant: FromQuery[str | None] = None) -> Keys:
    """List the API keys, oldest first; with `tenant` (a name or an id) only that tenant's."""
    return convert(await read(platform, lambda connection: queries.keys(connection, tenant)), Keys)


@post("/keys", responses=FAILURES)
async def create_key(platform: Running, data: JSONBody[KeyRequest]) -> NewKey:
    """Make an API key. It works at once, and this answer is the only place where it is ever seen."""
    now, models = datetime.now(UTC), [model.name for model in platform.models()]
    policy = changes.key_policy(
        expires=data.expires, models=data.models, ips=data.ips, known_models=models, zone=platform.zone, now=now
    )
    made = await change(
        platform,
        lambda connection: changes.create_key(connection, tenant=data.tenant, name=data.name, now=now, policy=policy),
    )
    return convert(made, NewKey)


@post("/keys/rotate", responses=CONFLICT)
async def rotate_key(platform: Running, data: JSONBody[RotateRequest]) -> RotatedKey:
    """Make a successor of a key, with its name, policies and limits.

    The key itself expires after the overlap.
    """
    now = datetime.now(UTC)
    made = await change(
        platform, lambda connection: changes.rotate_key(connection, key=data.key, overlap=data.overlap, now=now)
    )
    return convert(made, RotatedKey)


@post("/keys/revoke", status_code=200, responses=FAILURES)
async def revoke_key(platform: Running, data: JSONBody[RevokeRequest]) -> KeySchema:
    """Revoke an API key: once this is answered, no gateway takes it any more.

    Doing it again changes nothing.
    """
    now = datetime.now(UTC)
    revoked = await change(platform, lambda connection: changes.revoke_key(connection, key=data.key, now=now))
    return convert(revoked, KeySchema)
