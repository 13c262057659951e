"""/api/v1/batches"""

from datetime import UTC, datetime
from typing import Annotated

from litestar import get, post
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from msgspec import Meta, convert

from tidemill.control import batches
from tidemill.control.api.access import Running, change, read, read_drained
from tidemill.control.api.schemas import CONFLICT, FAILURES, Amount, Answer, Body, Currency, Instant
from tidemill.control.pages import MAX_PAGE, PAGE


class BatchSchema(Answer):
    """A batch of requests. `completed` + `failed` = `total` once it has ended."""

    id: str
    tenant: Annotated[str, Meta(description="The tenant's name.")]
    currency: Currency
    key_id: Annotated[str, Meta(description="The key that created it; its lines are metered under this key.")]
    endpoint: Annotated[str, Meta(examples=["/v1/chat/completions"])]
    model: Annotated[str | None, Meta(description="The model of its lines, if it is the same for all.")]
    status: Annotated[str, Meta(description="OpenAI's states of a batch.", examples=["in_progress", "completed"])]
    total: Annotated[int, Meta(description="Number of lines; 0 until the batch is validated.")]
    completed: int
    failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: Instant
    expires_at: Instant
    ended_at: Annotated[str | None, Meta(description="ISO 8601, UTC; null while it is not finished.")]


class BatchError(Answer):
    """What is wrong with a line of its input."""

    code: str
    message: str
    param: str | None
    line: Annotated[int | None, Meta(description="Counts from 1; null: the file as a whole.")]


class WholeBatch(BatchSchema):
    """A batch with its errors, and what it has cost until now."""

    charge: Amount
    errors: list[BatchError]


class Batches(Answer):
    """A page of batches, newest first."""

    batches: list[BatchSchema]
    next: Annotated[str | None, Meta(description="`after` of the next page; null at the end.")]


class BatchRef(Body):
    """A batch to be cancelled."""

    batch: Annotated[str, Meta(description="Its id.", examples=["batch_7k3m"])]


@get("/batches", responses=FAILURES)
async def list_batches(
    platform: Running,
    tenant: FromQuery[str | None] = None,
    unfinished: Annotated[bool, QueryParameter(description="Only batches that have not ended.")] = False,
    limit: Annotated[int, QueryParameter(description=f"Batches in a page, 1 to {MAX_PAGE}.")] = PAGE,
    after: Annotated[str, QueryParameter(description="`next` of the page before.")] = "",
) -> Batches:
    """List the batches of all tenants, or with `tenant` (a name or an id) of one, newest first."""
    found = await read(
        platform,
        lambda connection: batches.list_batches(connection, tenant, unfinished=unfinished, limit=limit, after=after),
    )
    return convert(found, Batches)


@get("/batches/{batch_id:str}", responses=FAILURES)
async def show_batch(platform: Running, batch_id: FromPath[str]) -> WholeBatch:
    """One batch, with its errors and what it has cost until now."""
    return convert(
        await read_drained(platform, lambda connection: batches.show_batch(connection, batch_id)), WholeBatch
    )


@post("/batches/cancel", status_code=200, responses=CONFLICT)
async def cancel_batch(platform: Running, data: JSONBody[BatchRef]) -> WholeBatch:
    """Have a batch cancelled. Lines in flight may end, and are billed; what they gave is in its output."""
    now = datetime.now(UTC)
    await platform.drain_usage()
    asked = await change(platform, lambda connection: batches.cancel_batch(connection, data.batch, now=now))
    return convert(asked, WholeBatch)
