"""The ledger's books: posting transactions, and the balances that they add up to."""

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, func, insert, literal_column, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.ledger.money import Nanos
from tidemill.ledger.posting import (
    Account,
    Discrepancy,
    Entry,
    Transaction,
    TransactionKind,
    discrepancies,
    tenant_account,
)
from tidemill.store.bulk import dialect_insert
from tidemill.store.tables.money import accounts, entries, transactions


def post(connection: Connection, *posted: Transaction) -> None:
    """Add transactions and move the balances of their accounts, all inside the caller's write transaction.

    Balances are moved in the order of the accounts' names, so that two writers never wait for each other in a ring.
    """
    moves: dict[tuple[Account, str], int] = {}
    for transaction in posted:
        connection.execute(
            insert(transactions).values(
                transaction_id=transaction.transaction_id,
                kind=transaction.kind.value,
                tenant_id=transaction.tenant_id,
                currency=transaction.currency,
                at=to_micros(transaction.at),
                memo=transaction.memo,
            )
        )
        connection.execute(
            insert(entries),
            [
                {
                    "transaction_id": transaction.transaction_id,
                    "line": line,
                    "account": entry.account,
                    "currency": transaction.currency,
                    "amount": entry.amount,
                }
                for line, entry in enumerate(transaction.entries)
            ],
        )
        for entry in transaction.entries:
            key = (entry.account, transaction.currency)
            moves[key] = moves.get(key, 0) + entry.amount
    for (account, currency), amount in sorted(moves.items()):
        _move(connection, account, currency, amount)


def _move(connection: Connection, account: Account, currency: str, amount: int) -> None:
    move = (
        update(accounts)
        .where(accounts.c.account == account, accounts.c.currency == currency)
        .values(balance=accounts.c.balance + amount)
    )
    if connection.execute(move).rowcount == 0:
        opening = dialect_insert(connection, accounts).values(account=account, currency=currency, balance=0)
        connection.execute(opening.on_conflict_do_nothing())
        connection.execute(move)


def tenant_balance(connection: Connection, tenant_id: str, *, lock: bool = False) -> Nanos:
    """What a tenant has left, in nanos of its currency.

    With `lock`, nobody else moves it until the commit.
    """
    query = select(accounts.c.balance).where(accounts.c.account == tenant_account(tenant_id))
    if lock:
        query = query.with_for_update()  # SQLite's BEGIN IMMEDIATE has locked the whole file already
    return Nanos(connection.execute(query).scalar() or 0)


def account_balance(connection: Connection, account: Account, currency: str) -> Nanos:
    """The kept balance of an account in one currency; zero when nothing was ever posted to it."""
    query = select(accounts.c.balance).where(accounts.c.account == account, accounts.c.currency == currency)
    return Nanos(connection.execute(query).scalar() or 0)


def tenant_balances(connection: Connection) -> dict[str, Nanos]:
    """What each tenant has left, by tenant id; a tenant that never had a credit is missing."""
    prefix = tenant_account("")
    rows = connection.execute(
        select(accounts.c.account, accounts.c.balance).where(accounts.c.account.startswith(prefix, autoescape=True))
    )
    return {str(row.account).removeprefix(prefix): Nanos(row.balance) for row in rows}


def balance_at(connection: Connection, tenant_id: str, instant: datetime) -> Nanos:
    """What a tenant had left by all transactions that took effect before `instant`."""
    total = connection.execute(
        select(func.sum(entries.c.amount))
        .join(transactions, transactions.c.transaction_id == entries.c.transaction_id)
        .where(entries.c.account == tenant_account(tenant_id), transactions.c.at < to_micros(instant))
    ).scalar()
    return Nanos(int(total or 0))


def credits_between(connection: Connection, tenant_id: str, start: datetime, end: datetime) -> list[Transaction]:
    """The credit grants of a tenant that took effect in [start, end), oldest first."""
    rows = connection.execute(
        select(transactions)
        .where(
            transactions.c.tenant_id == tenant_id,
            transactions.c.kind == literal_column(f"'{TransactionKind.CREDIT_GRANT.value}'"),  # for the index
            transactions.c.at >= to_micros(start),
            transactions.c.at < to_micros(end),
        )
        .order_by(transactions.c.at, transactions.c.transaction_id)
    ).all()
    return [_transaction(connection, row) for row in rows]


def find_transaction(connection: Connection, transaction_id: str) -> Transaction | None:
    """A transaction by its id."""
    row = connection.execute(select(transactions).where(transactions.c.transaction_id == transaction_id)).first()
    return None if row is None else _transaction(connection, row)


def _transaction(connection: Connection, row: Row[Any]) -> Transaction:
    lines = connection.execute(
        select(entries).where(entries.c.transaction_id == row.transaction_id).order_by(entries.c.line)
    )
    return Transaction(
        transaction_id=row.transaction_id,
        kind=TransactionKind(row.kind),
        currency=row.currency,
        at=from_micros(row.at),
        memo=row.memo,
        entries=tuple(Entry(Account(line.account), Nanos(line.amount)) for line in lines),
    )


def unbalanced_transactions(connection: Connection, limit: int = 100) -> list[tuple[str, Nanos]]:
    """Transactions whose entries do not add up to zero, with what is left over; at most `limit` of them."""
    left = func.sum(entries.c.amount)
    query = select(entries.c.transaction_id, left).group_by(entries.c.transaction_id).having(left != 0)
    rows = connection.execute(query.order_by(entries.c.transaction_id).limit(limit))
    return [(str(transaction_id), Nanos(int(amount))) for transaction_id, amount in rows]


def verify_books(connection: Connection) -> dict[str, tuple[Discrepancy, ...]]:
    """Compare each account's kept balance with the sum of its entries, by currency.

    An empty tuple is a clean book.

    The total of all accounts of a currency shows up as the account `all:accounts`, which must be zero.
    """
    found: dict[str, tuple[Discrepancy, ...]] = {}
    currencies = connection.execute(select(accounts.c.currency).distinct()).scalars().all()
    for currency in currencies:
        kept = {
            Account(row.account): Nanos(row.balance)
            for row in connection.execute(select(accounts).where(accounts.c.currency == currency))
        }
        summed = [
            Entry(Account(row[0]), Nanos(int(row[1])))
            for row in connection.execute(
                select(entries.c.account, func.sum(entries.c.amount))
                .where(entries.c.currency == currency)
                .group_by(entries.c.account)
            )
            if row[1]
        ]
        rows = discrepancies(kept, summed)
        total = sum(kept.values())
        if total != 0:
            rows = (*rows, Discrepancy(Account("all:accounts"), Nanos(total), Nanos(0)))
        found[currency] = rows
    return found
