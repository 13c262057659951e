"""The revision: a counter that rises with each change that gateways must see (tenants, keys, prices)."""

from sqlalchemy import Connection, insert, select, update

from tidemill.store.schema import settings


def current_revision(connection: Connection) -> int:
    """The installation's revision; 0 for a new store."""
    value = connection.execute(select(settings.c.value).where(settings.c.name == "revision")).scalar()
    return int(value) if value is not None else 0


def bump_revision(connection: Connection) -> int:
    """Raise the revision inside the caller's write transaction and return the new one."""
    revision = current_revision(connection) + 1
    set_setting(connection, "revision", str(revision))
    return revision


def get_setting(connection: Connection, name: str) -> str | None:
    """A fact of the installation, or None while it is not set."""
    return connection.execute(select(settings.c.value).where(settings.c.name == name)).scalar()


def set_setting(connection: Connection, name: str, value: str) -> None:
    """Write a fact of the installation."""
    changed = connection.execute(update(settings).where(settings.c.name == name).values(value=value))
    if changed.rowcount == 0:
        connection.execute(insert(settings).values(name=name, value=value))
