"""What the platform knows, as plain values that JSON can carry.

The same for the API and for a stopped platform's CLI.

Each function reads in the caller's transaction. Amounts are decimal strings, instants ISO 8601 UTC.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from tidemill.clock import from_micros, to_micros
from tidemill.control.names import read_month, tenant_named
from tidemill.control.pages import check_limit
from tidemill.control.platform import PlatformModel
from tidemill.errors import BadInput
from tidemill.ledger.components import CATALOGUE
from tidemill.ledger.devices import seconds_text
from tidemill.ledger.invoice import Invoice, make_invoice
from tidemill.ledger.invoice import to_json as invoice_to_json
from tidemill.ledger.invoice_text import to_text as invoice_to_text
from tidemill.ledger.money import ZERO, Nanos, format_amount
from tidemill.ledger.period import Period, period_of
from tidemill.ledger.pricing import PriceTier, PriceVersion
from tidemill.ledger.statement import record_to_json, statement_of_rows
from tidemill.ledger.statement import to_json as statement_to_json
from tidemill.ledger.usage import UsageRecord
from tidemill.store.accounts import balance_at, credits_between, tenant_balance, tenant_balances
from tidemill.store.device_meters import device_sums, meter_rows, to_be_read
from tidemill.store.device_prices import device_price_versions
from tidemill.store.keys import Key, list_keys
from tidemill.store.prices import current_prices, price_versions
from tidemill.store.tenants import Tenant, list_tenants
from tidemill.store.usage import month_usage, records_between, usage_totals

PAGE_RECORDS = 1_000
"""Usage records in one answer, when nothing else was asked for."""
MAX_PAGE_RECORDS = 10_000
"""The most usage records in one answer, about 6 MB; `next` leads to the rest."""

Json = dict[str, Any]


def tenants(connection: Connection, tenant: str | None = None) -> Json:
    """The tenants and their balances, oldest first; or the one of this name or id. Raises NotFound."""
    balances = tenant_balances(connection)
    found = list_tenants(connection) if tenant is None else [tenant_named(connection, tenant)]
    return {"tenants": [tenant_json(each, balances.get(each.tenant_id, ZERO)) for each in found]}


def tenant_json(tenant: Tenant, balance: Nanos) -> Json:
    """One tenant as plain values."""
    return {
        "id": tenant.tenant_id,
        "name": tenant.name,
        "currency": tenant.currency,
        "balance": format_amount(balance),
        "created_at": tenant.created_at.isoformat(),
        "weight": tenant.weight,
    }


def keys(connection: Connection, tenant: str | None = None) -> Json:
    """The API keys of all tenants, or of one, revoked ones included. Raises NotFound."""
    if tenant is None:
        names = {each.tenant_id: each.name for each in list_tenants(connection)}
        return {"keys": [key_json(key, names[key.tenant_id]) for key in list_keys(connection)]}
    owner = tenant_named(connection, tenant)
    return {"keys": [key_json(key, owner.name) for key in list_keys(connection, owner.tenant_id)]}


def key_json(key: Key, tenant_name: str) -> Json:
    """One key as plain values; the secret is not among them, as nobody has it."""
    return {
        "id": key.key_id,
        "tenant": tenant_name,
        "name": key.name,
        "hint": key.hint,
        "created_at": key.created_at.isoformat(),
        "revoked_at": None if key.revoked_at is None else key.revoked_at.isoformat(),
        "expires_at": None if key.policy.expires_at is None else key.policy.expires_at.isoformat(),
        "models": list(key.policy.models),
        "ips": list(key.policy.networks),
        "first_id": key.first_id,
    }


def usage(
    connection: Connection,
    tenant: str,
    *,
    zone: str,
    month: str | None = None,
    records: bool = False,
    after: str | None = None,
    limit: int = PAGE_RECORDS,
) -> Json:
    """A tenant's usage in a month, or in all, and the balance of now.

    With `records` also the records, oldest first, at most `limit` of them; `next` is then the `after` of the next
    page, or None when there is none. The sums are always of everything. Raises NotFound, BadInput.
    """
    owner = tenant_named(connection, tenant)
    period = None if month is None else read_month(month, zone)
    start, end = (None, None) if period is None else (period.start, period.end)
    statement = statement_of_rows(
        usage_totals(connection, tenant_id=owner.tenant_id, start=start, end=end),
        tenant_id=owner.tenant_id,
        currency=owner.currency,
        period=period,
        devices=device_sums(connection, tenant_id=owner.tenant_id, month=None if period is None else period.month),
    )
    answer: Json = {
        "tenant": owner.name,
        **statement_to_json(statement),
        "balance": format_amount(tenant_balance(connection, owner.tenant_id)),
        "zone": zone,
    }
    if records:
        check_limit(limit, MAX_PAGE_RECORDS)
        page = list(
            records_between(
                connection,
                tenant_id=owner.tenant_id,
                start=start,
                end=end,
                after=None if after is None else _read_cursor(after),
                limit=limit + 1,
            )
        )
        if after is None and statement.devices:
            answer["device_records"] = device_records(connection, owner.tenant_id, period)
        answer["records"] = [record_to_json(record) for record in page[:limit]]
        answer["next"] = _cursor(page[limit - 1]) if len(page) > limit else None
    return answer


def device_records(connection: Connection, tenant_id: str, period: Period | None) -> list[Json]:
    """The rentals behind the sums of device time, the earliest begun first.

    Attempts at jobs, and reservations.
    """
    month = None if period is None else period.month
    return [
        {
            "meter_id": row.meter.meter_id,
            "job_id": row.meter.job_id,
            "attempt": row.meter.attempt,
            "reservation_id": row.meter.reservation_id,
            "kind": row.meter.kind,
            "tier": row.meter.tier.value,
            "devices": row.meter.devices,
            "price_id": row.meter.price_id,
            "started_at": row.meter.started_at.isoformat(),
            "ended_at": None if row.meter.ended_at is None else row.meter.ended_at.isoformat(),
            "device_seconds": seconds_text(row.device_us),
            "charge": format_amount(row.amount),
            "uncollected": format_amount(row.uncollected),
            "currency": row.meter.currency,
        }
        for row in meter_rows(connection, tenant_id=tenant_id, month=month)
    ]


def _cursor(record: UsageRecord) -> str:
    return f"{to_micros(record.finished_at)}.{record.request_id}"


def _read_cursor(text: str) -> tuple[datetime, str]:
    micros, _, request_id = text.partition(".")
    if not (micros.isascii() and micros.isdecimal() and len(micros) <= 17 and request_id.isprintable() and request_id):
        raise BadInput(f"after: {text[:80]!r} is not a `next` of an earlier page.", param="after")
    return from_micros(int(micros)), request_id


def invoice(
    connection: Connection, tenant: str, month: str | None, *, zone: str, issuer: str, now: datetime
) -> Invoice:
    """A tenant's invoice of a month, of the current one when none is named.

    A draft while it is not over at `now`, or while device time of it is still to be charged.

    Raises NotFound, BadInput.
    """
    owner = tenant_named(connection, tenant)
    period = read_month(this_month(zone, now) if month is None else month, zone)
    if now < period.start:
        raise BadInput(f"month: {period.title} has not begun yet.", param="month")
    usage_of_month = month_usage(connection, tenant_id=owner.tenant_id, currency=owner.currency, period=period)
    price_ids = {row.price_id for row in usage_of_month.sums}
    device_price_ids = {row.price_id for row in usage_of_month.devices}
    return make_invoice(
        usage_of_month,
        tenant_name=owner.name,
        prices={version.price_id: version for version in price_versions(connection, price_ids)},
        opening_balance=balance_at(connection, owner.tenant_id, period.start),
        credits=credits_between(connection, owner.tenant_id, period.start, period.end),
        as_of=now,
        issuer=issuer,
        device_prices={price.price_id: price for price in device_price_versions(connection, device_price_ids)},
        complete=not to_be_read(connection, tenant_id=owner.tenant_id, before=period.end),
    )


def invoice_json(
    connection: Connection, tenant: str, month: str | None, *, zone: str, issuer: str, now: datetime
) -> Json:
    """The invoice as plain values."""
    return invoice_to_json(invoice(connection, tenant, month, zone=zone, issuer=issuer, now=now))


def invoice_text(
    connection: Connection, tenant: str, month: str | None, *, zone: str, issuer: str, now: datetime
) -> str:
    """The invoice as a page of text."""
    return invoice_to_text(invoice(connection, tenant, month, zone=zone, issuer=issuer, now=now))


def models(connection: Connection, running: Sequence[PlatformModel] | None, *, now: datetime) -> Json:
    """The models that run, with their prices by currency.

    Of a stopped platform (None) those that have a price.
    """
    priced: dict[str, Json] = {}
    for (model, currency), version in current_prices(connection, now).items():
        priced.setdefault(model, {})[currency] = _price_json(version)
    if running is None:
        return {"models": [_stopped_model(name, priced[name]) for name in sorted(priced)]}
    return {
        "models": [
            {
                "name": view.name,
                "engine": view.engine,
                "state": view.state,
                "replicas_ready": view.replicas_ready,
                "replicas_total": view.replicas_total,
                "endpoint": view.endpoint,
                "prices": priced.get(view.name, {}),
            }
            for view in sorted(running, key=lambda view: view.name)
        ]
    }


def _stopped_model(name: str, of_currency: Json) -> Json:
    return {
        "name": name,
        "engine": None,
        "state": "stopped",
        "replicas_ready": 0,
        "replicas_total": 0,
        "endpoint": None,
        "prices": of_currency,
    }


def prices(connection: Connection, *, history: bool, now: datetime) -> Json:
    """The price versions in force at `now`; with `history` all that ever were, oldest first."""
    if history:
        found = price_versions(connection)
    else:
        found = [version for tier in PriceTier for version in current_prices(connection, now, tier).values()]
        found.sort(key=lambda version: (version.model, version.currency, list(PriceTier).index(version.tier)))
    return {
        "prices": [
            {
                "id": version.price_id,
                "model": version.model,
                "currency": version.currency,
                "tier": version.tier.value,
                **_price_json(version),
                "valid_from": version.valid_from.isoformat(),
            }
            for version in found
        ]
    }


def _price_json(version: PriceVersion) -> Json:
    rates = version.price.rates
    return {component.key: format_amount(rates[component]) for component in CATALOGUE if component in rates}


def this_month(zone: str, now: datetime) -> str:
    """The billing month of `now`, e.g. `2026-11`."""
    return period_of(now, zone).month
