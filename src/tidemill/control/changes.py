"""What an operator changes: tenants, keys, credits.

Each function writes in the caller's transaction and returns what became of it as plain values.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import TypeVar

import msgspec
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from tidemill.control.names import (
    check_text,
    known_model,
    read_amount,
    read_currency,
    read_duration,
    read_expiry,
    read_network,
    tenant_named,
)
from tidemill.control.queries import Json, key_json, tenant_json
from tidemill.errors import BadInput, Conflict
from tidemill.ledger.money import MAX_NANOS, ZERO, Nanos, format_amount
from tidemill.ledger.posting import FUNDING_CREDIT, MAX_MEMO, credit_grant, tenant_account
from tidemill.store import keys as key_store
from tidemill.store import tenants as tenant_store
from tidemill.store.accounts import account_balance, find_transaction, post, tenant_balance
from tidemill.store.engine import Store
from tidemill.store.ids import new_id
from tidemill.store.keys import ANYTHING, KeyPolicy
from tidemill.store.prices import current_prices

T = TypeVar("T")

MAX_IDEMPOTENCY_KEY = 255
MAX_BINDINGS = 60
"""Models, or networks, that one key is bound to."""
MAX_KEY = 255
"""Longest text that is looked up as a key or a key's id, characters."""


def write(store: Store, change: Callable[[Connection], T]) -> T:
    """Run `change` in a write transaction of its own.

    When another process has taken the same name or account in the same moment (PostgreSQL), it runs once more and
    then sees what the other has done.
    """
    try:
        with store.write() as connection:
            return change(connection)
    except IntegrityError:
        with store.write() as connection:
            return change(connection)


def create_tenant(connection: Connection, *, name: str, currency: str, now: datetime) -> Json:
    """Add a tenant.

    `warning` says so when no model has a price in its currency. Raises Conflict, BadInput.
    """
    read_currency(currency)
    tenant = tenant_store.create_tenant(connection, name=name, currency=currency, now=now)
    priced = {code for _, code in current_prices(connection, now)}
    warning = None
    if currency not in priced:
        warning = f"No model has a price in {currency} yet: add [prices.MODEL.{currency}] to the configuration."
    return {**tenant_json(tenant, ZERO), "warning": warning}


def create_key(connection: Connection, *, tenant: str, name: str, now: datetime, policy: KeyPolicy = ANYTHING) -> Json:
    """Make a key.

    The answer is the only place where the key itself is ever seen. Raises NotFound, BadInput.
    """
    owner = tenant_named(connection, tenant)
    key, secret = key_store.create_key(connection, tenant_id=owner.tenant_id, name=name, now=now, policy=policy)
    return {"key": secret, **key_json(key, owner.name)}


def key_policy(
    *,
    expires: str | None,
    models: Sequence[str],
    ips: Sequence[str],
    known_models: Collection[str],
    zone: str,
    now: datetime,
) -> KeyPolicy:
    """What a key shall be bound to. Raises BadInput."""
    if len(models) > MAX_BINDINGS or len(ips) > MAX_BINDINGS:
        param = "models" if len(models) > MAX_BINDINGS else "ips"
        raise BadInput(f"{param}: at most {MAX_BINDINGS} entries are allowed.", param=param)
    return KeyPolicy(
        expires_at=None if expires is None else read_expiry("expires", expires, zone=zone, now=now),
        models=tuple(dict.fromkeys(known_model(model, known_models) for model in models)),
        networks=tuple(dict.fromkeys(read_network(text) for text in ips)),
    )


def rotate_key(connection: Connection, *, key: str, overlap: str, now: datetime) -> Json:
    """Make a successor of a key, which the key itself outlives by `overlap`.

    Raises NotFound, Conflict, BadInput.
    """
    lasting = read_duration("overlap", overlap)
    old, new, secret = key_store.rotate_key(
        connection, key=check_text("key", key, longest=MAX_KEY), overlap=lasting, now=now
    )
    owner = tenant_store.find_tenant(connection, old.tenant_id).name
    return {"key": secret, **key_json(new, owner), "replaces": key_json(old, owner)}


