"""/api/v1/tenants"""

from datetime import UTC, datetime
from typing import Annotated

from litestar import get, post
from litestar.params import FromQuery, JSONBody
from msgspec import Meta, convert

from tidemill.control import changes, queries
from tidemill.control.api.access import Running, change, read_drained
from tidemill.control.api.schemas import (
    CONFLICT,
    FAILURES,
    Amount,
    Answer,
    Body,
    Currency,
    Instant,
    TenantRef,
)


class TenantSchema(Answer):
    """A customer with a balance and keys of their own."""

    id: str
    name: str
    currency: Currency
    balance: Amount
    created_at: Instant
    weight: Annotated[int, Meta(description="Its share when a model is full, relative to the others'.")]


class Tenants(Answer):
    """Tenants, oldest first."""

    tenants: list[TenantSchema]


class TenantRequest(Body):
    """A tenant to be made."""

    name: Annotated[str, Meta(description="Unique name of 1 to 128 printable characters.")]
    currency: Annotated[str | None, Meta(description="ISO 4217 code; the installation's when left out.")] = None


class WeightRequest(Body):
    """Another share of full models for a tenant."""

    tenant: TenantRef
    weight: Annotated[int, Meta(description="From 1 to 1000; every tenant begins with 1.")]


class NewTenant(TenantSchema):
    """A tenant that was made."""

    warning: Annotated[str | None, Meta(description="Why the tenant cannot be served yet; null if it can.")]


@get("/tenants", responses=FAILURES)
async def list_tenants(platform: Running, tenant: FromQuery[str | None] = None) -> Tenants:
    """List the tenants with their balances, oldest first; with `tenant` (a name or an id) only that one."""
    found = await read_drained(platform, lambda connection: queries.tenants(connection, tenant))
    return convert(found, Tenants)


@post("/tenants", responses=CONFLICT)
async def create_tenant(platform: Running, data: JSONBody[TenantRequest]) -> NewTenant:
    """Make a tenant."""
    currency = platform.currency if data.currency is None else data.currency
    now = datetime.now(UTC)
    made = await change(
        platform, lambda connection: changes.create_tenant(connection, name=data.name, currency=currency, now=now)
    )
    return convert(made, NewTenant)


@post("/tenants/weight", status_code=200, responses=FAILURES)
async def set_weight(platform: Running, data: JSONBody[WeightRequest]) -> TenantSchema:
    """Give a tenant another share of models that are full."""
    await platform.drain_usage()  # for the balance in the answer
    changed = await change(
        platform, lambda connection: changes.set_weight(connection, tenant=data.tenant, weight=data.weight)
    )
    return convert(changed, TenantSchema)
