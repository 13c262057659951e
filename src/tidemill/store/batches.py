"""Batches of the Batch API: their states, and who may move them from one to the next.

    validating, in_progress -> failed (the input is wrong, or gone)
    validating -> in_progress -> finalizing -> completed | expired
    validating, in_progress -> cancelling -> cancelled

The tenant's side makes a batch and asks for its cancelling; all else is the runner's. Each step names the states that
it may leave, in the statement that takes it, so that a cancelling and a step of the runner never undo each other.
"""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, func, insert, select, tuple_, update

from tidemill.clock import from_micros, to_micros
from tidemill.errors import BadInput, Conflict, NotFound, TidemillError
from tidemill.store.files import UNFINISHED, File, add_output, find_file
from tidemill.store.tables.files import batches, files
from tidemill.store.tables.tenants import tenants


class BatchStatus(StrEnum):
    """OpenAI's states of a batch."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class TooManyBatches(TidemillError):
    """The tenant has as many unfinished batches as it may have."""

    status = 429
    code = "batch_limit_exceeded"


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of an input file. `line` counts from 1; None: the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class LineCounts(msgspec.Struct, frozen=True):
    """How far a batch has come, in lines and in tokens."""

    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: "LineCounts") -> "LineCounts":
        return LineCounts(
            self.completed + other.completed,
            self.failed + other.failed,
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch of a tenant."""

    batch_id: str
    tenant_id: str
    key_id: str
    """The key that made it; its lines are metered under it."""
    site: str
    """The directory that has its input file, and whose runner works on it."""
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_expires_s: int | None
    """How long its files are kept; None: the installation's rule."""
    model: str | None = None
    """The model of its lines, when they all have the same."""
    status: BatchStatus = BatchStatus.VALIDATING
    outcome: BatchStatus | None = None
    """What it becomes once it is finalized."""
    errors: tuple[LineError, ...] = ()
    total: int = 0
    counts: LineCounts = LineCounts()
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: datetime
    expires_at: datetime
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None

    @property
    def finished(self) -> bool:
        return self.status not in UNFINISHED


def create_batch(connection: Connection, batch: Batch, *, max_open: int) -> None:
    """Enter a new batch.

    Raises NotFound for its input file, BadInput for one that is no input, TooManyBatches.
    """
    connection.execute(
        select(tenants.c.tenant_id).where(tenants.c.tenant_id == batch.tenant_id).with_for_update(key_share=True)
    )
    # Held until the commit: the file is not deleted in between.
    connection.execute(select(files.c.file_id).where(files.c.file_id == batch.input_file_id).with_for_update())
    file = find_file(connection, tenant_id=batch.tenant_id, file_id=batch.input_file_id, now=batch.created_at)
    if file.purpose != "batch":
        raise BadInput(f"The file {file.file_id} was not uploaded with purpose 'batch'.", param="input_file_id")
    unfinished = connection.execute(
        select(func.count())
        .select_from(batches)
        .where(batches.c.tenant_id == batch.tenant_id, batches.c.status.in_(UNFINISHED))
    ).scalar_one()
    if unfinished >= max_open:
        raise TooManyBatches(
            f"You have {unfinished} unfinished batches, which is the maximum.", hint="Wait until one has finished."
        )
    connection.execute(
        insert(batches).values(
            batch_id=batch.batch_id,
            tenant_id=batch.tenant_id,
            key_id=batch.key_id,
            site=file.site,
            endpoint=batch.endpoint,
            input_file_id=batch.input_file_id,
            completion_window=batch.completion_window,
            metadata=None if batch.metadata is None else msgspec.json.encode(batch.metadata).decode(),
            output_expires_s=batch.output_expires_s,
            status=BatchStatus.VALIDATING.value,
            total=0,
            completed=0,
            failed=0,
            input_tokens=0,
            cached_tokens=0,
            output_tokens=0,
            reasoning_tokens=0,
            created_at=to_micros(batch.created_at),
            expires_at=to_micros(batch.expires_at),
        )
    )


def find_batch(connection: Connection, *, tenant_id: str, batch_id: str) -> Batch:
    """A batch of a tenant. Raises NotFound, also for another tenant's."""
    row = connection.execute(
        select(batches).where(batches.c.batch_id == batch_id, batches.c.tenant_id == tenant_id)
    ).first()
    if row is None:
        raise NotFound(f"No such Batch object: {batch_id[:80]}.", hint="GET /v1/batches lists yours.", param="id")
    return _batch(row)


def list_batches(connection: Connection, *, tenant_id: str, limit: int, after: str | None = None) -> list[Batch]:
    """A page of a tenant's batches, newest first, behind the batch `after`. Raises NotFound for that one."""
    last = None if after is None else find_batch(connection, tenant_id=tenant_id, batch_id=after)
    return _page(connection, select(batches).where(batches.c.tenant_id == tenant_id), last, limit)


def _page(connection: Connection, query: Select[Any], behind: Batch | None, limit: int) -> list[Batch]:
    if behind is not None:
        position = tuple_(batches.c.created_at, batches.c.batch_id)
        query = query.where(position < (to_micros(behind.created_at), behind.batch_id))
    query = query.order_by(batches.c.created_at.desc(), batches.c.batch_id.desc()).limit(limit)
    return [_batch(row) for row in connection.execute(query)]


