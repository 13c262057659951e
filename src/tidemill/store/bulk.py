"""Inserts that SQLAlchemy's common ground does not have: many rows at driver speed, and ON CONFLICT.

Many rows of one shape are compiled once for a dialect and handed to the driver as they are. SQLAlchemy's own
executemany works each row's parameters through its type system again, which costs more than the database does (12
of 25 us a usage record).
"""

from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Dialect, Table, insert
from sqlalchemy.dialects import postgresql, sqlite


def insert_rows(connection: Connection, table: Table, rows: list[tuple[Any, ...]]) -> None:
    """Insert rows that each give a value, or None, for every column in the table's order.

    The values are of types that the drivers take directly.
    """
    if not rows:
        return
    statement, order = _compiled(table, connection.dialect)
    names = tuple(column.name for column in table.columns)
    parameters: Any = rows if order == names else [dict(zip(names, row, strict=True)) for row in rows]
    if order is not None and order != names:
        parameters = [tuple(map(row.__getitem__, order)) for row in parameters]
    connection.exec_driver_sql(statement, parameters)


@lru_cache(maxsize=32)
def _compiled(table: Table, dialect: Dialect) -> tuple[str, tuple[str, ...] | None]:
    compiled = insert(table).compile(dialect=dialect, column_keys=[column.name for column in table.columns])
    return str(compiled), tuple(compiled.positiontup) if compiled.positiontup else None


def dialect_insert(connection: Connection, table: Table) -> "sqlite.Insert | postgresql.Insert":
    """An INSERT that can say ON CONFLICT, in the connection's dialect."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)
