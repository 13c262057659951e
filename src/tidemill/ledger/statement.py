"""The usage statement: what one tenant used and what it cost, in a month or in all, by model.

Exact sums.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import msgspec

from tidemill.ledger.components import BASE, PLACE, Component
from tidemill.ledger.devices import DeviceSum, seconds_text, sum_devices
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import ZERO, Nanos, check_currency, format_amount
from tidemill.ledger.period import Period
from tidemill.ledger.usage import UsageRecord


class ComponentSum(msgspec.Struct, frozen=True):
    """One further component, summed over usage records."""

    quantity: int = 0
    charge: Nanos = ZERO
    """Zero where it was counted with what it is part of, or costs nothing."""

    def __add__(self, other: "ComponentSum") -> "ComponentSum":
        return ComponentSum(self.quantity + other.quantity, Nanos(self.charge + other.charge))


class UsageTotals(msgspec.Struct, frozen=True):
    """Sums over usage records. Each accepted request is one record, also one that failed and cost nothing."""

    requests: int = 0
    prompt_tokens: int = 0
    """Includes `cached_tokens`."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    charge: Nanos = ZERO
    """What all components cost."""
    more: dict[Component, ComponentSum] = {}
    """The components beyond tokens of prompts and answers, where there are any."""

    def __add__(self, other: "UsageTotals") -> "UsageTotals":
        return UsageTotals(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            charge=Nanos(self.charge + other.charge),
            more={
                component: self.more.get(component, ComponentSum()) + other.more.get(component, ComponentSum())
                for component in PLACE
                if component in self.more or component in other.more
            },
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
    further: dict[str, dict[Component, list[int]]] = {}
    for record in records:
        check_record(record, tenant_id=tenant_id, currency=currency, period=period)
        row = rows.setdefault(record.model, [0, 0, 0, 0, 0])
        row[0] += 1
        row[1] += record.usage.prompt
        row[2] += record.usage.cached
        row[3] += record.usage.completion
        row[4] += record.charge
        for component, quantity in record.usage.more.items():
            one = further.setdefault(record.model, {}).setdefault(component, [0, 0])
            one[0] += quantity
            one[1] += record.charges.get(component, ZERO)
    sums = (
        (
            model,
            UsageTotals(requests, prompt, cached, completion, Nanos(charge), component_sums(further.get(model, {}))),
        )
        for model, (requests, prompt, cached, completion, charge) in rows.items()
    )
    return statement_of_rows(sums, tenant_id=tenant_id, currency=currency, period=period)


def component_sums(sums: Mapping[Component, Sequence[int]]) -> dict[Component, ComponentSum]:
    """Sums of quantity and amount, in the order of the catalogue."""
    return {
        component: ComponentSum(sums[component][0], Nanos(sums[component][1]))
        for component in PLACE
        if component in sums and component not in BASE
    }


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


def totals_to_json(totals: UsageTotals) -> dict[str, object]:
    """Counts as integers, amounts as decimal strings; `components` where there are further ones."""
    values: dict[str, object] = {
        "requests": totals.requests,
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "completion_tokens": totals.completion_tokens,
        "charge": format_amount(totals.charge),
    }
    if totals.more:
        values["components"] = {
            component.key: {"quantity": row.quantity, "charge": format_amount(row.charge)}
            for component, row in totals.more.items()
        }
    return values


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
    """One usage record as plain values: instants in ISO 8601 UTC, amounts as decimal strings.

    `components` has the further components, where there are any; one without a `charge` was counted with what it is
    part of, or costs nothing.
    """
    charges = record.charges
    values: dict[str, object] = {
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
        "charge_input": format_amount(charges.get(Component.INPUT, ZERO)),
        "charge_cached": format_amount(charges.get(Component.CACHED_INPUT, ZERO)),
        "charge_output": format_amount(charges.get(Component.OUTPUT, ZERO)),
        "uncollected": format_amount(record.uncollected),
        "hold": format_amount(record.hold),
        "currency": record.currency,
        "price_id": record.price_id,
        "started_at": _instant(record.started_at),
        "first_token_at": _instant(record.first_token_at),
        "finished_at": _instant(record.finished_at),
        "device_ns": record.device_ns,
    }
    if record.usage.more:
        values["components"] = {
            component.key: {"quantity": record.usage.more[component]}
            | ({"charge": format_amount(charges[component])} if component in charges else {})
            for component in PLACE
            if component in record.usage.more
        }
    return values


def _instant(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()
