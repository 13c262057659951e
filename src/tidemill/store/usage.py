"""Usage records: stored once, by request id, together with the charge that they cause."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, func, select, tuple_

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.components import CACHED_INPUT, CATALOGUE, INPUT, OUTPUT, Component
from tidemill.ledger.invoice import LineSum, MonthUsage
from tidemill.ledger.money import Nanos
from tidemill.ledger.period import Period
from tidemill.ledger.posting import Transaction, charge_batches, usage_charge
from tidemill.ledger.statement import UsageTotals, component_sums
from tidemill.ledger.usage import LINE_PREFIX, RequestStatus, TokenUsage, UsageLabels, UsageRecord, charges_of
from tidemill.store.accounts import post
from tidemill.store.bulk import insert_rows
from tidemill.store.device_meters import device_sums
from tidemill.store.ids import new_id
from tidemill.store.record_components import (
    CHARGE,
    base_quantities,
    components_of,
    components_text,
    read_components,
    sum_components,
)
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
    """Store records and post their charges.

    Records that are stored already, or come twice, are passed over.

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
    """The sums of a tenant's records by model, as the database adds them.

    Of all time where no bound is given.
    """
    columns = usage_records.c
    where = [columns.tenant_id == tenant_id]
    if start is not None:
        where.append(columns.finished_at >= to_micros(start))
    if end is not None:
        where.append(columns.finished_at < to_micros(end))
    query = select(
        columns.model,
        func.count().label("requests"),
        func.sum(columns.prompt_tokens).label("prompt"),
        func.sum(columns.cached_tokens).label("cached"),
        func.sum(columns.completion_tokens).label("completion"),
        func.sum(CHARGE).label("charge"),
    ).where(*where)
    further: dict[str, dict[Component, tuple[int, int]]] = {}
    for row in sum_components(connection, *where, by=(columns.model,)):
        further.setdefault(row.group[0], {})[row.component] = (row.quantity, row.amount)
    return [
        (
            row.model,
            UsageTotals(
                requests=row.requests,
                prompt_tokens=int(row.prompt),
                cached_tokens=int(row.cached),
                completion_tokens=int(row.completion),
                charge=Nanos(int(row.charge)),
                more=component_sums(further.get(row.model, {})),
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
    quantities: dict[Component, int] = {}
    """What was used of each component; none is part of another."""


def device_use(connection: Connection, *, start: datetime, end: datetime) -> list[DeviceUse]:
    """Charges, device time and quantities of the records that finished in [start, end), by tenant, model and currency.

    Revenue belongs to the model that was asked for, device time and tokens to the one that served: a fallback earns
    for the other, and its machines, or who bills for its tokens, bear the cost.
    """
    columns = usage_records.c
    where = (columns.finished_at >= to_micros(start), columns.finished_at < to_micros(end))
    by = (columns.tenant_id, columns.model, columns.replica, columns.currency)
    rows = connection.execute(
        select(
            *by,
            func.sum(CHARGE).label("charge"),
            func.sum(columns.device_ns).label("device_ns"),
            func.sum(columns.prompt_tokens - columns.cached_tokens).label("uncached"),
            func.sum(columns.cached_tokens).label("cached"),
            func.sum(columns.completion_tokens).label("completion"),
        )
        .where(*where)
        .group_by(*by)
    )
    charges: dict[_Use, int] = {}
    device_ns: dict[_Use, int] = {}
    quantities: dict[_Use, dict[Component, int]] = {}
    for row in rows:
        asked = (row.tenant_id, row.model, row.currency)
        served = _served(row.tenant_id, row.model, row.replica, row.currency)
        charges[asked] = charges.get(asked, 0) + int(row.charge)
        device_ns[served] = device_ns.get(served, 0) + int(row.device_ns)
        sums = quantities.setdefault(served, {})
        for component, tokens in ((INPUT, row.uncached), (CACHED_INPUT, row.cached), (OUTPUT, row.completion)):
            sums[component] = sums.get(component, 0) + int(tokens)
    for each in sum_components(connection, *where, by=by):
        sums = quantities[_served(*each.group)]
        sums[each.component] = sums.get(each.component, 0) + each.quantity
        part_of = CATALOGUE[each.component].part_of
        if part_of is not None:
            sums[part_of] -= each.quantity
    return [
        DeviceUse(*key, Nanos(charges.get(key, 0)), device_ns.get(key, 0), quantities.get(key, {}))
        for key in sorted(charges.keys() | device_ns.keys())
    ]


_Use = tuple[str, str, str]
"""Tenant, model, currency."""


def _served(tenant_id: str, model: str, replica: str, currency: str) -> _Use:
    return tenant_id, _model_of(replica) or model, currency


def _model_of(replica: str) -> str:
    """The model that a replica runs: `NAME/INDEX`, and `#LIFE` where that is known."""
    return replica.partition("#")[0].rpartition("/")[0]


def batch_charge(connection: Connection, batch_id: str) -> Nanos:
    """What the lines of a batch have cost until now: the charges of the requests `BATCH_LINE`."""
    total = connection.execute(
        select(
            func.coalesce(func.sum(CHARGE), 0),
        ).where(
            # The range is for the index; the order of a locale may have others within it.
            usage_records.c.request_id.between(f"{batch_id}_0", f"{batch_id}_99999999"),
            usage_records.c.request_id.startswith(f"{batch_id}_", autoescape=True),
        )
    ).scalar_one()
    return Nanos(int(total))


def month_usage(connection: Connection, *, tenant_id: str, currency: str, period: Period) -> MonthUsage:
    """The sums of a month by model, price and component, as the database adds them.

    What an invoice is made of.
    """
    columns = usage_records.c
    within = (
        columns.tenant_id == tenant_id,
        columns.finished_at >= to_micros(period.start),
        columns.finished_at < to_micros(period.end),
    )
    amounts = {INPUT: columns.charge_input, CACHED_INPUT: columns.charge_cached, OUTPUT: columns.charge_output}
    sums = [
        LineSum(row.model, row.price_id, component, int(row.quantity), Nanos(int(row.amount)), row.requests)
        for component, quantity in base_quantities(connection).items()
        for row in connection.execute(
            select(
                columns.model,
                columns.price_id,
                func.sum(quantity).label("quantity"),
                func.sum(amounts[component]).label("amount"),
                func.count().label("requests"),
            )
            .where(*within, (quantity != 0) | (amounts[component] != 0))
            .group_by(columns.model, columns.price_id)
        )
    ]
    sums += [
        LineSum(row.group[0], row.group[1], row.component, row.apart, Nanos(row.amount), row.records_apart)
        for row in sum_components(connection, *within, by=(columns.model, columns.price_id))
        if row.records_apart
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
    usage, charges, first_token_at = record.usage, record.charges, record.first_token_at
    further = components_of(record)
    labels = record.labels or _NO_LABELS
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
        charges.get(INPUT, 0),
        charges.get(CACHED_INPUT, 0),
        charges.get(OUTPUT, 0),
        record.uncollected,
        record.hold,
        to_micros(record.started_at),
        None if first_token_at is None else to_micros(first_token_at),
        to_micros(record.finished_at),
        record.device_ns,
        transaction_id,
        sum(amount or 0 for _, amount in further.values()) if further else None,
        components_text(further),
        labels.service_class or None,
        labels.mode or None,
        labels.project or None,
        tags_text(labels.tags),
        labels.rule_id or None,
        record.list_amount,
    )


def tags_text(tags: tuple[str, ...]) -> str | None:
    """Tags in the form of their column; None when there are none."""
    return _encode_tags(tags).decode() if tags else None


_NO_LABELS = UsageLabels()
_encode_tags = msgspec.json.Encoder().encode
_decode_tags = msgspec.json.Decoder(tuple[str, ...]).decode


def _labels(row: Row[Any]) -> UsageLabels | None:
    labels = UsageLabels(
        row.service_class or "",
        row.mode or "",
        row.project or "",
        _decode_tags(row.tags) if row.tags else (),
        row.rule_id or "",
    )
    return None if labels == _NO_LABELS else labels


def _record(row: Row[Any]) -> UsageRecord:
    quantities, amounts = read_components(row.components)
    usage = TokenUsage(row.prompt_tokens, row.cached_tokens, row.completion_tokens, quantities)
    return UsageRecord(
        request_id=row.request_id,
        tenant_id=row.tenant_id,
        key_id=row.key_id,
        model=row.model,
        replica=row.replica,
        usage=usage,
        estimated=row.estimated,
        status=RequestStatus(row.status),
        streamed=row.streamed,
        price_id=row.price_id,
        currency=row.currency,
        charges=charges_of(usage, (row.charge_input, row.charge_cached, row.charge_output), amounts),
        uncollected=Nanos(row.uncollected),
        hold=Nanos(row.hold),
        started_at=from_micros(row.started_at),
        first_token_at=None if row.first_token_at is None else from_micros(row.first_token_at),
        finished_at=from_micros(row.finished_at),
        device_ns=row.device_ns,
        labels=_labels(row),
        list_amount=None if row.list_amount is None else Nanos(row.list_amount),
    )
