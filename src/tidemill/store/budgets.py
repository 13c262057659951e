"""Budgets: what was spent of them, and the slices that gateways may spend unasked.

What was spent is kept for each day or month.

Invariant, kept by every function here: for each budget and period, what is spent and what is out on leases are
together never more than the budget (as it was when the lease was given). What is spent is the sum of the charges of
the usage records that the budget binds and that were begun in the period, so it can be checked at any time.
"""

from collections.abc import Sequence

import msgspec
import structlog
from sqlalchemy import ColumnElement, Connection, and_, case, delete, func, insert, or_, select, update

from tidemill.clock import to_micros
from tidemill.ledger.limits import BudgetSpan, Limit, LimitKind, Per, span_labelled, span_of
from tidemill.ledger.money import Nanos, format_amount
from tidemill.ledger.usage import UsageRecord
from tidemill.store.accounts import tenant_balance
from tidemill.store.bulk import dialect_insert
from tidemill.store.engine import store_time
from tidemill.store.limits import limit_of
from tidemill.store.record_components import CHARGE
from tidemill.store.revision import bump_revision
from tidemill.store.tables.limits import budget_leases, budgets, limits
from tidemill.store.tables.tenants import keys
from tidemill.store.tables.usage import usage_records

log = structlog.get_logger()


class BudgetPeriod(msgspec.Struct, frozen=True):
    """One period of one budget."""

    limit_id: str
    span: BudgetSpan


