"""Interactive demand by model and five minutes, and what was measured of models: the tide's memory.

A bin is a sum over usage records and nothing else, so it may be computed again at any time, by any machine that
shares the store, with the same result. Lines of batches are no demand: they wait until there is room.
"""

from collections.abc import Mapping
from datetime import datetime

import msgspec
from sqlalchemy import Connection, delete, func, insert, select

from tidemill.clock import to_micros
from tidemill.ledger.usage import LINE_PREFIX
from tidemill.store.bulk import dialect_insert
from tidemill.store.tables.fleet import demand_bins, model_measures
from tidemill.store.tables.usage import usage_records

BIN_S = 300
"""The length of a bin, seconds."""
_BIN_US = BIN_S * 1_000_000
UP = ""
"""In place of a model: a bin in which the platform was up, whether anybody asked or not."""


class DemandBin(msgspec.Struct, frozen=True, gc=False):
    """The interactive demand for one model in five minutes."""

    number: int
    """Five minutes since 1970."""
    arrivals: int
    work: int
    """Tokens of prefill (`tides.routing.RequestWork`)."""


def bin_of(unix_s: float) -> int:
    """The bin that an instant lies in."""
    return int(unix_s // BIN_S)


def refresh_bins(connection: Connection, first: int, *, decode_weight: int) -> None:
    """Compute the bins from `first` on anew.

    An answer's token weighs as much as `decode_weight` of a prompt.
    """
    columns = usage_records.c
    begins = (columns.started_at - columns.started_at % _BIN_US).label("begins")
    work = columns.prompt_tokens - columns.cached_tokens + decode_weight * columns.completion_tokens
    begins_us = first * _BIN_US
    rows = connection.execute(
        select(columns.model, begins, func.count().label("arrivals"), func.sum(work).label("work"))
        # What began since has also finished since, and it is the finish that has an index.
        .where(columns.finished_at >= begins_us, columns.started_at >= begins_us)
        .where(~columns.request_id.startswith(LINE_PREFIX, autoescape=True))
        .group_by(columns.model, begins)
    ).all()
    connection.execute(delete(demand_bins).where(demand_bins.c.bin >= first, demand_bins.c.model != UP))
    if rows:
        connection.execute(
            insert(demand_bins),
            [
                {
                    "model": row.model,
                    "bin": int(row.begins) // _BIN_US,
                    "arrivals": row.arrivals,
                    "work": int(row.work),
                }
                for row in rows
            ],
        )


def mark_bin(connection: Connection, number: int) -> None:
    """Note that the platform was up in this bin."""
    values = {"model": UP, "bin": number, "arrivals": 0, "work": 0}
    connection.execute(dialect_insert(connection, demand_bins).values(**values).on_conflict_do_nothing())


def drop_bins(connection: Connection, before: int) -> None:
    """Forget the bins before this one."""
    connection.execute(delete(demand_bins).where(demand_bins.c.bin < before))


def last_bin(connection: Connection) -> int | None:
    """The newest bin there is."""
    number: int | None = connection.execute(select(func.max(demand_bins.c.bin))).scalar()
    return number


def read_bins(connection: Connection, first: int) -> dict[str, list[DemandBin]]:
    """The bins from `first` on by model, oldest first; those without demand are left out."""
    columns = demand_bins.c
    found: dict[str, list[DemandBin]] = {}
    query = select(columns.model, columns.bin, columns.arrivals, columns.work).where(columns.bin >= first)
    for model, number, arrivals, work in connection.execute(query.order_by(columns.bin)):
        found.setdefault(model, []).append(DemandBin(number, arrivals, work))
    return found


def read_measures(connection: Connection) -> dict[str, dict[str, float]]:
    """What was measured, by model and measure."""
    found: dict[str, dict[str, float]] = {}
    for row in connection.execute(select(model_measures)):
        found.setdefault(row.model, {})[row.measure] = row.value
    return found


def keep_measures(connection: Connection, measures: Mapping[tuple[str, str], float], now: datetime) -> None:
    """Write measures down, by model and name, in the place of earlier ones."""
    at = to_micros(now)
    for (model, measure), value in measures.items():
        values = {"model": model, "measure": measure, "value": value, "measured_at": at}
        statement = dialect_insert(connection, model_measures).values(**values)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["model", "measure"], set_={"value": value, "measured_at": at}
            )
        )
