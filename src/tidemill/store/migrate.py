"""Bringing a store to the schema of this version of Tidemill (Alembic, run from inside the program)."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from tidemill.errors import ConfigError
from tidemill.store.engine import Store

_SCRIPTS = Path(__file__).parent / "migrations"


def migrate(store: Store) -> None:
    """Bring the store to the newest schema. Raises ConfigError when it is newer than this program."""
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with store.write() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        known = {script.revision for script in scripts.walk_revisions()}
        if current is not None and current not in known:
            raise ConfigError(
                f"The store has schema {current}, which this version of Tidemill does not know.",
                hint="Start the newer version that made it.",
            )
        if current == scripts.get_current_head():
            return
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def schema_head() -> str | None:
    """The newest schema that this program knows."""
    return ScriptDirectory(str(_SCRIPTS)).get_current_head()
