"""What gateway processes have of the limits per minute and of the concurrency limits.

Reports in, grants out.

One transaction serves any number of limits. Each limit's row is locked first, in the order of their ids, so that two
processes decide one after the other and never wait for each other in a ring.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, Table, bindparam, delete, insert, select, update

from tidemill.ledger import slots, windows
from tidemill.ledger.slots import SlotGrant, SlotReport
from tidemill.ledger.windows import RateGrant, RateReport
from tidemill.store.engine import store_time
from tidemill.store.tables.limits import limits, rate_shares, slot_shares

_decode_booked = msgspec.json.Decoder(dict[int, int]).decode


class LimitReply(msgspec.Struct, frozen=True):
    """The store's answers. A limit that was removed has none."""

    time: float
    """The store's clock, seconds since 1970 UTC."""
    rates: dict[str, RateGrant]
    slots: dict[str, SlotGrant]


def exchange(
    connection: Connection,
    worker_id: str,
    rates: Mapping[str, RateReport],
    slot_reports: Mapping[str, SlotReport],
) -> LimitReply:
    """Take a worker's reports, by limit id, and grant it what may be granted."""
    asked = sorted({*rates, *slot_reports})
    amounts = {
        row.limit_id: row.amount
        for row in connection.execute(
            select(limits.c.limit_id, limits.c.amount)
            .where(limits.c.limit_id.in_(asked))
            .order_by(limits.c.limit_id)
            .with_for_update()  # SQLite's BEGIN IMMEDIATE has locked the whole file already
        )
    }
    time = store_time(connection)  # once the locks are held, as waiting for them may take a while
    second = int(time)
    return LimitReply(
        time,
        _exchange_rates(connection, worker_id, {id: rates[id] for id in rates if id in amounts}, amounts, second),
        _exchange_slots(
            connection, worker_id, {id: slot_reports[id] for id in slot_reports if id in amounts}, amounts, second
        ),
    )


def _exchange_rates(
    connection: Connection,
    worker_id: str,
    reports: Mapping[str, RateReport],
    amounts: Mapping[str, int],
    second: int,
) -> dict[str, RateGrant]:
    if not reports:
        return {}
    others: dict[str, list[dict[int, int]]] = {limit_id: [] for limit_id in reports}
    present: set[str] = set()
    past: list[tuple[str, str]] = []
    for row in connection.execute(select(rate_shares).where(rate_shares.c.limit_id.in_(list(reports)))):
        if row.worker_id == worker_id:
            present.add(row.limit_id)
            continue
        booked = _decode_booked(row.booked)
        if windows.in_force(booked, second):
            others[row.limit_id].append(booked)
        else:
            past.append((row.limit_id, row.worker_id))
    answers: dict[str, RateGrant] = {}
    rows: dict[str, dict[str, Any] | None] = {}
    for limit_id, report in reports.items():
        answer = answers[limit_id] = windows.grant(amounts[limit_id], others[limit_id], report, second)
        kept = msgspec.structs.replace(report, held=report.held + answer.granted)
        booked = windows.booked_of(kept, answer.valid)
        rows[limit_id] = {"booked": msgspec.json.encode(booked).decode()} if booked else None
    _write_rows(connection, rate_shares, worker_id, present, rows)
    for limit_id, gone in past:
        connection.execute(
            delete(rate_shares).where(rate_shares.c.limit_id == limit_id, rate_shares.c.worker_id == gone)
        )
    return answers


def _exchange_slots(
    connection: Connection,
    worker_id: str,
    reports: Mapping[str, SlotReport],
    amounts: Mapping[str, int],
    second: int,
) -> dict[str, SlotGrant]:
    if not reports:
        return {}
    others: dict[str, list[tuple[int, int]]] = {limit_id: [] for limit_id in reports}
    present: set[str] = set()
    for row in connection.execute(select(slot_shares).where(slot_shares.c.limit_id.in_(list(reports)))):
        if row.worker_id == worker_id:
            present.add(row.limit_id)
        elif row.valid >= second:
            others[row.limit_id].append((row.slots, row.used))
    answers: dict[str, SlotGrant] = {}
    rows: dict[str, dict[str, Any] | None] = {}
    for limit_id, report in reports.items():
        answer = answers[limit_id] = slots.grant(amounts[limit_id], others[limit_id], report, second)
        leased = report.keep + answer.granted
        used = min(report.used + report.need, leased)
        row_of = {"slots": leased, "used": used, "valid": answer.valid}
        rows[limit_id] = row_of if leased or report.used else None
    _write_rows(connection, slot_shares, worker_id, present, rows)
    return answers


def _write_rows(
    connection: Connection,
    table: Table,
    worker_id: str,
    present: set[str],
    rows: Mapping[str, dict[str, Any] | None],
) -> None:
    """Give each limit's row of this worker its new values, or remove it (None)."""
    this = (table.c.limit_id == bindparam("of_limit"), table.c.worker_id == worker_id)
    fresh = [
        {"limit_id": limit_id, "worker_id": worker_id, **values}
        for limit_id, values in rows.items()
        if values is not None and limit_id not in present
    ]
    changed = [
        {"of_limit": limit_id, **values}
        for limit_id, values in rows.items()
        if values is not None and limit_id in present
    ]
    empty = [{"of_limit": limit_id} for limit_id, values in rows.items() if values is None and limit_id in present]
    if fresh:
        connection.execute(insert(table), fresh)
    if changed:
        names = changed[0].keys() - {"of_limit"}
        connection.execute(update(table).where(*this).values({name: bindparam(name) for name in names}), changed)
    if empty:
        connection.execute(delete(table).where(*this), empty)


def release_slots(connection: Connection, worker_id: str) -> None:
    """Free the slots of a worker that is gone.

    What it spent of limits per minute goes on counting for its minute.
    """
    connection.execute(delete(slot_shares).where(slot_shares.c.worker_id == worker_id))


def rates_in_force(connection: Connection, second: int) -> dict[str, int]:
    """What counts against each limit per minute in this second, by limit id.

    Permits that gateways hold included.
    """
    used: dict[str, int] = {}
    for row in connection.execute(select(rate_shares.c.limit_id, rate_shares.c.booked)):
        used[row.limit_id] = used.get(row.limit_id, 0) + windows.in_force(_decode_booked(row.booked), second)
    return used


def slots_in_use(connection: Connection, second: int) -> dict[str, int]:
    """Requests that are open on each concurrency limit, by limit id, as of the gateways' last reports."""
    used: dict[str, int] = {}
    query = select(slot_shares.c.limit_id, slot_shares.c.used).where(slot_shares.c.valid >= second)
    for row in connection.execute(query):
        used[row.limit_id] = used.get(row.limit_id, 0) + row.used
    return used
