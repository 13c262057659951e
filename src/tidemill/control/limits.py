"""Limits as operators see them: set, listed with what is used of them, removed.

Plain values in and out.
"""

from collections.abc import Collection
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection

from tidemill.control.names import check_text, known_model, read_amount, tenant_named
from tidemill.errors import BadInput, NotFound
from tidemill.ledger.limits import BudgetSpan, Limit, LimitKind, Per, span_of, title_of
from tidemill.ledger.money import format_amount
from tidemill.store import limits as limit_store
from tidemill.store.budgets import leased_in, spent_in, warned
from tidemill.store.engine import store_time
from tidemill.store.keys import Key, find_key, list_keys
from tidemill.store.limit_leases import rates_in_force, slots_in_use
from tidemill.store.tenants import Tenant, list_tenants
from tidemill.suggestions import did_you_mean

Json = dict[str, Any]

MAX_ID = 255


class LimitSpec(msgspec.Struct, kw_only=True):
    """What an operator wants to be limited; at least one of the five kinds."""

    tenant: str
    key: str | None = None
    model: str | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    budget: str | None = None
    """A decimal amount in the tenant's currency."""
    per: str | None = None
    """`day` or `month`; `month` when not given."""
    soft_percent: int | None = None


def set_limits(connection: Connection, spec: LimitSpec, *, models: Collection[str], zone: str, now: datetime) -> Json:
    """Put limits in force, each in the place of one of its kind on the same scope.

    Raises NotFound, BadInput.
    """
    owner = tenant_named(connection, spec.tenant)
    key_id = None if spec.key is None else _key_of(connection, owner, spec.key).first_id
    model = None if spec.model is None else known_model(spec.model, models)
    template = Limit(limit_id="", tenant_id=owner.tenant_id, key_id=key_id, model=model, kind=LimitKind.RPM, amount=0)
    wanted = [
        _counted(template, kind, amount)
        for kind, amount in (
            (LimitKind.RPM, spec.rpm),
            (LimitKind.TPM, spec.tpm),
            (LimitKind.CONCURRENCY, spec.concurrency),
        )
        if amount is not None
    ]
    if spec.budget is not None:
        wanted.append(_budget(template, spec.budget, spec.per, spec.soft_percent))
    elif spec.per is not None or spec.soft_percent is not None:
        param = "per" if spec.per is not None else "soft_percent"
        raise BadInput(f"{param} is only allowed with budget.", hint="Add budget.", param=param)
    if not wanted:
        raise BadInput("No limit was given.", hint="Give rpm, tpm, concurrency or budget.")
    made = [limit_store.set_limit(connection, limit, now=now) for limit in wanted]
    return {"limits": _described(connection, made, zone=zone, now=now)}


def list_limits(connection: Connection, tenant: str | None, *, zone: str, now: datetime) -> Json:
    """The limits of a tenant, or of all, with what is used of them now. Raises NotFound."""
    tenant_id = None if tenant is None else tenant_named(connection, tenant).tenant_id
    return {"limits": _described(connection, limit_store.list_limits(connection, tenant_id), zone=zone, now=now)}


def remove_limit(connection: Connection, limit: str, *, zone: str, now: datetime) -> Json:
    """Take a limit out of force; returns it as it was. Raises NotFound with the nearest id."""
    limit_id = check_text("limit", limit, longest=MAX_ID)
    found = limit_store.find_limit(connection, limit_id)
    (described,) = _described(connection, [found], zone=zone, now=now)
    limit_store.remove_limit(connection, limit_id)
    return described


def _counted(template: Limit, kind: LimitKind, amount: int) -> Limit:
    limit = msgspec.structs.replace(template, kind=kind, amount=amount)
    if not 1 <= amount <= limit.most:
        raise BadInput(f"{kind} must be from 1 to {limit.most:,}, not {amount:,}.", param=kind)
    return limit


def _budget(template: Limit, budget: str, per: str | None, soft_percent: int | None) -> Limit:
    amount = read_amount("budget", budget)
    if amount <= 0:
        raise BadInput("budget must be more than zero.", param="budget")
    try:
        period = Per(per or Per.MONTH)
    except ValueError as error:
        hint = did_you_mean(str(per), [each.value for each in Per]) or "Choose one of: day, month."
        raise BadInput(f"per: {str(per)[:80]!r} is not a budget period.", hint=hint, param="per") from error
    if soft_percent is not None and not 1 <= soft_percent <= 100:
        raise BadInput(f"soft_percent must be from 1 to 100, not {soft_percent}.", param="soft_percent")
    return msgspec.structs.replace(
        template, kind=LimitKind.BUDGET, amount=amount, per=period, soft_percent=soft_percent
    )


def _key_of(connection: Connection, owner: Tenant, key: str) -> Key:
    given = check_text("key", key, longest=MAX_ID)
    known = list_keys(connection, owner.tenant_id)
    try:
        found = find_key(connection, given)
    except NotFound as error:
        # An id may be repeated with the nearest one; a secret may not, and has no near one.
        hint = did_you_mean(given, [each.key_id for each in known]) if given.startswith("key_") else ""
        raise NotFound(f"{owner.name} has no such key.", hint=hint or error.hint, param="key") from error
    if found.tenant_id != owner.tenant_id:
        raise NotFound(f"{owner.name} has no such key.", hint="The key belongs to another tenant.", param="key")
    return found


def _described(connection: Connection, limits: list[Limit], *, zone: str, now: datetime) -> list[Json]:
    second = int(store_time(connection))
    counts = {**rates_in_force(connection, second), **slots_in_use(connection, second)}
    warnings = warned(connection)
    tenants = {each.tenant_id: each for each in list_tenants(connection)}
    found = []
    for limit in limits:
        owner = tenants[limit.tenant_id]
        about: Json = {
            "id": limit.limit_id,
            "tenant": owner.name,
            "key": limit.key_id,
            "model": limit.model,
            "kind": limit.kind.value,
            "text": title_of(limit, owner.currency),
        }
        if limit.per is None:
            about |= {"amount": limit.amount, "used": counts.get(limit.limit_id, 0)}
            about |= dict.fromkeys(
                ("budget", "spent", "leased", "currency", "per", "period", "ends_at", "soft_percent")
            )
            about["warned"] = False
        else:
            span = span_of(now, limit.per, zone)
            about |= {"amount": None, "used": None, **_money(connection, limit, span), "currency": owner.currency}
            about["warned"] = (limit.limit_id, span.label) in warnings
        found.append(about)
    return found


def _money(connection: Connection, limit: Limit, span: BudgetSpan) -> Json:
    return {
        "budget": format_amount(limit.amount),
        "spent": format_amount(spent_in(connection, limit, span)),
        "leased": format_amount(leased_in(connection, limit, span)),
        "per": limit.per,
        "period": span.label,
        "ends_at": span.end.isoformat(),
        "soft_percent": limit.soft_percent,
    }
