"""The monthly invoice: one tenant's records of one month as lines that add up to them exactly.

A line is one component (`ledger.components`) of one model at one price version. Its amount is the sum of that
component of its records, each of which was rounded once when it was rated; nothing is rounded again until the total,
which is rounded to what the currency can be paid in, on a line of its own. Device time of jobs and reservations has
lines of its own, by kind of device, tier and price version (`ledger.devices`). `invoice_text` prints it.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import TypeVar

import msgspec

from tidemill.ledger.components import CATALOGUE, PLACE, Component
from tidemill.ledger.devices import DevicePrice, DeviceSum, DeviceTier, seconds_text, sum_devices
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, check_currency, format_amount, minor_digits, round_to_minor
from tidemill.ledger.period import Period
from tidemill.ledger.posting import Transaction, tenant_account
from tidemill.ledger.pricing import PriceTier, PriceVersion
from tidemill.ledger.statement import check_record
from tidemill.ledger.usage import UsageRecord

Priced = TypeVar("Priced", PriceVersion, DevicePrice)


class InvoiceStatus(StrEnum):
    DRAFT = "draft"
    """The month is not over; the figures will grow."""
    FINAL = "final"


class LineSum(msgspec.Struct, frozen=True):
    """One component of one model at one price version, summed over a month's records."""

    model: str
    price_id: str
    component: Component
    quantity: int
    amount: Nanos
    requests: int
    """How many records have a quantity or a charge of this component."""


class MonthUsage(msgspec.Struct, frozen=True):
    """What an invoice needs to know of a tenant's records of a month; made by `sum_month` or a database."""

    tenant_id: str
    currency: str
    period: Period
    requests: int
    uncollected: Nanos
    sums: tuple[LineSum, ...]
    devices: tuple[DeviceSum, ...] = ()


class InvoiceLine(msgspec.Struct, frozen=True):
    """A line of an invoice. `records_of` opens it down to its records."""

    model: str
    price_id: str
    price_from: datetime
    """Since when the price version is in force, aware UTC."""
    component: Component
    quantity: int
    rate: int
    """Nanos for so many units as the catalogue says."""
    amount: Nanos
    requests: int
    tier: PriceTier = PriceTier.STANDARD


class DeviceLine(msgspec.Struct, frozen=True):
    """Device time of one kind in one tier at one price version: the exact sum of its meters."""

    kind: str
    tier: DeviceTier
    price_id: str
    price_from: datetime
    """Since when the price version is in force, aware UTC."""
    device_us: int
    hour: Nanos
    """The price of a device and hour."""
    amount: Nanos
    meters: int
    """How many attempts at jobs, or reservations, it is of."""


class CreditLine(msgspec.Struct, frozen=True):
    """A credit that was granted in the period."""

    transaction_id: str
    at: datetime
    amount: Nanos
    memo: str