def extend_budget_lease(connection: Connection, *, worker_id: str, period: BudgetPeriod, need: int, slices: int) -> int:
    """Lease `need` nanos more to a worker, or a `slices`-th of what is free if that is more.

    All that is free at the most. Returns the nanos granted, 0 when the budget is used up; a budget that was removed
    binds nobody any more.
    """
    limit, spent = _locked(connection, period)
    if limit is None:
        return need
    free = limit.amount - spent - _leased(connection, period)
    granted = min(max(need, free // slices), free)
    if granted <= 0:
        return 0
    there = _lease_of(worker_id, period)
    more = update(budget_leases).where(there).values(amount=budget_leases.c.amount + granted)
    if connection.execute(more).rowcount == 0:
        connection.execute(
            insert(budget_leases).values(
                worker_id=worker_id, limit_id=period.limit_id, period=period.span.label, amount=granted
            )
        )
    return granted


def return_budget_lease(connection: Connection, *, worker_id: str, period: BudgetPeriod, amount: int) -> None:
    """Take `amount` nanos of a lease back, as they were returned or spent; never below zero."""
    left = case((budget_leases.c.amount > amount, budget_leases.c.amount - amount), else_=0)
    connection.execute(update(budget_leases).where(_lease_of(worker_id, period)).values(amount=left))


def release_budgets(connection: Connection, worker_id: str) -> None:
    """Give back all that a worker leased of budgets. Only once its log was drained."""
    connection.execute(delete(budget_leases).where(budget_leases.c.worker_id == worker_id))


def charge_budgets(connection: Connection, worker_id: str, records: Sequence[UsageRecord], *, zone: str) -> None:
    """Book the charges of new records, which are stored already, on the budgets that bind them.

    A warning is given once when the soft limit of a budget is reached: in the log, and to the gateways.
    """
    charged = {record.tenant_id for record in records if record.charge}
    if not charged:
        return
    binding = _budgets_of(connection, charged)
    if not binding:
        return
    lines = _first_keys(connection, charged)
    spent: dict[tuple[str, str], int] = {}
    spans: dict[tuple[str, str], tuple[Limit, BudgetPeriod]] = {}
    current: dict[Per, BudgetSpan] = {}
    for record in records:
        for limit in binding.get(record.tenant_id, ()):
            if not record.charge or not limit.binds(lines.get(record.key_id, record.key_id), record.model):
                continue
            assert limit.per is not None
            span = current.get(limit.per)
            if span is None or not span.start <= record.started_at < span.end:
                span = current[limit.per] = span_of(record.started_at, limit.per, zone)
            place = (limit.limit_id, span.label)
            spent[place] = spent.get(place, 0) + record.charge
            spans[place] = (limit, BudgetPeriod(limit.limit_id, span))
    for place in sorted(spent):  # in one order, so that two writers never wait for each other in a ring
        limit, period = spans[place]
        there = (budgets.c.limit_id == period.limit_id, budgets.c.period == period.span.label)
        more = update(budgets).where(*there).values(spent=budgets.c.spent + spent[place])
        if connection.execute(more).rowcount == 0 and not _open(connection, limit, period):
            connection.execute(more)  # another process has opened it meanwhile, and could not see these records
        return_budget_lease(connection, worker_id=worker_id, period=period, amount=spent[place])
        _warn(connection, limit, period)


def spent_in(connection: Connection, limit: Limit, span: BudgetSpan) -> int:
    """What was spent of a budget in a period, in nanos."""
    query = select(budgets.c.spent).where(budgets.c.limit_id == limit.limit_id, budgets.c.period == span.label)
    kept = connection.execute(query).scalar()
    return int(kept) if kept is not None else _sum_of_records(connection, limit, span)


def leased_in(connection: Connection, limit: Limit, span: BudgetSpan) -> int:
    """What of a budget is out on leases."""
    return _leased(connection, BudgetPeriod(limit.limit_id, span))


def warned(connection: Connection) -> frozenset[tuple[str, str]]:
    """The budgets, by limit id and period, whose soft limit was reached."""
    query = select(budgets.c.limit_id, budgets.c.period).where(budgets.c.warned_at.is_not(None))
    return frozenset((row.limit_id, row.period) for row in connection.execute(query))


def verify_budgets(connection: Connection, *, zone: str) -> list[str]:
    """Say of which periods what is kept is not the sum of their records; nothing if all is well.

    `zone`: the installation's.
    """
    wrong = []
    query = select(limits, budgets.c.period, budgets.c.spent).join(budgets, budgets.c.limit_id == limits.c.limit_id)
    for row in connection.execute(query.order_by(limits.c.limit_id, budgets.c.period)):
        limit = limit_of(row)
        assert limit.per is not None
        kept, summed = int(row.spent), _sum_of_records(connection, limit, span_labelled(row.period, limit.per, zone))
        if kept != summed:
            wrong.append(
                f"budget {limit.limit_id} in {row.period}: {format_amount(Nanos(kept))} are stored as spent, but its"
                f" usage records add up to {format_amount(Nanos(summed))}"
            )
    return wrong


def _locked(connection: Connection, period: BudgetPeriod) -> tuple[Limit | None, int]:
    """The limit and what was spent of it, which nobody else changes until the commit."""
    row = connection.execute(select(limits).where(limits.c.limit_id == period.limit_id)).first()
    if row is None:
        return None, 0
    limit = limit_of(row)
    query = (
        select(budgets.c.spent)
        .where(budgets.c.limit_id == period.limit_id, budgets.c.period == period.span.label)
        .with_for_update()
    )
    spent = connection.execute(query).scalar()
    if spent is None:
        _open(connection, limit, period)
        spent = connection.execute(query).scalar_one()
    return limit, int(spent)


def _open(connection: Connection, limit: Limit, period: BudgetPeriod) -> bool:
    """Begin a period of a budget with what its records say; False when it was begun already.

    The tenant's account is locked first, as the loader does before it stores records: so what it stores at the same
    time is either seen here, or finds the budget open.
    """
    tenant_balance(connection, limit.tenant_id, lock=True)
    opening = dialect_insert(connection, budgets).values(
        limit_id=limit.limit_id, period=period.span.label, spent=_sum_of_records(connection, limit, period.span)
    )
    # Told by the row itself: what a driver says of the number of rows inserted is not to be relied upon.
    return connection.execute(opening.on_conflict_do_nothing().returning(budgets.c.limit_id)).first() is not None


def _sum_of_records(connection: Connection, limit: Limit, span: BudgetSpan) -> int:
    columns = usage_records.c
    query = select(func.sum(CHARGE)).where(
        columns.tenant_id == limit.tenant_id,
        columns.finished_at >= to_micros(span.start),  # for the index: what began in it cannot have ended before
        columns.started_at >= to_micros(span.start),
        columns.started_at < to_micros(span.end),
    )
    if limit.model is not None:
        query = query.where(columns.model == limit.model)
    if limit.key_id is not None:
        line = select(keys.c.key_id).where(or_(keys.c.key_id == limit.key_id, keys.c.line_id == limit.key_id))
        query = query.where(columns.key_id.in_(line))
    return int(connection.execute(query).scalar() or 0)


def _leased(connection: Connection, period: BudgetPeriod) -> int:
    query = select(func.sum(budget_leases.c.amount)).where(
        budget_leases.c.limit_id == period.limit_id, budget_leases.c.period == period.span.label
    )
    return int(connection.execute(query).scalar() or 0)


def _lease_of(worker_id: str, period: BudgetPeriod) -> ColumnElement[bool]:
    return and_(
        budget_leases.c.worker_id == worker_id,
        budget_leases.c.limit_id == period.limit_id,
        budget_leases.c.period == period.span.label,
    )


def _budgets_of(connection: Connection, tenant_ids: set[str]) -> dict[str, list[Limit]]:
    query = select(limits).where(limits.c.kind == LimitKind.BUDGET.value, limits.c.tenant_id.in_(tenant_ids))
    found: dict[str, list[Limit]] = {}
    for row in connection.execute(query):
        found.setdefault(row.tenant_id, []).append(limit_of(row))
    return found


def _first_keys(connection: Connection, tenant_ids: set[str]) -> dict[str, str]:
    """The first key of their line, by key id, for keys that are not the first themselves."""
    query = select(keys.c.key_id, keys.c.line_id).where(keys.c.tenant_id.in_(tenant_ids), keys.c.line_id.is_not(None))
    return {row.key_id: row.line_id for row in connection.execute(query)}


def _warn(connection: Connection, limit: Limit, period: BudgetPeriod) -> None:
    soft = limit.soft_amount
    if soft is None:
        return
    there = (budgets.c.limit_id == period.limit_id, budgets.c.period == period.span.label)
    reached = (*there, budgets.c.warned_at.is_(None), budgets.c.spent >= soft)
    now = int(store_time(connection) * 1_000_000)
    if connection.execute(update(budgets).where(*reached).values(warned_at=now)).rowcount == 0:
        return
    bump_revision(connection)
    spent = connection.execute(select(budgets.c.spent).where(*there)).scalar_one()
    log.warning(
        "a budget's soft limit is reached",
        limit=limit.limit_id,
        tenant=limit.tenant_id,
        key=limit.key_id,
        model=limit.model,
        period=period.span.label,
        spent=format_amount(spent),
        budget=format_amount(limit.amount),
        soft_percent=limit.soft_percent,
    )
