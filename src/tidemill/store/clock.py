"""Instants at the edge of the store: aware UTC datetimes outside, integers of microseconds inside."""

import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, func, select

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_micros(instant: datetime) -> int:
    """Microseconds since 1970 UTC, exactly. Raises ValueError for a naive datetime."""
    if instant.tzinfo is None:
        raise ValueError("an instant must be aware; got a datetime without a time zone")
    return (instant - EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The aware UTC datetime of `micros` since 1970."""
    return EPOCH + timedelta(microseconds=micros)


def store_time(connection: Connection) -> float:
    """The clock of the store in seconds since 1970 UTC: one clock for all processes that share it.

    PostgreSQL's own; an embedded store has that of this machine.
    """
    if connection.dialect.name == "sqlite":
        return time.time()
    # Not now(), which is the beginning of the transaction: it may have waited for a lock since.
    return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
