"""Opening the store: SQLite beside the data by default, PostgreSQL by URL."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from sqlalchemy.pool import QueuePool

from tidemill.errors import ConfigError, Unavailable

PATIENCE = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""How libpq notices within seconds (tcp_user_timeout: milliseconds) that PostgreSQL's machine is gone, where the kernel
alone would wait for a quarter of an hour. The URL may say otherwise."""
SQLITE_BUSY_TIMEOUT_S = 10
"""How long a writer waits for another process's transaction before it gives up."""


class StoreUnavailable(Unavailable):
    """The database does not answer.

    The message says why, with the names of hosts and files: for operators only.
    """


class Store:
    """An open database. `read()` and `write()` give a connection inside one transaction.

    A reader sees one state of the database throughout, so that the parts of a report agree with each other.
    On SQLite a write transaction takes its lock at the start (BEGIN IMMEDIATE), so it never fails half-way for
    having read first. Both raise StoreUnavailable when the database does not answer.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        with _answering(), self.engine.connect() as connection:
            if not self.is_sqlite:  # SQLite's readers have this by nature
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        with _answering(), self.engine.connect() as connection:
            if self.is_sqlite:
                connection = connection.execution_options(tidemill_begin="IMMEDIATE")
            with connection.begin():
                yield connection

    def close(self) -> None:
        self.engine.dispose()


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, NoConnectionFree) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[-1].strip(" \t.?!")
        raise StoreUnavailable(
            f"The database does not answer: {reason}.",
            hint="Check that it is running and has disk space, then try again.",
        ) from error


def store_url(text: str | None, data_dir: Path) -> URL:
    """The store's address: `text` from the configuration, or the SQLite file under `data_dir`."""
    if text is None:
        return URL.create("sqlite", database=str(data_dir / "tidemill.db"))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        # Not repeated: a password may be in it.
        raise ConfigError(
            "store.url is not a valid database URL.", hint="Write postgresql://USER:PASSWORD@HOST/NAME."
        ) from error
    backend = url.get_backend_name()
    if backend == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        return url
    raise ConfigError(f"store.url must name SQLite or PostgreSQL, not {backend}.")


def open_store(url: URL, *, read_only: bool = False) -> Store:
    """Open the store at `url`; with `read_only` an SQLite file is neither made nor changed.

    Raises ConfigError when PostgreSQL is asked for and its driver is not installed.
    """
    if url.get_backend_name() == "sqlite":
        return Store(_sqlite_engine(url, read_only))
    try:
        patience = {name: value for name, value in PATIENCE.items() if name not in url.query}
        engine = create_engine(
            url, pool_size=4, max_overflow=4, pool_pre_ping=True, pool_recycle=1800, connect_args=patience
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "store.url asks for PostgreSQL, but its driver is not installed.",
            hint="Install tidemill[postgres].",
        ) from error
    return Store(engine)


def _sqlite_engine(url: URL, read_only: bool) -> Engine:
    path = url.database or ":memory:"
    if read_only and not Path(path).exists():
        raise Unavailable(f"There is no database at {path}.", hint="Has `tidemill up` run with this --data?")

    def connect() -> sqlite3.Connection:
        mode = "ro" if read_only else "rwc"
        connection = sqlite3.connect(
            f"file:{quote(path)}?mode={mode}",
            uri=True,
            timeout=SQLITE_BUSY_TIMEOUT_S,
            check_same_thread=False,
            isolation_level=None,
        )
        if not read_only:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=4, max_overflow=4)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        mode: Any = connection.get_execution_options().get("tidemill_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def store_time(connection: Connection) -> float:
    """The clock of the store in seconds since 1970 UTC: one clock for all processes that share it.

    PostgreSQL's own; an embedded store has that of this machine.
    """
    if connection.dialect.name == "sqlite":
        return time.time()
    # Not now(), which is the beginning of the transaction: it may have waited for a lock since.
    return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
