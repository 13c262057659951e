"""Usage records as they come in masses: rows of which nothing is stored yet, a statement for each table.

It is what `store.usage.store_records` does, for batches in which all is as it nearly always is: no request is stored
already, and every account is open. The database itself says where it is not so, and then nothing of the batch is
stored; `store_records` knows what to do with it. Once is enough either way, as the caller's transaction moves its place
in the log as well.
"""

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from tidemill.ledger.posting import TransactionKind, usage_charge_entries
from tidemill.store.bulk import insert_structs, run
from tidemill.store.ids import new_ids_in_order

_encode = msgspec.json.Encoder().encode


class NotAllNew(Exception):
    """Something of the batch is stored already, or one of its accounts is not open yet."""


class RecordRow(msgspec.Struct, gc=False):
    """A row of `usage_records`, without the columns that are null for nearly all requests: a null costs as well."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    replica: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    estimated: bool
    status: str
    streamed: bool
    price_id: str
    currency: str
    charge_input: int
    charge_cached: int
    charge_output: int
    uncollected: int
    hold: int
    started_at: int
    first_token_at: int | None
    finished_at: int
    device_ns: int
    transaction_id: str | None = None


class WholeRecordRow(RecordRow, gc=False, kw_only=True):
    """A row with all columns."""

    charge_more: int | None
    components: str | None
    service_class: str | None
    mode: str | None
    project: str | None
    tags: str | None
    rule_id: str | None
    list_amount: int | None


class ChargeRows(msgspec.Struct, gc=False):
    """The rows of one tenant, currency and billing month, which one transaction pays for."""

    tenant_id: str
    currency: str
    amount: int
    """Nanos, more than zero."""
    at: int
    """When the last of the requests finished."""
    rows: list[RecordRow]


class _Transaction(msgspec.Struct, gc=False):
    transaction_id: str
    kind: str
    tenant_id: str
    currency: str
    at: int
    memo: str


class _Entry(msgspec.Struct, gc=False):
    transaction_id: str
    line: int
    account: str
    currency: str
    amount: int


class _Move(msgspec.Struct, gc=False):
    amount: int
    account: str
    currency: str


def store_rows(connection: Connection, rows: Sequence[RecordRow], charges: Sequence[ChargeRows]) -> None:
    """Store rows and post their charges, in the caller's transaction. Raises NotAllNew; that is to be rolled back.

    Accounts are moved, and so locked, in the order of their names and before the records are stored, as everybody does
    (`store.accounts.post`, `store.budgets`).
    """
    made: list[_Transaction] = []
    lines: list[_Entry] = []
    moves: dict[tuple[str, str], int] = {}
    kind = TransactionKind.USAGE_CHARGE.value
    for name, charge in zip(new_ids_in_order("txn", len(charges)), charges, strict=True):
        currency = charge.currency
        made.append(_Transaction(name, kind, charge.tenant_id, currency, charge.at, f"{len(charge.rows)} requests"))
        for line, (account, amount) in enumerate(usage_charge_entries(charge.tenant_id, charge.amount)):
            lines.append(_Entry(name, line, account, currency, amount))
            moves[account, currency] = moves.get((account, currency), 0) + amount
        for row in charge.rows:
            row.transaction_id = name
    in_order = sorted(rows, key=lambda row: row.request_id)
    plain = [row for row in in_order if type(row) is RecordRow]
    try:
        insert_structs(connection, "transactions", made)
        insert_structs(connection, "entries", lines)
        _move(connection, [_Move(amount, *account) for account, amount in sorted(moves.items())])
        # In one order, so that two that store the same requests never wait for each other in a ring.
        insert_structs(connection, "usage_records", plain)
        if len(plain) < len(in_order):
            insert_structs(connection, "usage_records", [row for row in in_order if type(row) is WholeRecordRow])
    except IntegrityError as error:
        raise NotAllNew from error


def _move(connection: Connection, moves: list[_Move]) -> None:
    """Move the balances of open accounts, given in order. Raises NotAllNew when one is not open."""
    if not moves:
        return
    if connection.dialect.name == "sqlite":
        changed = connection.exec_driver_sql(
            "UPDATE accounts SET balance = balance + ? WHERE account = ? AND currency = ?",
            list(map(msgspec.structs.astuple, moves)),
        )
    else:
        text = _encode(moves).decode()
        # The rows of an UPDATE are locked in any order.
        run(connection, f"SELECT FROM accounts JOIN {_MOVES} USING (account, currency) {_IN_ORDER}", text)
        changed = run(
            connection,
            f"UPDATE accounts SET balance = balance + moves.amount FROM {_MOVES}"
            " WHERE accounts.account = moves.account AND accounts.currency = moves.currency",
            text,
        )
    if changed.rowcount != len(moves):
        raise NotAllNew


_MOVES = "json_to_recordset(?::json) AS moves (account text, currency text, amount bigint)"
_IN_ORDER = 'ORDER BY accounts.account COLLATE "C", accounts.currency COLLATE "C" FOR UPDATE OF accounts'


def return_leases(connection: Connection, worker_id: str, spent: Sequence[tuple[str, int]]) -> None:
    """Take what was spent from a worker's leases, by tenant in order; never below zero."""
    if connection.dialect.name == "sqlite":
        if spent:
            connection.exec_driver_sql(
                "UPDATE leases SET amount = max(amount - ?, 0) WHERE worker_id = ? AND tenant_id = ?",
                [(amount, worker_id, tenant_id) for tenant_id, amount in spent],
            )
        return
    run(
        connection,
        "UPDATE leases SET amount = greatest(leases.amount - spent.amount, 0)"
        " FROM json_to_recordset(?::json) AS spent (tenant_id text, amount bigint)"
        " WHERE leases.worker_id = ? AND leases.tenant_id = spent.tenant_id",
        _encode([{"tenant_id": tenant_id, "amount": amount} for tenant_id, amount in spent]).decode(),
        worker_id,
    )


def with_budgets(connection: Connection, tenant_ids: Sequence[str]) -> set[str]:
    """Those of the tenants that have a budget."""
    among = (
        "SELECT value FROM json_each(?)"
        if connection.dialect.name == "sqlite"
        else ("SELECT json_array_elements_text(?::json)")
    )
    found = run(
        connection,
        f"SELECT DISTINCT tenant_id FROM limits WHERE kind = 'budget' AND tenant_id IN ({among})",
        _encode(tenant_ids).decode(),
    )
    return {str(row[0]) for row in found}
