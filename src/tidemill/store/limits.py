"""Limits: set, listed, removed.

What gateways have taken of them is in `store.limit_leases` and `store.budgets`.
"""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, delete, insert, select, update

from tidemill.clock import to_micros
from tidemill.errors import NotFound
from tidemill.ledger.limits import Limit, LimitKind, Per
from tidemill.store.ids import new_id
from tidemill.store.revision import bump_revision
from tidemill.store.tables.limits import budget_leases, budgets, limits, rate_shares, slot_shares
from tidemill.suggestions import did_you_mean


def set_limit(connection: Connection, wanted: Limit, *, now: datetime) -> Limit:
    """Put a limit in force.

    One on the same scope and of the same kind is changed; what was used of it goes on.

    The id of `wanted` is not looked at. Returns the limit as it is now.
    """
    scope = _scope(wanted)
    row = connection.execute(select(limits.c.limit_id).where(limits.c.scope == scope)).first()
    limit = msgspec.structs.replace(wanted, limit_id=row.limit_id if row is not None else new_id("lim"))
    if row is not None:
        connection.execute(
            update(limits)
            .where(limits.c.limit_id == limit.limit_id)
            .values(amount=limit.amount, soft_percent=limit.soft_percent)
        )
        # The next charge warns anew, if the new figures are a reason to.
        connection.execute(update(budgets).where(budgets.c.limit_id == limit.limit_id).values(warned_at=None))
    else:
        connection.execute(
            insert(limits).values(
                limit_id=limit.limit_id,
                tenant_id=limit.tenant_id,
                key_id=limit.key_id,
                model=limit.model,
                kind=limit.kind.value,
                per=limit.per.value if limit.per else None,
                amount=limit.amount,
                soft_percent=limit.soft_percent,
                scope=scope,
                created_at=to_micros(now),
            )
        )
    bump_revision(connection)
    return limit


def list_limits(connection: Connection, tenant_id: str | None = None, *, budgets_only: bool = False) -> list[Limit]:
    """The limits of a tenant, or of all, in the order in which they were made."""
    query = select(limits).order_by(limits.c.tenant_id, limits.c.created_at, limits.c.scope)
    if tenant_id is not None:
        query = query.where(limits.c.tenant_id == tenant_id)
    if budgets_only:
        query = query.where(limits.c.kind == LimitKind.BUDGET.value)
    return [limit_of(row) for row in connection.execute(query)]


def find_limit(connection: Connection, limit_id: str) -> Limit:
    """The limit of this id. Raises NotFound, with the nearest id if there is one."""
    row = connection.execute(select(limits).where(limits.c.limit_id == limit_id)).first()
    if row is None:
        known = [str(found) for found in connection.execute(select(limits.c.limit_id)).scalars()]
        hint = did_you_mean(limit_id, known) or "`tidemill limit list` shows them."
        raise NotFound(f"There is no limit {limit_id!r}.", hint=hint, param="limit")
    return limit_of(row)


def remove_limit(connection: Connection, limit_id: str) -> Limit:
    """Take a limit out of force, and forget what was used of it. Raises NotFound."""
    limit = find_limit(connection, limit_id)
    # The limit first: gateways lock it before they touch its shares.
    for table in (limits, rate_shares, slot_shares, budgets, budget_leases):
        connection.execute(delete(table).where(table.c.limit_id == limit_id))
    bump_revision(connection)
    return limit


def limit_of(row: Row[Any]) -> Limit:
    """A row of `limits` as a value."""
    return Limit(
        limit_id=row.limit_id,
        tenant_id=row.tenant_id,
        kind=LimitKind(row.kind),
        amount=row.amount,
        key_id=row.key_id,
        model=row.model,
        per=Per(row.per) if row.per else None,
        soft_percent=row.soft_percent,
    )


def _scope(limit: Limit) -> str:
    return "/".join((limit.tenant_id, limit.kind, limit.per or "", limit.key_id or "", limit.model or ""))
