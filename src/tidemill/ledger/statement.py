"""The usage statement: what one tenant used and what it cost, in a month or in all, by model. Exact sums."""

from collections.abc import Iterable
from datetime import datetime

import msgspec

from tidemill.ledger.devices import DeviceSum, seconds_text, sum_devices
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import ZERO, Nanos, check_currency, format_amount
from tidemill.ledger.period import Period
from tidemill.ledger.usage import UsageRecord


class UsageTotals(msgspec.Struct, frozen=True):
    """Sums over usage records. Each accepted request is one record, also one that failed and cost nothing."""

    requests: int = 0
    prompt_tokens: int = 0
    """Includes `cached_tokens`."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    charge: Nanos = ZERO

    def __add__(self, other: "UsageTotals") -> "UsageTotals":
        return UsageTotals(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            charge=Nanos(self.charge + other.charge),
        )


class UsageStatement(msgspec.Struct, frozen=True):
    """One tenant's usage, in one currency. `totals` is the sum of `by_model`, without device time."""

    tenant_id: str
    currency: str
    period: Period | None
    """None: from the beginning."""
    totals: UsageTotals
    by_model: dict[str, UsageTotals]
    """In order of the models' names."""
    devices: tuple[DeviceSum, ...] = ()
    """Device time of jobs and reservations."""

    @property
    def charge(self) -> Nanos:
        """What all of it cost."""
        return Nanos(self.totals.charge + sum_devices(self.devices)[0])


def check_record(record: UsageRecord, *, tenant_id: str, currency: str, period: Period | None) -> None:
    """Raise LedgerError unless the record belongs here: a wrong query must not become a bill.

    A request belongs to the month in which it finished.
    """
    if record.tenant_id != tenant_id:
        raise LedgerError(f"record {record.request_id} is of tenant {record.tenant_id}, not of {tenant_id}")
    if record.currency != currency:
        raise LedgerError(f"record {record.request_id} is in {record.currency}, not in {currency}")
    if period is not None and record.finished_at not in period:
        raise LedgerError(f"record {record.request_id} finished at {record.finished_at}, not in {period.month}")


def usage_statement(
    records: Iterable[UsageRecord], *, tenant_id: str, currency: str, period: Period | None = None
) -> UsageStatement:
    """Add up a tenant's records. Raises LedgerError at a record of another tenant, currency or period."""
    rows: dict[str, list[int]] = {}
    for record in records:
        check_record(record, tenant_id=tenant_id, currency=currency, period=period)
        row = rows.setdefault(record.model, [0, 0, 0, 0, 0])
        row[0] += 1
        row[1] += record.usage.prompt
        row[2] += record.usage.cached
        row[3] += record.usage.completion
        row[4] += record.charge
    sums = (
        (model, UsageTotals(requests, prompt, cached, completion, Nanos(charge)))
        for model, (requests, prompt, cached, completion, charge) in rows.items()
    )
    return statement_of_rows(sums, tenant_id=tenant_id, currency=currency, period=period)


def statement_of_rows(
    rows: Iterable[tuple[str, UsageTotals]],
    *,
    tenant_id: str,
    currency: str,
    period: Period | None = None,
    devices: Iterable[DeviceSum] = (),
) -> UsageStatement:
    """The same from sums that a database has made: (model, totals); a model may come in several rows."""
    check_currency(currency)
    by_model: dict[str, UsageTotals] = {}
    for model, totals in rows:
        by_model[model] = by_model.get(model, UsageTotals()) + totals
    return UsageStatement(
        tenant_id=tenant_id,
        currency=currency,
        period=period,
        totals=sum(by_model.values(), UsageTotals()),
        by_model=dict(sorted(by_model.items())),
        devices=tuple(devices),
    )


def totals_to_json(totals: UsageTotals) -> dict[str, int | str]:
    """Counts as integers, the charge as a decimal string."""
    return {
        "requests": totals.requests,
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "completion_tokens": totals.completion_tokens,
        "charge": format_amount(totals.charge),
    }


def to_json(statement: UsageStatement) -> dict[str, object]:
    """The statement as plain values; the caller adds what it alone knows, such as the balance of now."""
    return {
        "tenant_id": statement.tenant_id,
        "currency": statement.currency,
        "month": statement.period.month if statement.period else None,
        **totals_to_json(statement.totals),
        "charge": format_amount(statement.charge),
        "models": {model: totals_to_json(totals) for model, totals in statement.by_model.items()},
        "devices": [
            {
                "kind": row.kind,
                "tier": row.tier.value,
                "price_id": row.price_id,
                "device_seconds": seconds_text(row.device_us),
                "meters": row.meters,
                "charge": format_amount(row.amount),
                "uncollected": format_amount(row.uncollected),
            }
            for row in statement.devices
        ],
    }


def record_to_json(record: UsageRecord) -> dict[str, object]:
    """One usage record as plain values: instants in ISO 8601 UTC, amounts as decimal strings."""
    return {
        "request_id": record.request_id,
        "key_id": record.key_id,
        "model": record.model,
        "replica": record.replica,
        "status": record.status.value,
        "streamed": record.streamed,
        "estimated": record.estimated,
        "prompt_tokens": record.usage.prompt,
        "cached_tokens": record.usage.cached,
        "completion_tokens": record.usage.completion,
        "charge": format_amount(record.charge),
        "charge_input": format_amount(record.charge_input),
        "charge_cached": format_amount(record.charge_cached),
        "charge_output": format_amount(record.charge_output),
        "uncollected": format_amount(record.uncollected),
        "hold": format_amount(record.hold),
        "currency": record.currency,
        "price_id": record.price_id,
        "started_at": _instant(record.started_at),
        "first_token_at": _instant(record.first_token_at),
        "finished_at": _instant(record.finished_at),
        "device_ns": record.device_ns,
    }


def _instant(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()
