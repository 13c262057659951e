"""/api/v1/limits"""

from datetime import UTC, datetime
from typing import Annotated, Literal

from litestar import get, post
from litestar.params import FromQuery, JSONBody
from msgspec import Meta, convert

from tidemill.control import limits
from tidemill.control.api.access import Running, change, read_drained
from tidemill.control.api.schemas import FAILURES, Answer, Body, TenantRef


class LimitSchema(Answer):
    """A limit that is in force, and what is used of it now."""

    id: str
    tenant: Annotated[str, Meta(description="The tenant's name.")]
    key: Annotated[str | None, Meta(description="The key that it binds, with all keys rotated from it; null: all.")]
    model: Annotated[str | None, Meta(description="The model that it counts; null: all.")]
    kind: Literal["rpm", "tpm", "concurrency", "budget"]
    text: Annotated[str, Meta(description="The limit in words.", examples=["100 requests per minute"])]
    amount: Annotated[int | None, Meta(description="Requests or tokens; null for a budget.")]
    used: Annotated[
        int | None,
        Meta(description="In the last minute, or open now. Includes what gateway processes hold in advance."),
    ]
    budget: Annotated[str | None, Meta(description="A decimal amount; null for other kinds, as all below.")]
    spent: str | None
    leased: Annotated[str | None, Meta(description="Held for requests that run, or by gateway processes in advance.")]
    currency: str | None
    per: Literal["day", "month"] | None
    period: Annotated[str | None, Meta(description="That of now.", examples=["2026-11", "2026-11-24"])]
    ends_at: Annotated[str | None, Meta(description="ISO 8601, UTC: when the next period begins.")]
    soft_percent: int | None
    warned: Annotated[bool, Meta(description="The soft limit of the budget is reached in this period.")]


class Limits(Answer):
    """Limits."""

    limits: list[LimitSchema]


class LimitRequest(Body):
    """Limits to be put in force, each in the place of one of its kind on the same tenant, key and model."""

    tenant: TenantRef
    key: Annotated[str | None, Meta(description="Limit only this key: the key itself, or its id.")] = None
    model: Annotated[str | None, Meta(description="Limit only requests for this model.")] = None
    rpm: Annotated[int | None, Meta(description="Requests per minute.")] = None
    tpm: Annotated[int | None, Meta(description="Tokens per minute, of prompts and answers.")] = None
    concurrency: Annotated[int | None, Meta(description="Concurrent requests.")] = None
    budget: Annotated[str | None, Meta(description="A decimal amount in the tenant's currency.", examples=["100"])] = (
        None
    )
    per: Annotated[str | None, Meta(description="Period of the budget: `day` or `month` (default).")] = None
    soft_percent: Annotated[int | None, Meta(description="Percentage of the budget at which to warn.")] = None


class LimitRef(Body):
    """A limit to be removed."""

    limit: Annotated[str, Meta(description="Its id.", examples=["lim_7k3m"])]


@get("/limits", responses=FAILURES)
async def list_limits(platform: Running, tenant: FromQuery[str | None] = None) -> Limits:
    """List the limits and what is used of them; with `tenant` (a name or an id) only that tenant's."""
    now = datetime.now(UTC)
    found = await read_drained(
        platform, lambda connection: limits.list_limits(connection, tenant, zone=platform.zone, now=now)
    )
    return convert(found, Limits)


@post("/limits", status_code=200, responses=FAILURES)
async def set_limits(platform: Running, data: JSONBody[LimitRequest]) -> Limits:
    """Put limits in force. Once this is answered, every gateway keeps to them."""
    now, models = datetime.now(UTC), [model.name for model in platform.models()]
    spec = convert(data, limits.LimitSpec, from_attributes=True)
    await platform.drain_usage()  # a budget begins with what was spent of it already
    made = await change(
        platform,
        lambda connection: limits.set_limits(connection, spec, models=models, zone=platform.zone, now=now),
    )
    return convert(made, Limits)


@post("/limits/remove", status_code=200, responses=FAILURES)
async def remove_limit(platform: Running, data: JSONBody[LimitRef]) -> LimitSchema:
    """Take a limit out of force; answers with it as it was."""
    now = datetime.now(UTC)
    removed = await change(
        platform, lambda connection: limits.remove_limit(connection, data.limit, zone=platform.zone, now=now)
    )
    return convert(removed, LimitSchema)