class Invoice(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's bill for one month."""

    number: str
    status: InvoiceStatus
    issuer: str
    """Who sends it; may be empty."""
    tenant_id: str
    tenant_name: str
    currency: str
    period: Period
    as_of: datetime
    lines: tuple[InvoiceLine, ...]
    device_lines: tuple[DeviceLine, ...] = ()
    requests: int
    """All requests of the month; a request appears on a line for each component that it is billed for."""
    uncollected: Nanos
    """Usage beyond what was held for it: not charged."""
    subtotal: Nanos
    """The exact sum of all lines, which is the exact sum of the records' and meters' charges."""
    total: Nanos
    """`subtotal` rounded to the currency's minor unit."""
    paid_from_balance: Nanos
    """What of the total the prepaid balance has covered, in the minor unit."""
    opening_balance: Nanos
    used_from_balance: Nanos
    """What was taken from the balance for the lines, exactly."""
    credits: tuple[CreditLine, ...]

    @property
    def rounding(self) -> Nanos:
        """What rounding has added to the subtotal; may be negative."""
        return Nanos(self.total - self.subtotal)

    @property
    def amount_due(self) -> Nanos:
        """What is left to pay: zero for prepaid usage."""
        return Nanos(self.total - self.paid_from_balance)

    @property
    def granted(self) -> Nanos:
        return Nanos(sum(credit.amount for credit in self.credits))

    @property
    def closing_balance(self) -> Nanos:
        """The balance at the period's end; of a draft, the balance so far."""
        return Nanos(self.opening_balance + self.granted - self.used_from_balance)


def invoice_number(tenant_id: str, period: Period) -> str:
    """The same for the same tenant and month, always: `TM-2026-11-acme`."""
    return f"TM-{period.month}-{tenant_id}"


def sum_month(records: Iterable[UsageRecord], *, tenant_id: str, currency: str, period: Period) -> MonthUsage:
    """Add up a tenant's records of a month by line. Raises LedgerError at a record that does not belong."""
    requests = uncollected = 0
    sums: dict[tuple[str, str, Component], list[int]] = {}
    for record in records:
        check_record(record, tenant_id=tenant_id, currency=currency, period=period)
        requests += 1
        uncollected += record.uncollected
        for component, (quantity, amount) in record.lines().items():
            row = sums.setdefault((record.model, record.price_id, component), [0, 0, 0])
            row[0] += quantity
            row[1] += amount
            row[2] += 1
    return MonthUsage(
        tenant_id=tenant_id,
        currency=check_currency(currency),
        period=period,
        requests=requests,
        uncollected=Nanos(uncollected),
        sums=tuple(LineSum(*key, row[0], Nanos(row[1]), row[2]) for key, row in sums.items()),
    )


def make_invoice(
    usage: MonthUsage,
    *,
    tenant_name: str,
    prices: Mapping[str, PriceVersion],
    opening_balance: Nanos,
    credits: Iterable[Transaction],
    as_of: datetime,
    used_from_balance: Nanos | None = None,
    issuer: str = "",
    device_prices: Mapping[str, DevicePrice] | None = None,
    complete: bool = True,
) -> Invoice:
    """Draw up the invoice of a month.

    A draft when the month is not over at `as_of` (aware UTC), or not `complete`, as device time of it is still to be
    charged.

    `prices` holds, by price_id, every version that the records were rated by, `device_prices` those of device
    time. `opening_balance` is the balance at the period's start; `credits` are the credit grants to the tenant
    within the period. `used_from_balance` is what of the usage the prepaid balance paid: all of it unless said
    otherwise.
    """
    if as_of.utcoffset() is None:
        raise LedgerError(f"as_of {as_of} has no time zone")
    lines = sorted(
        (_line(row, prices, usage.currency) for row in usage.sums if row.quantity or row.amount),
        key=lambda line: (line.model, line.price_from, line.price_id, PLACE[line.component]),
    )
    device_lines = [_device_line(row, device_prices or {}, usage.currency) for row in usage.devices if row.device_us]
    device_lines.sort(key=lambda line: (line.kind, list(DeviceTier).index(line.tier), line.price_from, line.price_id))
    device_amount, device_uncollected = sum_devices(usage.devices)
    subtotal = Nanos(sum(line.amount for line in lines) + device_amount)
    used = subtotal if used_from_balance is None else used_from_balance
    if not 0 <= used <= subtotal:
        raise LedgerError(f"{format_amount(used)} from the balance for usage of {format_amount(subtotal)}")
    return Invoice(
        number=invoice_number(usage.tenant_id, usage.period),
        status=InvoiceStatus.FINAL if complete and usage.period.is_over(as_of) else InvoiceStatus.DRAFT,
        issuer=issuer,
        tenant_id=usage.tenant_id,
        tenant_name=tenant_name,
        currency=usage.currency,
        period=usage.period,
        as_of=as_of,
        lines=tuple(lines),
        device_lines=tuple(device_lines),
        requests=usage.requests,
        uncollected=Nanos(usage.uncollected + device_uncollected),
        subtotal=subtotal,
        total=round_to_minor(subtotal, usage.currency),
        # Rounded on its own, so that what is due is in the minor unit too: zero when all was prepaid, never
        # negative.
        paid_from_balance=round_to_minor(used, usage.currency),
        opening_balance=opening_balance,
        used_from_balance=used,
        credits=_credit_lines(credits, usage),
    )


def records_of(line: InvoiceLine, records: Iterable[UsageRecord]) -> list[UsageRecord]:
    """The records behind a line, out of the tenant's records of the month.

    There are `line.requests` of them, and what they have of the line's component adds up to its quantity and amount.
    """
    return [
        record
        for record in records
        if record.model == line.model and record.price_id == line.price_id and line.component in record.lines()
    ]


def to_json(invoice: Invoice) -> dict[str, object]:
    """The invoice as plain values: amounts as decimal strings, instants in ISO 8601 UTC."""
    places = minor_digits(invoice.currency)

    def amount(nanos: int) -> str:
        return format_amount(nanos, places=places)

    return {
        "number": invoice.number,
        "status": invoice.status.value,
        "issuer": invoice.issuer,
        "tenant": {"id": invoice.tenant_id, "name": invoice.tenant_name},
        "currency": invoice.currency,
        "period": {
            "month": invoice.period.month,
            "zone": invoice.period.zone,
            "start": invoice.period.start.isoformat(),
            "end": invoice.period.end.isoformat(),
        },
        "as_of": invoice.as_of.isoformat(),
        "requests": invoice.requests,
        "lines": [
            {
                "model": line.model,
                "price_id": line.price_id,
                "price_from": line.price_from.isoformat(),
                "tier": line.tier.value,
                "kind": line.component.key,
                **_quantity_to_json(line, amount(line.rate)),
                "requests": line.requests,
                "amount": amount(line.amount),
            }
            for line in invoice.lines
        ],
        "device_lines": [
            {
                "kind": line.kind,
                "tier": line.tier.value,
                "price_id": line.price_id,
                "price_from": line.price_from.isoformat(),
                "device_seconds": seconds_text(line.device_us),
                "price_per_hour": amount(line.hour),
                "meters": line.meters,
                "amount": amount(line.amount),
            }
            for line in invoice.device_lines
        ],
        "subtotal": amount(invoice.subtotal),
        "rounding": amount(invoice.rounding),
        "total": amount(invoice.total),
        "paid_from_balance": amount(invoice.paid_from_balance),
        "amount_due": amount(invoice.amount_due),
        "uncollected": amount(invoice.uncollected),
        "balance": {
            "opening": amount(invoice.opening_balance),
            "granted": amount(invoice.granted),
            "used": amount(invoice.used_from_balance),
            "closing": amount(invoice.closing_balance),
        },
        "credits": [
            {
                "transaction_id": credit.transaction_id,
                "at": credit.at.isoformat(),
                "amount": amount(credit.amount),
                "memo": credit.memo,
            }
            for credit in invoice.credits
        ],
    }


def _quantity_to_json(line: InvoiceLine, price: str) -> dict[str, object]:
    """What a line counts, and what that costs: tokens per million, anything else with its unit and scale."""
    spec = CATALOGUE[line.component]
    if spec.unit == "tokens":
        return {"tokens": line.quantity, "price_per_million": price}
    return {"quantity": line.quantity, "unit": spec.unit, "price": price, "price_per": spec.per}


def _version(price_id: str, sold: str, prices: Mapping[str, Priced], currency: str) -> Priced:
    """The price version that `sold`, a model or a kind of device, was charged at. Raises LedgerError."""
    version = prices.get(price_id)
    if version is None:
        raise LedgerError(f"the price {price_id} of {sold} is missing; pass every version that was used")
    if version.currency != currency:
        raise LedgerError(f"the price {price_id} is in {version.currency}, the invoice in {currency}")
    return version


def _line(row: LineSum, prices: Mapping[str, PriceVersion], currency: str) -> InvoiceLine:
    version = _version(row.price_id, row.model, prices, currency)
    rate = version.price.rates.get(row.component)
    if rate is None:
        raise LedgerError(f"the price {row.price_id} of {row.model} has no rate for {row.component.key}")
    return InvoiceLine(
        model=row.model,
        price_id=row.price_id,
        price_from=version.valid_from,
        component=row.component,
        quantity=row.quantity,
        rate=rate,
        amount=row.amount,
        requests=row.requests,
        tier=version.tier,
    )


def _device_line(row: DeviceSum, prices: Mapping[str, DevicePrice], currency: str) -> DeviceLine:
    version = _version(row.price_id, row.kind, prices, currency)
    return DeviceLine(
        kind=row.kind,
        tier=row.tier,
        price_id=row.price_id,
        price_from=version.valid_from,
        device_us=row.device_us,
        hour=version.hour,
        amount=row.amount,
        meters=row.meters,
    )


def _credit_lines(credits: Iterable[Transaction], usage: MonthUsage) -> tuple[CreditLine, ...]:
    lines = []
    for credit in credits:
        amount = credit.amount_on(tenant_account(usage.tenant_id))
        name = f"transaction {credit.transaction_id}"
        if amount <= 0:
            raise LedgerError(f"{name} is not a credit to tenant {usage.tenant_id}")
        if credit.currency != usage.currency:
            raise LedgerError(f"{name} is in {credit.currency}, the invoice in {usage.currency}")
        if credit.at not in usage.period:
            raise LedgerError(f"{name} is of {credit.at}, not in {usage.period.month}")
        lines.append(CreditLine(credit.transaction_id, credit.at, amount, credit.memo))
    return tuple(sorted(lines, key=lambda line: (line.at, line.transaction_id)))
