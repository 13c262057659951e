from tests.store.conftest import acme, databases, postgres_server, quick_directory, store
from tests.store.values import OCTOBER

__all__ = ["OCTOBER", "acme", "databases", "postgres_server", "quick_directory", "store"]
