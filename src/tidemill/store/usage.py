"""Usage records: stored once, by request id, together with the charge that they cause."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, func, select, tuple_

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.invoice import LineSum, MonthUsage, TokenKind
from tidemill.ledger.money import Nanos
from tidemill.ledger.period import Period
from tidemill.ledger.posting import Transaction, charge_batches, usage_charge
from tidemill.ledger.statement import UsageTotals
from tidemill.ledger.usage import LINE_PREFIX, RequestStatus, TokenUsage, UsageRecord
from tidemill.store.accounts import post
from tidemill.store.bulk import insert_rows
from tidemill.store.device_meters import device_sums
from tidemill.store.ids import new_id
from tidemill.store.tables.usage import usage_records

IN_CHUNK = 500
"""How many ids one IN (...) carries; SQLite's limit is far higher, PostgreSQL's planner likes it short."""


def known_requests(connection: Connection, request_ids: Sequence[str]) -> set[str]:
    """Which of these requests have a record already."""
    known: set[str] = set()
    for at in range(0, len(request_ids), IN_CHUNK):
        part = request_ids[at : at + IN_CHUNK]
        rows = connection.execute(select(usage_records.c.request_id).where(usage_records.c.request_id.in_(part)))
        known.update(rows.scalars())
    return known


def store_records(connection: Connection, records: Iterable[UsageRecord], *, zone: str) -> list[UsageRecord]:
    """Store records and post their charges; records that are stored already, or come twice, are passed over.

    Of the attempts at a batch's line the first that gave an answer is kept, and until then the last that gave none.
    One transaction of the ledger covers the records of a tenant and month in this batch, and each record names it.
    Returns the records that were new.
    """
    unique: dict[str, UsageRecord] = {}
    for record in records:
        unique[record.request_id] = _newer(unique.get(record.request_id), record)
    known = known_requests(connection, list(unique))
    fresh = [record for request_id, record in unique.items() if request_id not in known]
    fresh += _replacing(connection, [unique[request_id] for request_id in known])
    rows: list[tuple[Any, ...]] = []
    charges: list[Transaction] = []
    for batch in charge_batches(fresh, zone).values():
        transaction = usage_charge(new_id("txn"), batch, memo=f"{len(batch)} requests")
        if transaction is not None:
            charges.append(transaction)
        rows.extend(_row(record, transaction.transaction_id if transaction else None) for record in batch)
    post(connection, *charges)
    insert_rows(connection, usage_records, rows)
    return fresh


def _newer(earlier: UsageRecord | None, record: UsageRecord) -> UsageRecord:
    """Which of two records of a request counts, while neither is stored."""
    if earlier is None or not record.request_id.startswith(LINE_PREFIX):
        return record
    return record.after(earlier) if earlier.repeatable else earlier


def _replacing(connection: Connection, records: Sequence[UsageRecord]) -> list[UsageRecord]:
    """Of records whose request is stored already, those that take that one's place, which is removed."""
    lines = {record.request_id: record for record in records if record.request_id.startswith(LINE_PREFIX)}
    replacing = []
    for at in range(0, len(lines), IN_CHUNK):
        part = list(lines)[at : at + IN_CHUNK]
        rows = connection.execute(select(usage_records).where(usage_records.c.request_id.in_(part))).all()
        for stored in map(_record, rows):
            record = lines[stored.request_id]
            if stored.repeatable and (stored.finished_at, stored.status) != (record.finished_at, record.status):
                replacing.append(record.after(stored))
    for at in range(0, len(replacing), IN_CHUNK):
        part = [record.request_id for record in replacing[at : at + IN_CHUNK]]
        connection.execute(delete(usage_records).where(usage_records.c.request_id.in_(part)))
    return replacing


