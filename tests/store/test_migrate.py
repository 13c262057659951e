"""The schema: made from nothing, made once, and never by an older program."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from tests.store.databases import Databases
from tidemill.errors import ConfigError
from tidemill.store.engine import Store
from tidemill.store.migrate import migrate, schema_head
from tidemill.store.tables import metadata


def revision_of(store: Store) -> str | None:
    with store.read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def test_a_new_store_gets_every_table(databases: Databases) -> None:
    store = databases.empty()
    migrate(store)
    assert revision_of(store) == schema_head()
    assert set(inspect(store.engine).get_table_names()) == set(metadata.tables) | {"alembic_version"}


def test_the_migrations_and_the_tables_of_the_code_are_the_same(store: Store) -> None:
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(store: Store) -> None:
    with store.write() as connection:
        connection.execute(text("INSERT INTO settings (name, value) VALUES ('kept', 'yes')"))
    migrate(store)
    migrate(store)
    with store.read() as connection:
        assert connection.execute(text("SELECT value FROM settings WHERE name = 'kept'")).scalar() == "yes"


def test_a_store_of_a_newer_program_is_refused_and_left_alone(store: Store) -> None:
    with store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="schema 9999, which this version of Tidemill does not know") as refused:
        migrate(store)
    assert "newer version" in refused.value.hint
    assert revision_of(store) == "9999"


def test_a_migration_that_fails_leaves_nothing(databases: Databases, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidemill.store.migrations.versions import v0001_first_light as first

    store = databases.empty()

    def fails_at_the_end() -> None:
        upgrade()
        raise RuntimeError("out of the blue")

    upgrade = first.upgrade
    monkeypatch.setattr("alembic.command.upgrade", lambda config, to: _run_in(config, fails_at_the_end))
    with pytest.raises(RuntimeError, match="out of the blue"):
        migrate(store)
    assert inspect(store.engine).get_table_names() == []


def _run_in(config: object, step: object) -> None:
    from alembic.operations import Operations

    connection = config.attributes["connection"]  # type: ignore[attr-defined]
    with Operations.context(MigrationContext.configure(connection)):
        step()  # type: ignore[operator]
