"""Tenants: who pays."""

from datetime import datetime

import msgspec
from sqlalchemy import Connection, Row, insert, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.errors import BadInput, Conflict, NotFound
from tidemill.ledger.money import check_currency
from tidemill.store.ids import new_id
from tidemill.store.revision import bump_revision
from tidemill.store.tables.tenants import tenants
from tidemill.suggestions import did_you_mean

MAX_NAME = 128
MAX_WEIGHT = 1000


class Tenant(msgspec.Struct, frozen=True):
    """A customer with a balance and keys of their own. All of a tenant's money is in one currency."""

    tenant_id: str
    name: str
    currency: str
    created_at: datetime
    weight: int = 1
    """Its share when a model is full, relative to the others'."""


def check_name(kind: str, name: str) -> str:
    """Return `name` stripped, or raise BadInput when it is empty, too long or has control characters."""
    name = name.strip()
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise BadInput(f"{name!r} is not a valid {kind} name; use 1 to {MAX_NAME} printable characters.", param="name")
    return name


def create_tenant(connection: Connection, *, name: str, currency: str, now: datetime) -> Tenant:
    """Add a tenant.

    Raises Conflict when the name is taken, BadInput or MoneyError when a value is unusable.
    """
    name = check_name("tenant", name)
    check_currency(currency)
    if connection.execute(select(tenants.c.tenant_id).where(tenants.c.name == name)).first():
        raise Conflict(f"There is already a tenant named {name!r}.", hint="Choose another name.", param="name")
    tenant = Tenant(tenant_id=new_id("ten"), name=name, currency=currency, created_at=now)
    connection.execute(
        insert(tenants).values(
            tenant_id=tenant.tenant_id, name=name, currency=currency, created_at=to_micros(tenant.created_at)
        )
    )
    bump_revision(connection)
    return tenant


def list_tenants(connection: Connection) -> list[Tenant]:
    """All tenants, oldest first."""
    rows = connection.execute(select(tenants).order_by(tenants.c.created_at, tenants.c.tenant_id))
    return [_tenant(row) for row in rows]


def find_tenant(connection: Connection, name: str) -> Tenant:
    """The tenant of that name or id. Raises NotFound, with the nearest name if there is one."""
    row = connection.execute(select(tenants).where((tenants.c.name == name) | (tenants.c.tenant_id == name))).first()
    if row is None:
        names = [str(found) for found in connection.execute(select(tenants.c.name)).scalars()]
        raise NotFound(f"There is no tenant {name!r}.", hint=did_you_mean(name, names), param="tenant")
    return _tenant(row)


def set_weight(connection: Connection, *, tenant_id: str, weight: int) -> None:
    """Give a tenant another share of full models. Raises BadInput."""
    if not 1 <= weight <= MAX_WEIGHT:
        raise BadInput(f"weight must be from 1 to {MAX_WEIGHT}, not {weight}.", param="weight")
    connection.execute(update(tenants).where(tenants.c.tenant_id == tenant_id).values(weight=weight))
    bump_revision(connection)


def _tenant(row: Row[tuple[object, ...]]) -> Tenant:
    values = row._mapping
    return Tenant(
        tenant_id=values["tenant_id"],
        name=values["name"],
        currency=values["currency"],
        created_at=from_micros(values["created_at"]),
        weight=values["weight"],
    )
