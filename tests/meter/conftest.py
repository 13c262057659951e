from tests.store.conftest import acme, databases, quick_directory, store
from tests.store.values import OCTOBER

__all__ = ["OCTOBER", "acme", "databases", "quick_directory", "store"]
