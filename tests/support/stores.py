"""A migrated SQLite store for a test: copied from one that was migrated once, which takes a tenth of a second."""

import functools
import shutil
import tempfile
from pathlib import Path

from tidemill.store.engine import Store, open_store, store_url
from tidemill.store.migrate import migrate

_directory = tempfile.TemporaryDirectory(prefix="tm-template-")


@functools.cache
def template() -> Path:
    """An SQLite file with all tables and no rows."""
    directory = Path(_directory.name)
    made = open_store(store_url(None, directory))
    migrate(made)
    with made.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    made.close()
    return directory / "tidemill.db"


def migrated_store(directory: Path) -> Store:
    """The store of a platform whose data is in `directory`; made if there is none yet."""
    path = directory / "tidemill.db"
    if not path.exists():
        shutil.copy(template(), path)
    return open_store(store_url(None, directory))
