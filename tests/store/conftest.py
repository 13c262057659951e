import pytest
from sqlalchemy import Connection

from tests.store.databases import databases, quick_directory, store
from tests.store.values import LONG_AGO
from tidemill.store.engine import Store
from tidemill.store.tenants import Tenant, create_tenant

__all__ = ["databases", "quick_directory", "store"]


@pytest.fixture
def acme(store: Store) -> Tenant:
    """A tenant without a balance, in CNY."""
    with store.write() as connection:
        return new_tenant(connection, "acme")


def new_tenant(connection: Connection, name: str, currency: str = "CNY") -> Tenant:
    return create_tenant(connection, name=name, currency=currency, now=LONG_AGO)