def records_between(
    connection: Connection,
    *,
    tenant_id: str | None,
    start: datetime | None,
    end: datetime | None,
    model: str | None = None,
    after: tuple[datetime, str] | None = None,
    limit: int | None = None,
) -> Iterable[UsageRecord]:
    """The records that finished in [start, end), oldest first; of one tenant or of all.

    `after` is the (finished_at, request_id) of the last record of the page before, `limit` the length of a page.
    """
    query = select(usage_records)
    if start is not None:
        query = query.where(usage_records.c.finished_at >= to_micros(start))
    if end is not None:
        query = query.where(usage_records.c.finished_at < to_micros(end))
    if tenant_id is not None:
        query = query.where(usage_records.c.tenant_id == tenant_id)
    if model is not None:
        query = query.where(usage_records.c.model == model)
    if after is not None:
        position = tuple_(usage_records.c.finished_at, usage_records.c.request_id)
        query = query.where(position > (to_micros(after[0]), after[1]))
    if limit is not None:
        query = query.limit(limit)
    query = query.order_by(usage_records.c.finished_at, usage_records.c.request_id)
    for row in connection.execute(query):
        yield _record(row)


def usage_totals(
    connection: Connection, *, tenant_id: str, start: datetime | None = None, end: datetime | None = None
) -> list[tuple[str, UsageTotals]]:
    """The sums of a tenant's records by model, as the database adds them; of all time where no bound is given."""
    columns = usage_records.c
    query = select(
        columns.model,
        func.count().label("requests"),
        func.sum(columns.prompt_tokens).label("prompt"),
        func.sum(columns.cached_tokens).label("cached"),
        func.sum(columns.completion_tokens).label("completion"),
        func.sum(columns.charge_input + columns.charge_cached + columns.charge_output).label("charge"),
    ).where(columns.tenant_id == tenant_id)
    if start is not None:
        query = query.where(columns.finished_at >= to_micros(start))
    if end is not None:
        query = query.where(columns.finished_at < to_micros(end))
    return [
        (
            row.model,
            UsageTotals(
                requests=row.requests,
                prompt_tokens=int(row.prompt),
                cached_tokens=int(row.cached),
                completion_tokens=int(row.completion),
                charge=Nanos(int(row.charge)),
            ),
        )
        for row in connection.execute(query.group_by(columns.model))
    ]


class DeviceUse(msgspec.Struct, frozen=True):
    """What one tenant's use of one model came to in a window: an input of `ledger.costing.margin`."""

    tenant_id: str
    model: str
    currency: str
    charge: Nanos
    device_ns: int
    uncached: int = 0
    """Tokens of prompts that had to be computed."""
    cached: int = 0
    completion: int = 0


def device_use(connection: Connection, *, start: datetime, end: datetime) -> list[DeviceUse]:
    """Charges, device time and tokens of the records that finished in [start, end), by tenant, model and currency.

    Revenue belongs to the model that was asked for, device time and tokens to the one that served: a fallback earns
    for the other, and its machines, or who bills for its tokens, bear the cost.
    """
    columns = usage_records.c
    rows = connection.execute(
        select(
            columns.tenant_id,
            columns.model,
            columns.replica,
            columns.currency,
            func.sum(columns.charge_input + columns.charge_cached + columns.charge_output).label("charge"),
            func.sum(columns.device_ns).label("device_ns"),
            func.sum(columns.prompt_tokens - columns.cached_tokens).label("uncached"),
            func.sum(columns.cached_tokens).label("cached"),
            func.sum(columns.completion_tokens).label("completion"),
        )
        .where(columns.finished_at >= to_micros(start), columns.finished_at < to_micros(end))
        .group_by(columns.tenant_id, columns.model, columns.replica, columns.currency)
    )
    charges: dict[tuple[str, str, str], int] = {}
    worked: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        asked = (row.tenant_id, row.model, row.currency)
        served = (row.tenant_id, _model_of(row.replica) or row.model, row.currency)
        charges[asked] = charges.get(asked, 0) + int(row.charge)
        work = (row.device_ns, row.uncached, row.cached, row.completion)
        worked[served] = [sum(each) for each in zip(worked.get(served, _NO_WORK), map(int, work), strict=True)]
    return [
        DeviceUse(*key, Nanos(charges.get(key, 0)), *worked.get(key, _NO_WORK))
        for key in sorted(charges.keys() | worked.keys())
    ]


_NO_WORK = [0, 0, 0, 0]


