"""/api/v1/usage"""

from typing import Annotated, Literal

from litestar import get
from litestar.params import QueryParameter
from msgspec import Meta, convert

from tidemill.control import queries
from tidemill.control.api.access import Running, read_drained
from tidemill.control.api.schemas import FAILURES, Amount, Answer, Currency, Instant
from tidemill.control.queries import MAX_PAGE_RECORDS, PAGE_RECORDS


class ComponentUse(Answer, omit_defaults=True):
    """A component beyond the tokens of prompts and answers, such as `reasoning_output` or `search`."""

    quantity: int
    charge: Annotated[
        str | None, Meta(description="Missing on a record that is not billed for it apart.", examples=["0.002"])
    ] = None


class UsageSums(Answer, kw_only=True, omit_defaults=True):
    """Sums of usage records. `prompt_tokens` includes `cached_tokens`."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    charge: Amount
    components: Annotated[
        dict[str, ComponentUse] | None, Meta(description="Further components, where there are any.")
    ] = None


class UsageRecordSchema(Answer, kw_only=True, omit_defaults=True):
    """One accepted request: what it used, what it cost, and how it ended."""

    request_id: str
    key_id: str
    model: str
    replica: str
    status: Annotated[str, Meta(description="How it ended.", examples=["ok", "client_closed", "engine_lost"])]
    streamed: bool
    estimated: Annotated[bool, Meta(description="True when the counts are Tidemill's own, not the engine's.")]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    charge: Amount
    charge_input: Amount
    charge_cached: Amount
    charge_output: Amount
    uncollected: Annotated[str, Meta(description="What it was worth beyond its hold; not charged.")]
    hold: Amount
    currency: Currency
    price_id: str
    started_at: Instant
    first_token_at: Annotated[str | None, Meta(description="ISO 8601, UTC; null when no token came.")]
    finished_at: Instant
    device_ns: Annotated[int, Meta(description="Its fair share of its replica's busy time, nanoseconds.")]
    components: Annotated[
        dict[str, ComponentUse] | None, Meta(description="Further components, where there are any.")
    ] = None


class DeviceUseSchema(Answer):
    """Device time of jobs and reservations by kind of device, tier and price version."""

    kind: Annotated[str, Meta(examples=["h800-sxm", "cpu"])]
    tier: Literal["standard", "preemptible", "reserved"]
    price_id: str
    device_seconds: Annotated[str, Meta(description="Exact to the microsecond.", examples=["7200", "0.25"])]
    meters: Annotated[int, Meta(description="How many attempts at jobs, or reservations, it is of.")]
    charge: Amount
    uncollected: Annotated[str, Meta(description="What it was worth beyond hold and balance; not charged.")]


class DeviceRecord(Answer):
    """One rental: an attempt at a job, or a reservation."""

    meter_id: str
    job_id: str | None
    attempt: int | None
    reservation_id: str | None
    kind: str
    tier: Literal["standard", "preemptible", "reserved"]
    devices: int
    price_id: str
    started_at: Instant
    ended_at: Annotated[str | None, Meta(description="ISO 8601, UTC; null while it lasts.")]
    device_seconds: str
    charge: Amount
    uncollected: Amount
    currency: Currency


class UsageStatementSchema(UsageSums, kw_only=True, omit_defaults=True):
    """A tenant's usage in a month or in all, and its balance of now."""

    tenant: Annotated[str, Meta(description="The tenant's name.")]
    tenant_id: str
    currency: Currency
    month: Annotated[str | None, Meta(description="null: from the beginning.", examples=["2026-11"])]
    zone: Annotated[str, Meta(description="The time zone whose midnights bound the month.")]
    balance: Amount
    models: Annotated[dict[str, UsageSums], Meta(description="The same sums by model, without device time.")]
    devices: Annotated[list[DeviceUseSchema], Meta(description="Device time; its charges are in `charge`, too.")]
    device_records: Annotated[
        list[DeviceRecord] | None, Meta(description="With the first page of records: the rentals behind `devices`.")
    ] = None
    records: Annotated[list[UsageRecordSchema] | None, Meta(description="When asked for: oldest first.")] = None
    next: Annotated[str | None, Meta(description="`after` of the next page of records; missing at the end.")] = None


@get("/usage", responses=FAILURES)
async def get_usage(
    platform: Running,
    tenant: Annotated[str, QueryParameter(description="A tenant's name, or its id.")],
    month: Annotated[
        str | None, QueryParameter(description="A billing month such as 2026-11; all time without.")
    ] = None,
    records: Annotated[bool, QueryParameter(description="Add the usage records.")] = False,
    after: Annotated[str | None, QueryParameter(description="`next` of the page of records before.")] = None,
    limit: Annotated[int, QueryParameter(description=f"Records in a page, 1 to {MAX_PAGE_RECORDS}.")] = PAGE_RECORDS,
) -> UsageStatementSchema:
    """What a tenant has used, by model and in all.

    The sums are exactly those of the usage records settled until now.
    """
    found = await read_drained(
        platform,
        lambda connection: queries.usage(
            connection, tenant, zone=platform.zone, month=month, records=records, after=after, limit=limit
        ),
    )
    return convert(found, UsageStatementSchema)
