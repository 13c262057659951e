"""The books of a platform that has been stopped: they balance, and nothing is left held, leased or waiting."""

from collections.abc import Mapping

from tests.support.platform import Platform
from tidemill.ledger.money import parse_amount
from tidemill.ledger.usage import UsageRecord
from tidemill.store.accounts import tenant_balances, verify_books
from tidemill.store.balance_leases import leasing_workers
from tidemill.store.engine import open_store, store_url
from tidemill.store.tenants import list_tenants
from tidemill.store.usage import records_between


def check_books(platform: Platform, credits: Mapping[str, str], url: str | None = None) -> dict[str, list[UsageRecord]]:
    """Look through the store of a stopped platform; gives the records of each tenant in `credits`, by its name.

    `credits`: what each tenant was granted. A balance is that less the charges of its records, and never negative.
    """
    found: dict[str, list[UsageRecord]] = {}
    store = open_store(store_url(url, platform.data))
    try:
        with store.read() as connection:
            assert all(not differing for differing in verify_books(connection).values())
            assert leasing_workers(connection) == set(), "leases of processes that are gone"
            balances = tenant_balances(connection)
            for tenant in list_tenants(connection):
                if tenant.name in credits:
                    records = list(records_between(connection, tenant_id=tenant.tenant_id, start=None, end=None))
                    assert len({each.request_id for each in records}) == len(records), "a request twice"
                    charged = sum(each.charge for each in records)
                    assert balances[tenant.tenant_id] == parse_amount(credits[tenant.name]) - charged >= 0
                    found[tenant.name] = records
    finally:
        store.close()
    assert found.keys() == credits.keys()
    assert list((platform.data / "meter").iterdir()) == [], "logs that were not loaded"
    return found
