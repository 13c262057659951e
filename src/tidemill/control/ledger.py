"""Whether the ledger agrees with itself: each kept sum is compared with what it is the sum of."""

from typing import Any

from sqlalchemy import Connection, func, select

from tidemill.ledger.money import format_amount
from tidemill.store.accounts import unbalanced_transactions, verify_books
from tidemill.store.budgets import verify_budgets
from tidemill.store.device_meters import verify_meters
from tidemill.store.tables.limits import budgets
from tidemill.store.tables.money import accounts, transactions
from tidemill.store.tables.usage import device_meters

Json = dict[str, Any]

_COUNTED = {"accounts": accounts, "transactions": transactions, "budgets": budgets, "meters": device_meters}


def check_ledger(connection: Connection, *, zone: str) -> Json:
    """Compare each kept sum with what it is the sum of.

    Balances with entries, transactions with zero, budgets with usage records, and meters with their charges.

    It reads all entries: a big store takes minutes. `differences` is empty if all is well.
    """
    differences = [
        f"account {each.account} in {currency}: its stored balance is {format_amount(each.kept)}, but its entries"
        f" add up to {format_amount(each.summed)}"
        for currency, found in sorted(verify_books(connection).items())
        for each in found
    ]
    differences += [
        f"transaction {transaction_id}: its entries add up to {format_amount(left)}, not to zero"
        for transaction_id, left in unbalanced_transactions(connection)
    ]
    differences += verify_budgets(connection, zone=zone)
    differences += verify_meters(connection)
    counts = {
        name: connection.execute(select(func.count()).select_from(table)).scalar_one()
        for name, table in _COUNTED.items()
    }
    return {"equal": not differences, "checked": counts, "differences": differences}
