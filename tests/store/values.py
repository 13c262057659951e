"""What the store's and the meter's tests put into stores."""

from datetime import UTC, datetime

from sqlalchemy import Connection

from tidemill.ledger.money import Nanos
from tidemill.ledger.posting import credit_grant, tenant_account
from tidemill.store.accounts import account_balance, post, verify_books
from tidemill.store.engine import Store
from tidemill.store.ids import new_id

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
OCTOBER = datetime(2026, 10, 15, 12, tzinfo=UTC)
ZONE = "Asia/Shanghai"


def grant(connection: Connection, tenant_id: str, amount: int, *, currency: str = "CNY", at: datetime = OCTOBER) -> str:
    """Give a tenant `amount` nanos; returns the transaction's id."""
    transaction = credit_grant(new_id("txn"), tenant_id=tenant_id, currency=currency, amount=Nanos(amount), at=at)
    post(connection, transaction)
    return transaction.transaction_id


def balance_of(store: Store, tenant_id: str, currency: str = "CNY") -> int:
    with store.read() as connection:
        return account_balance(connection, tenant_account(tenant_id), currency)


def assert_clean(store: Store) -> None:
    """The books of every currency balance to the nano."""
    with store.read() as connection:
        assert all(not found for found in verify_books(connection).values()), verify_books(connection)
