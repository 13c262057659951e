"""Opening stores, and what their transactions promise."""

import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.store.databases import Databases
from tidemill.errors import ConfigError, Unavailable
from tidemill.store.engine import Store, open_store, store_url
from tidemill.store.revision import current_revision, get_setting, set_setting


def test_the_store_is_an_sqlite_file_unless_said_otherwise(tmp_path: Path) -> None:
    assert store_url(None, tmp_path).database == str(tmp_path / "tidemill.db")
    assert store_url("postgresql://u:p@h/n", tmp_path).drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    ("text_", "says"),
    [
        ("mysql://h/n", "SQLite or PostgreSQL, not mysql"),
        ("nonsense", "is not a valid database URL"),
        ("", "is not a valid database URL"),
        ("postgresql://h:port/n", "is not a valid database URL"),
    ],
)
def test_another_url_is_refused(tmp_path: Path, text_: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        store_url(text_, tmp_path)


def test_a_password_in_a_bad_url_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        store_url("postgresql://me:hunter2@h:port/n", tmp_path)
    assert "hunter2" not in str(refused.value)


def test_a_failure_undoes_the_whole_transaction(store: Store) -> None:
    with pytest.raises(RuntimeError), store.write() as connection:
        set_setting(connection, "half", "done")
        raise RuntimeError
    with store.read() as connection:
        assert get_setting(connection, "half") is None


def test_a_reader_sees_one_state_throughout(databases: Databases, store: Store) -> None:
    other = databases.again(store)
    with store.read() as reader:
        before = current_revision(reader)
        with other.write() as writer:
            set_setting(writer, "revision", "41")
        assert current_revision(reader) == before
    with store.read() as reader:
        assert current_revision(reader) == 41


def test_writers_take_turns(databases: Databases, store: Store) -> None:
    """Ten writers that each read and then write lose nothing; on SQLite none fails for having read first."""
    with store.write() as connection:
        set_setting(connection, "count", "0")

    def add() -> None:
        mine = databases.again(store)
        for _ in range(5):
            with mine.write() as connection:
                query = text(
                    "SELECT value FROM settings WHERE name = 'count'" + ("" if mine.is_sqlite else " FOR UPDATE")
                )
                value = int(connection.execute(query).scalar_one())
                set_setting(connection, "count", str(value + 1))

    threads = [threading.Thread(target=add) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as connection:
        assert get_setting(connection, "count") == "50"


def test_a_database_that_is_not_there_is_unavailable(databases: Databases, tmp_path: Path) -> None:
    if databases.server is None:
        store = open_store(store_url(f"sqlite:///{tmp_path / 'no' / 'such' / 'folder.db'}", tmp_path))
    else:
        store = open_store(store_url(databases.server.url("absent"), tmp_path))
    with pytest.raises(Unavailable, match="The database does not answer"), store.read():
        pass
    store.close()


def test_a_connection_that_breaks_is_unavailable_and_the_next_one_works(databases: Databases, store: Store) -> None:
    if databases.server is None:
        pytest.skip("SQLite has no connection to lose")
    database = store.engine.url.database
    assert database is not None
    with pytest.raises(Unavailable), store.write() as connection:
        set_setting(connection, "lost", "yes")
        databases.server.hang_up(database)
    with store.write() as connection:
        assert get_setting(connection, "lost") is None


def test_a_locked_sqlite_is_unavailable_after_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidemill.store.engine.SQLITE_BUSY_TIMEOUT_S", 0.1)
    store = open_store(store_url(None, tmp_path))
    with store.write() as connection:
        connection.execute(text("CREATE TABLE t (x)"))
    other = sqlite3.connect(tmp_path / "tidemill.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="database is locked"), store.write():
        pass
    with store.read() as connection:  # readers do not wait for a writer
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 0
    other.execute("ROLLBACK")
    with store.write():
        pass
    store.close()


def test_sqlite_keeps_what_it_has_promised(tmp_path: Path) -> None:
    store = open_store(store_url(None, tmp_path))
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    store.close()


def test_a_stopped_platforms_store_is_read_and_never_made(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="There is no database at"):
        open_store(store_url(None, tmp_path), read_only=True)
    assert list(tmp_path.iterdir()) == []
    made = open_store(store_url(None, tmp_path))
    with made.write() as connection:
        connection.execute(text("CREATE TABLE t (x)"))
    made.close()
    store = open_store(store_url(None, tmp_path), read_only=True)
    with store.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 0
    with pytest.raises(Unavailable, match="readonly"), store.write() as connection:
        connection.execute(text("INSERT INTO t VALUES (1)"))
    store.close()