def _model_of(replica: str) -> str:
    """The model that a replica runs: `NAME/INDEX`, and `#LIFE` where that is known."""
    return replica.partition("#")[0].rpartition("/")[0]


def batch_charge(connection: Connection, batch_id: str) -> Nanos:
    """What the lines of a batch have cost until now: the charges of the requests `BATCH_LINE`."""
    total = connection.execute(
        select(
            func.coalesce(
                func.sum(usage_records.c.charge_input + usage_records.c.charge_cached + usage_records.c.charge_output),
                0,
            )
        ).where(
            # The range is for the index; the order of a locale may have others within it.
            usage_records.c.request_id.between(f"{batch_id}_0", f"{batch_id}_99999999"),
            usage_records.c.request_id.startswith(f"{batch_id}_", autoescape=True),
        )
    ).scalar_one()
    return Nanos(int(total))


def month_usage(connection: Connection, *, tenant_id: str, currency: str, period: Period) -> MonthUsage:
    """The sums of a month by model, price and kind of token, as the database adds them: what an invoice is made of."""
    columns = usage_records.c
    within = (
        columns.tenant_id == tenant_id,
        columns.finished_at >= to_micros(period.start),
        columns.finished_at < to_micros(period.end),
    )
    parts = {
        TokenKind.INPUT: (columns.prompt_tokens - columns.cached_tokens, columns.charge_input),
        TokenKind.CACHED_INPUT: (columns.cached_tokens, columns.charge_cached),
        TokenKind.OUTPUT: (columns.completion_tokens, columns.charge_output),
    }
    sums = [
        LineSum(row.model, row.price_id, kind, int(row.tokens), Nanos(int(row.amount)), row.requests)
        for kind, (tokens, amount) in parts.items()
        for row in connection.execute(
            select(
                columns.model,
                columns.price_id,
                func.sum(tokens).label("tokens"),
                func.sum(amount).label("amount"),
                func.count().label("requests"),
            )
            .where(*within, (tokens != 0) | (amount != 0))
            .group_by(columns.model, columns.price_id)
        )
    ]
    whole = connection.execute(select(func.count(), func.sum(columns.uncollected)).where(*within)).one()
    return MonthUsage(
        tenant_id=tenant_id,
        currency=currency,
        period=period,
        requests=whole[0],
        uncollected=Nanos(int(whole[1] or 0)),
        sums=tuple(sums),
        devices=tuple(device_sums(connection, tenant_id=tenant_id, month=period.month)),
    )


def _row(record: UsageRecord, transaction_id: str | None) -> tuple[Any, ...]:
    """In the order of the table's columns."""
    usage, first_token_at = record.usage, record.first_token_at
    return (
        record.request_id,
        record.tenant_id,
        record.key_id,
        record.model,
        record.replica,
        usage.prompt,
        usage.cached,
        usage.completion,
        record.estimated,
        record.status.value,
        record.streamed,
        record.price_id,
        record.currency,
        record.charge_input,
        record.charge_cached,
        record.charge_output,
        record.uncollected,
        record.hold,
        to_micros(record.started_at),
        None if first_token_at is None else to_micros(first_token_at),
        to_micros(record.finished_at),
        record.device_ns,
        transaction_id,
    )


def _record(row: Row[Any]) -> UsageRecord:
    return UsageRecord(
        request_id=row.request_id,
        tenant_id=row.tenant_id,
        key_id=row.key_id,
        model=row.model,
        replica=row.replica,
        usage=TokenUsage(row.prompt_tokens, row.cached_tokens, row.completion_tokens),
        estimated=row.estimated,
        status=RequestStatus(row.status),
        streamed=row.streamed,
        price_id=row.price_id,
        currency=row.currency,
        charge_input=Nanos(row.charge_input),
        charge_cached=Nanos(row.charge_cached),
        charge_output=Nanos(row.charge_output),
        uncollected=Nanos(row.uncollected),
        hold=Nanos(row.hold),
        started_at=from_micros(row.started_at),
        first_token_at=None if row.first_token_at is None else from_micros(row.first_token_at),
        finished_at=from_micros(row.finished_at),
        device_ns=row.device_ns,
    )
