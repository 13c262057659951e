"""The revision: a counter that rises with each change that gateways must see (tenants, keys, prices)."""

from sqlalchemy import BigInteger, Connection, String, cast, insert, select, update

from tidemill.store.tables.tenants import settings


def current_revision(connection: Connection) -> int:
    """The installation's revision; 0 for a new store."""
    value = connection.execute(select(settings.c.value).where(settings.c.name == "revision")).scalar()
    return int(value) if value is not None else 0


def bump_revision(connection: Connection) -> int:
    """Raise the revision inside the caller's write transaction and return the new one.

    In one statement, so that two changes at a time raise it twice.
    """
    raised = cast(cast(settings.c.value, BigInteger) + 1, String)
    changed = connection.execute(update(settings).where(settings.c.name == "revision").values(value=raised))
    if changed.rowcount == 0:
        connection.execute(insert(settings).values(name="revision", value="1"))
    return current_revision(connection)


def get_setting(connection: Connection, name: str) -> str | None:
    """A fact of the installation, or None while it is not set."""
    return connection.execute(select(settings.c.value).where(settings.c.name == name)).scalar()


def set_setting(connection: Connection, name: str, value: str) -> None:
    """Write a fact of the installation."""
    changed = connection.execute(update(settings).where(settings.c.name == name).values(value=value))
    if changed.rowcount == 0:
        connection.execute(insert(settings).values(name=name, value=value))
