"""/api/v1/margin"""

from datetime import UTC, datetime
from typing import Annotated

from litestar import get
from litestar.params import QueryParameter
from msgspec import Meta, convert

from tidemill.control import queries
from tidemill.control.api.access import Running, read_drained
from tidemill.control.api.schemas import FAILURES, Amount, Answer, Currency, Instant
from tidemill.control.margin import margin


class MarginSums(Answer):
    """Revenue and cost.

    `cost` is `busy_cost` + `idle_cost`, what the replicas cost in the time, + `upstream_cost`.
    """

    revenue: Amount
    cost: Amount
    busy_cost: Annotated[str, Meta(description="The device time that requests used, at what it costs.")]
    idle_cost: Annotated[str, Meta(description="The device time that nobody used, in proportion to that used.")]
    upstream_cost: Annotated[str, Meta(description="What upstreams bill for tokens, by `[models.NAME.cost]`.")]
    gross_margin: Amount
    ratio: Annotated[float | None, Meta(description="Gross margin per revenue; null without revenue.")]


class TenantMargin(MarginSums):
    """One tenant's part of a model's margin."""

    tenant: Annotated[str, Meta(description="The tenant's name.")]
    device_seconds: float
    contribution: Annotated[str, Meta(description="Revenue less the cost of the device time used, and of tokens.")]


class ModelMargin(MarginSums):
    """One model's margin."""

    model: str
    replicas: int
    cost_per_hour: Annotated[str, Meta(description="What a replica costs an hour.")]
    since: Annotated[str, Meta(description="From when its cost counts: the month's start, or its first price.")]
    fill: Annotated[float | None, Meta(description="Device time used per device time owned.")]
    tenants: list[TenantMargin]


class Margin(MarginSums):
    """The margin of a month, in the installation's currency."""

    month: str
    zone: str
    currency: Currency
    as_of: Instant
    other_currencies: Annotated[
        dict[str, str], Meta(description="Revenue in other currencies, which the sums are without.")
    ]
    models: list[ModelMargin]


@get("/margin", responses=FAILURES)
async def get_margin(
    platform: Running,
    month: Annotated[
        str | None, QueryParameter(description="A billing month such as 2026-11; else the current.")
    ] = None,
) -> Margin:
    """What each model brought in, by tenant, against what its replicas cost, idle time included."""
    now, running = datetime.now(UTC), platform.models()
    chosen = queries.this_month(platform.zone, now) if month is None else month
    found = await read_drained(
        platform,
        lambda connection: margin(
            connection, running, month=chosen, zone=platform.zone, currency=platform.currency, now=now
        ),
    )
    return convert(found, Margin)