def batches_of_all(
    connection: Connection,
    *,
    tenant_id: str | None = None,
    unfinished: bool = False,
    limit: int,
    behind: Batch | None = None,
) -> list[Batch]:
    """A page of the batches of all tenants, or of one, newest first, behind the batch `behind`."""
    query = select(batches)
    if tenant_id is not None:
        query = query.where(batches.c.tenant_id == tenant_id)
    if unfinished:
        query = query.where(batches.c.status.in_(UNFINISHED))
    return _page(connection, query, behind, limit)


def any_batch(connection: Connection, batch_id: str) -> Batch | None:
    """A batch of whichever tenant; None when there is none."""
    row = connection.execute(select(batches).where(batches.c.batch_id == batch_id)).first()
    return None if row is None else _batch(row)


def ask_to_cancel(connection: Connection, *, tenant_id: str, batch_id: str, now: datetime) -> Batch:
    """Have a batch cancelled.

    One that is being cancelled stays so. Raises NotFound; Conflict when it is too late.
    """
    _step(connection, batch_id, ("validating", "in_progress"), BatchStatus.CANCELLING, now, tenant_id=tenant_id)
    batch = find_batch(connection, tenant_id=tenant_id, batch_id=batch_id)
    if batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
        raise Conflict(f"Cannot cancel a batch with status '{batch.status}'.", hint="All of its requests are done.")
    return batch


# The runner's side


def open_batches(connection: Connection, site: str) -> list[Batch]:
    """The unfinished batches of a site, the most urgent first."""
    query = select(batches).where(batches.c.site == site, batches.c.status.in_(UNFINISHED))
    query = query.order_by(batches.c.expires_at, batches.c.created_at, batches.c.batch_id)
    return [_batch(row) for row in connection.execute(query)]


def fail_batch(connection: Connection, batch_id: str, errors: Sequence[LineError], now: datetime) -> bool:
    """The input cannot be worked on. False when the batch was being cancelled meanwhile; then it stays so."""
    encoded = msgspec.json.encode(errors).decode()
    return _step(connection, batch_id, ("validating", "in_progress"), BatchStatus.FAILED, now, errors=encoded)


def start_batch(connection: Connection, batch_id: str, *, total: int, model: str | None, now: datetime) -> bool:
    """The input is in order: `total` lines. False when the batch was being cancelled meanwhile."""
    return _step(connection, batch_id, ("validating",), BatchStatus.IN_PROGRESS, now, total=total, model=model)


def note_counts(connection: Connection, batch_id: str, counts: LineCounts) -> None:
    """How far the batch has come."""
    connection.execute(update(batches).where(batches.c.batch_id == batch_id).values(**msgspec.structs.asdict(counts)))


def seal_batch(connection: Connection, batch: Batch, outcome: BatchStatus, counts: LineCounts, now: datetime) -> Batch:
    """All lines are done or given up: write down what the batch becomes, and give it as it is then.

    A batch that is being cancelled meanwhile becomes cancelled. One that is sealed stays as it is.
    """
    values = {"outcome": outcome.value, **msgspec.structs.asdict(counts)}
    if outcome is not BatchStatus.CANCELLED:
        _step(connection, batch.batch_id, ("in_progress",), BatchStatus.FINALIZING, now, **values)
    connection.execute(
        update(batches)
        .where(
            batches.c.batch_id == batch.batch_id,
            batches.c.status == BatchStatus.CANCELLING.value,
            batches.c.outcome.is_(None),
        )
        .values(values | {"outcome": BatchStatus.CANCELLED.value})
    )
    return find_batch(connection, tenant_id=batch.tenant_id, batch_id=batch.batch_id)


def finish_batch(
    connection: Connection,
    batch: Batch,
    outcome: BatchStatus,
    counts: LineCounts,
    *,
    output: File | None,
    error: File | None,
    now: datetime,
) -> bool:
    """The batch is over, and its files are there.

    May be repeated after a kill; False when it was over already.
    """
    for file in (output, error):
        if file is not None:
            add_output(connection, file)
    return _step(
        connection,
        batch.batch_id,
        ("finalizing", "cancelling"),
        outcome,
        now,
        output_file_id=None if output is None else output.file_id,
        error_file_id=None if error is None else error.file_id,
        **msgspec.structs.asdict(counts),
    )


def _step(
    connection: Connection,
    batch_id: str,
    leaving: Sequence[str],
    entering: BatchStatus,
    now: datetime,
    *,
    tenant_id: str | None = None,
    **values: object,
) -> bool:
    where = [batches.c.batch_id == batch_id, batches.c.status.in_(leaving)]
    if tenant_id is not None:
        where.append(batches.c.tenant_id == tenant_id)
    values |= {"status": entering.value, f"{entering.value}_at": to_micros(now)}
    return connection.execute(update(batches).where(*where).values(**values)).rowcount == 1


_INSTANTS = ("created", "expires", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
_decode_errors = msgspec.json.Decoder(tuple[LineError, ...]).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str]).decode


def _batch(row: Row[Any]) -> Batch:
    values: dict[str, Any] = dict(row._mapping)
    for name in (*_INSTANTS, "cancelled"):
        micros = values[f"{name}_at"]
        values[f"{name}_at"] = None if micros is None else from_micros(micros)
    values["counts"] = LineCounts(**{name: values.pop(name) for name in LineCounts.__struct_fields__})
    values["status"] = BatchStatus(row.status)
    values["outcome"] = None if row.outcome is None else BatchStatus(row.outcome)
    values["errors"] = () if row.errors is None else _decode_errors(row.errors)
    values["metadata"] = None if row.metadata is None else _decode_metadata(row.metadata)
    return Batch(**values)
