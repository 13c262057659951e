from store.conftest import acme, databases, postgres_server, quick_directory, store
from store.values import OCTOBER

__all__ = ["OCTOBER", "acme", "databases", "postgres_server", "quick_directory", "store"]
