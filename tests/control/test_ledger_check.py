"""The check of the ledger: equal as long as nobody writes past it, and what differs is named with both amounts."""

from datetime import UTC, datetime

import pytest
from sqlalchemy import Connection, insert, update

from tests.control.conftest import Api
from tests.control.world import ZONE, FakePlatform, record
from tidemill.control.ledger import check_ledger
from tidemill.store.tables.limits import budgets, limits
from tidemill.store.tables.money import accounts, entries
from tidemill.store.tables.usage import device_meters


@pytest.fixture
def busy(api: Api, platform: FakePlatform) -> str:
    """A platform with a credit, a budget, and usage that is not stored yet; gives the tenant."""
    tenant: str = api.post("/tenants", name="acme")["id"]
    api.post("/credits", tenant="acme", amount="10")
    api.post("/limits", tenant="acme", budget="100", per="month")
    platform.settled = [record(platform, f"req_{n}", tenant, at=datetime.now(UTC)) for n in range(3)]
    return tenant


def differences(connection: Connection) -> list[str]:
    found = check_ledger(connection, zone=ZONE)
    assert found["equal"] is (not found["differences"])
    return list(found["differences"])


def test_a_ledger_that_nobody_has_touched_is_equal(api: Api, platform: FakePlatform, busy: str) -> None:
    found = api.get("/ledger/check")
    assert found["equal"] and found["differences"] == []
    assert found["checked"]["transactions"] == 2, "what was settled is in it"
    assert found["checked"]["accounts"] >= 3 and found["checked"]["meters"] == 0


def test_a_balance_that_is_not_the_sum_of_its_entries(api: Api, platform: FakePlatform, busy: str) -> None:
    api.get("/ledger/check")
    account = f"tenant:{busy}"
    with platform.store.write() as connection:
        changed = connection.execute(
            update(accounts).where(accounts.c.account == account).values(balance=accounts.c.balance + 1)
        )
        assert changed.rowcount == 1
    said = api.get("/ledger/check")["differences"]
    assert any(text.startswith(f"account {account} in USD: ") and "its entries add up to" in text for text in said)
    assert any(text.startswith("account all:accounts in USD: its stored balance is 0.000000001") for text in said)


def test_a_transaction_that_does_not_add_up_to_zero(api: Api, platform: FakePlatform, busy: str) -> None:
    api.get("/ledger/check")
    with platform.store.write() as connection:
        row = connection.execute(entries.select().limit(1)).one()
        values = {**row._mapping, "line": 99, "amount": 7_000_000_000}
        connection.execute(insert(entries).values(**values))
        said = differences(connection)
    assert f"transaction {row.transaction_id}: its entries add up to 7.00, not to zero" in said


def test_a_budget_that_is_not_the_sum_of_its_records(api: Api, platform: FakePlatform, busy: str) -> None:
    api.get("/ledger/check")
    with platform.store.write() as connection:
        limit_id = connection.execute(limits.select()).one().limit_id
        connection.execute(insert(budgets).values(limit_id=limit_id, period="2026-10", spent=1_000_000_000))
        connection.execute(insert(budgets).values(limit_id=limit_id, period="2026-09", spent=0))
        assert differences(connection) == [
            f"budget {limit_id} in 2026-10: 1.00 are stored as spent, but its usage records add up to 0.00"
        ]


def test_a_meter_that_has_ended_and_still_holds_money(api: Api, platform: FakePlatform, busy: str) -> None:
    values = {"meter_id": "mtr_1", "tenant_id": busy, "currency": "USD", "kind": "cpu", "tier": "standard"}
    counts = {"price_id": "p", "hour": 0, "devices": 1, "started_at": 0, "billed_until": 0, "ended_at": 0}
    with platform.store.write() as connection:
        connection.execute(insert(device_meters).values(**values, **counts, hold=5_000_000_000, uncollected=0))
        assert differences(connection) == ["meter mtr_1 has ended, but still holds 5.00"]