def set_weight(connection: Connection, *, tenant: str, weight: int) -> Json:
    """Give a tenant another share of full models. Raises NotFound, BadInput."""
    owner = tenant_named(connection, tenant)
    tenant_store.set_weight(connection, tenant_id=owner.tenant_id, weight=weight)
    changed = msgspec.structs.replace(owner, weight=weight)
    return tenant_json(changed, tenant_balance(connection, owner.tenant_id))


def revoke_key(connection: Connection, *, key: str, now: datetime) -> Json:
    """Revoke a key, given itself or its id; revoking it again changes nothing. Raises NotFound, BadInput."""
    revoked = key_store.revoke_key(connection, key=check_text("key", key, longest=MAX_KEY), now=now)
    return key_json(revoked, tenant_store.find_tenant(connection, revoked.tenant_id).name)


def grant_credit(
    connection: Connection,
    *,
    tenant: str,
    amount: str,
    now: datetime,
    memo: str = "",
    idempotency_key: str | None = None,
) -> Json:
    """Give a tenant an amount to spend, in its currency.

    With an `idempotency_key` the grant happens once, however often it is asked for; `replayed` tells. Raises
    NotFound, BadInput, and Conflict when the key was used for another amount.
    """
    owner = tenant_named(connection, tenant)
    nanos = read_amount("amount", amount)
    memo = check_text("memo", memo, longest=MAX_MEMO, empty=True)
    if nanos <= 0:
        raise BadInput("amount must be more than zero.", param="amount")
    transaction_id = new_id("txn")
    if idempotency_key is not None:
        transaction_id = _grant_id(owner.tenant_id, idempotency_key)
    grant = credit_grant(
        transaction_id, tenant_id=owner.tenant_id, currency=owner.currency, amount=nanos, at=now, memo=memo
    )
    earlier = find_transaction(connection, transaction_id) if idempotency_key is not None else None
    if earlier is not None and earlier.amount_on(tenant_account(owner.tenant_id)) != nanos:
        granted = format_amount(earlier.amount_on(tenant_account(owner.tenant_id)))
        raise Conflict(
            f"The idempotency key {idempotency_key!r} was already used for a grant of {granted} {earlier.currency}.",
            hint="Repeat the same grant, or use another key.",
            param="idempotency_key",
        )
    if earlier is None:
        _check_room(connection, owner, nanos)
        post(connection, grant)
    made = earlier or grant
    return {
        "tenant": owner.name,
        "transaction_id": made.transaction_id,
        "amount": format_amount(nanos),
        "currency": owner.currency,
        "memo": made.memo,
        "at": made.at.isoformat(),
        "balance": format_amount(tenant_balance(connection, owner.tenant_id)),
        "replayed": earlier is not None,
    }


def _grant_id(tenant_id: str, idempotency_key: str) -> str:
    """The transaction's id follows from the key, so that the database itself refuses a second one."""
    key = check_text("idempotency_key", idempotency_key, longest=MAX_IDEMPOTENCY_KEY)
    return "txn_" + hashlib.sha256(f"{tenant_id}\n{key}".encode()).hexdigest()[:28]


def _check_room(connection: Connection, owner: tenant_store.Tenant, nanos: Nanos) -> None:
    # SQLite would turn a sum beyond 64 bits into a float without a word.
    held = tenant_balance(connection, owner.tenant_id, lock=True)
    funded = -account_balance(connection, FUNDING_CREDIT, owner.currency)
    if max(held, funded) + nanos > MAX_NANOS:
        raise BadInput(
            f"amount is too large: {owner.name} or all grants in {owner.currency} would exceed the maximum"
            f" of {format_amount(MAX_NANOS, grouped=True)}.",
            param="amount",
        )
