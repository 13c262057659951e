"""Stores to test with: an empty, migrated one on SQLite and on PostgreSQL, for each test its own.

PostgreSQL comes from the system's package (Debian: `postgresql`); its server is started once for all tests, on a
socket in a directory of its own, as a user without privileges, and without fsync.
"""

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, text

from tests.support import requirements
from tests.support.stores import template
from tidemill.errors import Unavailable
from tidemill.store.engine import Store, open_store, store_url
from tidemill.store.migrate import migrate

START_WITHIN_S = 30.0


def postgres_binaries() -> Path | None:
    """The directory of the newest PostgreSQL server here, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    return Path(on_path).parent if on_path else None


class PostgresServer:
    """A private PostgreSQL server."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._directory = Path(tempfile.mkdtemp(prefix="tm-pg-"))
        self._numbers = itertools.count(1)
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # the server refuses to run as root
            user = next(name for name in ("postgres", "nobody") if _exists(name))
            entry = pwd.getpwnam(user)
            os.chown(self._directory, entry.pw_uid, entry.pw_gid)
            self._as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        self._process: subprocess.Popen[bytes] | None = None
        self._template = ""

    def start(self) -> None:
        data = self._directory / "data"
        initdb = [str(self._binaries / "initdb"), "-D", str(data), "-U", "tidemill", "--no-sync"]
        subprocess.run(
            [*initdb, "-A", "trust", "-E", "UTF8", "--no-locale"],
            check=True,
            capture_output=True,
            cwd=self._directory,
            timeout=60,
            **self._as_user,
        )
        self._run()
        self._await(self._make_template)
        store = open_store(store_url(self.url(self._template), self._directory))
        migrate(store)
        store.close()

    def _run(self) -> None:
        options = {"fsync": "off", "listen_addresses": "", "unix_socket_directories": self._directory}
        options |= {"shared_buffers": "16MB", "max_connections": "60"}
        arguments = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._directory / "data", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                **self._as_user,
            )

    def _make_template(self) -> None:
        self._template = self.create()

    def _await(self, answers: Callable[[], None]) -> None:
        """Try until the server answers."""
        deadline = time.monotonic() + START_WITHIN_S
        while True:
            try:
                return answers()
            except Exception:
                assert time.monotonic() < deadline, (self._directory / "log").read_text()
                time.sleep(0.1)

    def url(self, database: str) -> str:
        return f"postgresql://tidemill@/{database}?host={self._directory}"

    def create(self, template: str = "template1") -> str:
        """Make a database; gives its name."""
        name = f"tm{next(self._numbers)}"
        self._administer(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return name

    def create_migrated(self) -> str:
        return self.create(self._template)

    def drop(self, name: str) -> None:
        self._administer(f"DROP DATABASE {name} WITH (FORCE)")

    def hang_up(self, name: str) -> None:
        """Break every connection to a database, as a failing network does."""
        self._administer(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """All of its processes stand still meanwhile: connections stay open, and nothing answers."""
        assert self._process is not None
        group = [self._process.pid, *_children(self._process.pid)]
        for pid in group:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in group:
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It is shut down meanwhile, connections broken; afterwards it runs again on the same data."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # a fast shutdown
        self._process.wait(START_WITHIN_S)
        try:
            yield
        finally:
            self._run()
            self._await(lambda: self._administer("SELECT 1"))

    def _administer(self, statement: str) -> None:
        url = store_url(self.url("postgres"), self._directory)
        engine = create_engine(url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return found


def _exists(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False


_numbers = itertools.count(1)


class Databases:
    """Makes migrated stores of one kind, and opens the same one again, as another process would."""

    def __init__(self, kind: str, directory: Path, server: PostgresServer | None) -> None:
        self.kind = kind
        self.server = server
        self._directory = directory
        self._open: list[Store] = []
        self._made: list[str] = []

    def empty(self) -> Store:
        """A store without tables."""
        if self.server is not None:
            return self._opened(self.server.url(self._named(self.server.create())))
        return self._opened(f"sqlite:///{self._directory / f'empty{next(_numbers)}.db'}")

    def migrated(self) -> Store:
        if self.server is not None:
            return self._opened(self.server.url(self._named(self.server.create_migrated())))
        path = self._directory / f"store{next(_numbers)}.db"
        shutil.copy(template(), path)
        return self._opened(f"sqlite:///{path}")

    def again(self, store: Store) -> Store:
        """The same database, opened by somebody else."""
        return self._opened(self.url(store))

    def url(self, store: Store) -> str:
        if self.server is None:
            with store.engine.connect() as connection:
                row = connection.exec_driver_sql("PRAGMA database_list").first()
            assert row is not None
            return f"sqlite:///{row[2]}"
        return store.engine.url.render_as_string(hide_password=False)

    def close(self) -> None:
        for store in self._open:
            store.close()
        for name in self._made:
            assert self.server is not None
            self.server.drop(name)
        self._open, self._made = [], []

    def _named(self, name: str) -> str:
        self._made.append(name)
        return name

    def _opened(self, url: str) -> Store:
        parsed: URL = store_url(url, self._directory)
        store = open_store(parsed)
        self._open.append(store)
        return store


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The one server of a session."""
    binaries = postgres_binaries()
    if binaries is None:
        requirements.not_installed("PostgreSQL", "apt-get install postgresql")
    requirements.need_module("psycopg", "psycopg", "pip install 'tidemill[postgres]'")
    server = PostgresServer(binaries)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def quick_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory where there is one: SQLite's fsyncs are most of the time of these tests."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("stores")
        return
    directory = Path(tempfile.mkdtemp(prefix="tm-stores-", dir=memory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, quick_directory: Path) -> Iterator[Databases]:
    server = request.getfixturevalue("postgres_server") if request.param == "postgresql" else None
    databases = Databases(request.param, quick_directory, server)
    yield databases
    databases.close()


@pytest.fixture
def store(databases: Databases) -> Store:
    """A migrated store, on each of the two databases in turn."""
    return databases.migrated()


class FlakyStore(Store):
    """A store that does not answer while `down`, nor in the transaction that `fail_in` counts down to.

    `lose_commit`: the next commit is carried out, but its answer is lost.
    """

    down = False
    lose_commit = False

    @contextlib.contextmanager
    def read(self) -> Iterator[Any]:
        self._answer()
        with super().read() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Any]:
        self._answer()
        with super().write() as connection:
            yield connection
        if self.lose_commit:
            self.lose_commit = False
            raise Unavailable("The database does not answer: the answer to the commit was lost.")

    def _answer(self) -> None:
        if self.down:
            raise Unavailable("The database does not answer: it is down.")
