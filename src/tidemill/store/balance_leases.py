"""Leases: slices of a tenant's balance that a gateway process may spend without asking.

Invariant, kept by every function here, by the loader and by `store.device_meters`: for each tenant, the sum of the
leases and of what meters of device time hold is never more than the balance. So what all processes together promise is
never more than there is.
"""

from sqlalchemy import Connection, case, delete, func, insert, select, union, update

from tidemill.store.accounts import tenant_balance
from tidemill.store.budgets import release_budgets
from tidemill.store.limit_leases import release_slots
from tidemill.store.tables.limits import budget_leases, slot_shares
from tidemill.store.tables.money import leases
from tidemill.store.tables.usage import device_meters


def extend_lease(connection: Connection, *, worker_id: str, tenant_id: str, need: int, slices: int) -> int:
    """Lease `need` nanos more to a worker, or a `slices`-th of what is free if that is more.

    All that is free at the most. Returns the nanos granted, 0 when the balance is used up.
    """
    balance = tenant_balance(connection, tenant_id, lock=True)
    free = balance - leased(connection, tenant_id)
    granted = min(max(need, free // slices), free)
    if granted <= 0:
        return 0
    changed = connection.execute(
        update(leases)
        .where(leases.c.worker_id == worker_id, leases.c.tenant_id == tenant_id)
        .values(amount=leases.c.amount + granted)
    )
    if changed.rowcount == 0:
        connection.execute(insert(leases).values(worker_id=worker_id, tenant_id=tenant_id, amount=granted))
    return granted


def return_lease(connection: Connection, *, worker_id: str, tenant_id: str, amount: int) -> None:
    """Take `amount` nanos of a lease back, as they were returned or spent; never below zero."""
    # One statement: a value read before would be stale once the row's lock is had (PostgreSQL).
    connection.execute(
        update(leases)
        .where(leases.c.worker_id == worker_id, leases.c.tenant_id == tenant_id)
        .values(amount=case((leases.c.amount > amount, leases.c.amount - amount), else_=0))
    )


def release_worker(connection: Connection, worker_id: str) -> None:
    """Give back all that a worker leased: of balances, budgets and concurrency limits.

    Only once its log was drained: until then a lease holds what was spent.
    """
    connection.execute(delete(leases).where(leases.c.worker_id == worker_id))
    release_budgets(connection, worker_id)
    release_slots(connection, worker_id)


def leased(connection: Connection, tenant_id: str) -> int:
    """The nanos of a tenant's balance that are promised: out on leases, or held by meters of device time."""
    leasing = select(func.sum(leases.c.amount)).where(leases.c.tenant_id == tenant_id)
    holding = select(func.sum(device_meters.c.hold)).where(
        device_meters.c.tenant_id == tenant_id, device_meters.c.ended_at.is_(None)
    )
    return int(connection.execute(leasing).scalar() or 0) + int(connection.execute(holding).scalar() or 0)


def leasing_workers(connection: Connection) -> set[str]:
    """The workers that have a lease of any kind."""
    tables = (leases, budget_leases, slot_shares)
    every = union(*(select(table.c.worker_id) for table in tables))
    return {str(worker) for worker in connection.execute(every).scalars()}
