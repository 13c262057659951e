"""Statements that SQLAlchemy's common ground does not have: many rows at driver speed, and ON CONFLICT.

Many rows of one shape are compiled once for a dialect and handed to the driver as they are. SQLAlchemy's own
executemany works each row's parameters through its type system again, which costs more than the database does (12
of 25 us a usage record). PostgreSQL gets all rows of a statement as one JSON text, since its driver takes longer over a
row's parameters than the server does over the row.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec
from sqlalchemy import Connection, Dialect, Table, insert
from sqlalchemy.dialects import postgresql, sqlite

_encode = msgspec.json.Encoder().encode


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


def insert_structs(connection: Connection, table: str, rows: Sequence[msgspec.Struct]) -> None:
    """Insert rows, all of one type, whose fields are columns of the table; its other columns are left to it."""
    if not rows:
        return
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(_insert_of_values(table, type(rows[0])), list(map(msgspec.structs.astuple, rows)))
    else:
        connection.exec_driver_sql(_insert_of_json(table, type(rows[0])), (_encode(rows).decode(),))


@lru_cache(maxsize=32)
def _compiled(table: Table, dialect: Dialect) -> tuple[str, tuple[str, ...] | None]:
    compiled = insert(table).compile(dialect=dialect, column_keys=[column.name for column in table.columns])
    return str(compiled), tuple(compiled.positiontup) if compiled.positiontup else None


@lru_cache(maxsize=32)
def _insert_of_values(table: str, row: type[msgspec.Struct]) -> str:
    names = row.__struct_fields__
    return f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"


@lru_cache(maxsize=32)
def _insert_of_json(table: str, row: type[msgspec.Struct]) -> str:
    names = ", ".join(row.__struct_fields__)
    return f"INSERT INTO {table} ({names}) SELECT {names} FROM json_populate_recordset(NULL::{table}, %s::json)"


def run(connection: Connection, statement: str, *parameters: Any) -> Any:
    """Run a statement of the driver's own on either database, its parameters written as `?`; gives the result."""
    if connection.dialect.name != "sqlite":
        statement = _with_percent_s(statement)
    return connection.exec_driver_sql(statement, parameters)


@lru_cache(maxsize=64)
def _with_percent_s(statement: str) -> str:
    return statement.replace("?", "%s")


def dialect_insert(connection: Connection, table: Table) -> "sqlite.Insert | postgresql.Insert":
    """An INSERT that can say ON CONFLICT, in the connection's dialect."""
    return sqlite.insert(table) if connection.dialect.name == "sqlite" else postgresql.insert(table)
