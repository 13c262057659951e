"""Nodes and devices that the operator has taken out of the fleet, until they are put back."""

from datetime import datetime

from sqlalchemy import Connection, delete, select

from tidemill.clock import to_micros
from tidemill.store.bulk import dialect_insert
from tidemill.store.tables.fleet import drained


def read_drained(connection: Connection) -> dict[str, str]:
    """What was taken out, and why."""
    return {row.name: row.why for row in connection.execute(select(drained.c.name, drained.c.why))}


def drain(connection: Connection, name: str, why: str, now: datetime) -> None:
    """Take a node or a device out; once more only changes the reason."""
    statement = dialect_insert(connection, drained).values(name=name, why=why, at=to_micros(now))
    connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"why": why}))


def undrain(connection: Connection, name: str) -> bool:
    """Put it back; False when it was not taken out."""
    return connection.execute(delete(drained).where(drained.c.name == name)).rowcount > 0
