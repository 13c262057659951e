"""The further components of usage records: as JSON in their row, and added up by the database.

A record of a chat has none of them, and costs nothing for that. SQLite and PostgreSQL read JSON by functions of their
own, which are here and nowhere else.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import BigInteger, ColumnElement, Connection, FromClause, case, cast, func, literal, select, true
from sqlalchemy.dialects.postgresql import JSONB

from tidemill.ledger.components import BY_KEY, CACHED_INPUT, CATALOGUE, INPUT, OUTPUT, PLACE, Component
from tidemill.ledger.usage import UsageRecord
from tidemill.store.tables.usage import usage_records

Column = ColumnElement[Any]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, list[int]]).decode

_columns = usage_records.c
CHARGE: Column = (
    _columns.charge_input + _columns.charge_cached + _columns.charge_output + func.coalesce(_columns.charge_more, 0)
)
"""What a record costs, all components together."""


def components_text(more: Mapping[Component, tuple[int, int | None]]) -> str | None:
    """Quantity and amount of the further components, in the form of the column; None when there are none."""
    if not more:
        return None
    said = {
        component.key: (quantity,) if amount is None else (quantity, amount)
        for component, (quantity, amount) in sorted(more.items(), key=lambda each: PLACE[each[0]])
    }
    return _encode(said).decode()


def components_of(record: UsageRecord) -> dict[Component, tuple[int, int | None]]:
    """Quantity and amount of a record's further components."""
    return {component: (quantity, record.charges.get(component)) for component, quantity in record.usage.more.items()}


def read_components(text: str | None) -> tuple[dict[Component, int], dict[Component, int]]:
    """The quantities and the amounts in a column."""
    if text is None:
        return {}, {}
    found = {BY_KEY[key]: pair for key, pair in _decode(text).items()}
    return (
        {component: pair[0] for component, pair in found.items()},
        {component: pair[1] for component, pair in found.items() if len(pair) == 2},
    )


def base_quantities(connection: Connection) -> dict[Component, Column]:
    """The quantity that a record is billed for of each base component.

    Without what is part of it and billed apart.
    """
    columns = usage_records.c
    whole: dict[Component, Column] = {
        INPUT: columns.prompt_tokens - columns.cached_tokens,
        CACHED_INPUT: columns.cached_tokens,
        OUTPUT: columns.completion_tokens,
    }
    for component, spec in CATALOGUE.items():
        if spec.part_of is not None:
            quantity, amount = _figure(connection, component, 0), _figure(connection, component, 1)
            whole[spec.part_of] = whole[spec.part_of] - case((amount.is_not(None), quantity), else_=0)
    return whole


def _component_rows(connection: Connection) -> tuple[FromClause, Column, Column, Column]:
    """Usage records with a row for each further component, for FROM.

    And its key, quantity, and amount, which is null where it is not billed apart.
    """
    text = usage_records.c.components
    if connection.dialect.name == "sqlite":
        part = func.json_each(text).table_valued("key", "value", name="part")
        quantity, amount = (_of_sqlite(part.c.value, f"$[{place}]") for place in (0, 1))
    else:
        part = func.jsonb_each(cast(text, JSONB)).table_valued("key", "value", name="part")
        value = cast(part.c.value, JSONB)
        quantity, amount = (_of_postgres(value[place]) for place in (0, 1))
    return usage_records.join(part, true()), part.c.key, quantity, amount


class ComponentRow(msgspec.Struct, frozen=True):
    """One further component, summed over a group of records."""

    group: tuple[Any, ...]
    component: Component
    quantity: int
    apart: int
    """What of the quantity is billed apart."""
    amount: int
    records_apart: int
    """How many records it is billed apart in."""


def sum_components(connection: Connection, *where: Column, by: tuple[Column, ...]) -> list[ComponentRow]:
    """The sums of the further components over records, by the columns `by`."""
    rows, key, quantity, amount = _component_rows(connection)
    query = (
        select(
            *by,
            key,
            func.sum(quantity),
            func.sum(case((amount.is_not(None), quantity), else_=0)),
            func.sum(func.coalesce(amount, 0)),
            func.count(amount),
        )
        .select_from(rows)
        .where(*where, usage_records.c.components.is_not(None))
        .group_by(*by, key)
    )
    found = []
    for row in connection.execute(query):
        group, (name, *sums) = tuple(row[: len(by)]), row[len(by) :]
        found.append(ComponentRow(group, BY_KEY[name], *map(int, sums)))
    return found


def _figure(connection: Connection, component: Component, place: int) -> Column:
    text = usage_records.c.components
    if connection.dialect.name == "sqlite":
        return _of_sqlite(text, f"$.{component.key}[{place}]")
    return _of_postgres(cast(text, JSONB)[component.key][place])


def _of_sqlite(text: Column, path: str) -> Column:
    return func.json_extract(text, literal(path))


def _of_postgres(value: Any) -> Column:
    return cast(value.astext, BigInteger)
