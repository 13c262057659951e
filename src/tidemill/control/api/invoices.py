"""/api/v1/invoices"""

from datetime import UTC, datetime
from typing import Annotated, Literal

from litestar import get
from litestar.enums import MediaType
from litestar.params import QueryParameter
from msgspec import Meta, convert

from tidemill.control import queries
from tidemill.control.api.access import Running, read_drained
from tidemill.control.api.schemas import FAILURES, Amount, Answer, Currency, Instant


class InvoiceTenant(Answer):
    """Whom the invoice is for."""

    id: str
    name: str


class InvoicePeriod(Answer):
    """The month: the instants from `start` up to and without `end`."""

    month: Annotated[str, Meta(examples=["2026-11"])]
    zone: str
    start: Instant
    end: Instant


class InvoiceLineSchema(Answer, kw_only=True, omit_defaults=True):
    """One component of one model at one price version: the exact sum of that component of its records."""

    model: str
    price_id: str
    price_from: Instant
    tier: Annotated[Literal["standard", "batch"], Meta(description="`batch`: the lines of batches.")]
    kind: Annotated[str, Meta(description="The component.", examples=["input", "cached_input", "output", "search"])]
    tokens: Annotated[int | None, Meta(description="Of a component that is counted in tokens.")] = None
    price_per_million: Annotated[str | None, Meta(description="The price of a million of these tokens.")] = None
    quantity: Annotated[int | None, Meta(description="Of any other component.")] = None
    unit: Annotated[str | None, Meta(description="What that counts.", examples=["searches", "documents"])] = None
    price: Annotated[str | None, Meta(description="The price of `price_per` of these.")] = None
    price_per: int | None = None
    requests: int
    amount: Amount


class InvoiceDeviceLine(Answer):
    """Device time of one kind in one tier at one price version: the exact sum of its rentals."""

    kind: str
    tier: Literal["standard", "preemptible", "reserved"]
    price_id: str
    price_from: Instant
    device_seconds: Annotated[str, Meta(description="Exact to the microsecond.")]
    price_per_hour: Amount
    meters: Annotated[int, Meta(description="How many attempts at jobs, or reservations, it is of.")]
    amount: Amount


class InvoiceBalance(Answer):
    """The prepaid balance in the month: opening + granted - used = closing."""

    opening: Amount
    granted: Amount
    used: Amount
    closing: Amount


class InvoiceCredit(Answer):
    """A credit that was granted in the month."""

    transaction_id: str
    at: Instant
    amount: Amount
    memo: str


class InvoiceSchema(Answer):
    """A tenant's bill for a month. The lines add up to `subtotal` exactly, and so do the usage records."""

    number: str
    status: Annotated[
        Literal["draft", "final"],
        Meta(description="A draft while the month, or the counting of its device time, is not over."),
    ]
    issuer: str
    tenant: InvoiceTenant
    currency: Currency
    period: InvoicePeriod
    as_of: Instant
    requests: int
    lines: list[InvoiceLineSchema]
    device_lines: list[InvoiceDeviceLine]
    subtotal: Amount
    rounding: Annotated[str, Meta(description="What rounding to the currency's minor unit has added.")]
    total: Amount
    paid_from_balance: Amount
    amount_due: Amount
    uncollected: Annotated[str, Meta(description="Usage beyond what was held for it: not charged.")]
    balance: InvoiceBalance
    credits: list[InvoiceCredit]


TenantParam = Annotated[str, QueryParameter(description="A tenant's name, or its id.")]
MonthParam = Annotated[str | None, QueryParameter(description="A billing month such as 2026-11; else the current.")]


@get("/invoices", responses=FAILURES)
async def get_invoice(platform: Running, tenant: TenantParam, month: MonthParam = None) -> InvoiceSchema:
    """A tenant's invoice of a month; a draft while the month is not over."""
    now = datetime.now(UTC)
    found = await read_drained(
        platform,
        lambda connection: queries.invoice_json(
            connection, tenant, month, zone=platform.zone, issuer=platform.issuer, now=now
        ),
    )
    return convert(found, InvoiceSchema)


@get("/invoices/text", media_type=MediaType.TEXT, responses=FAILURES)
async def get_invoice_text(platform: Running, tenant: TenantParam, month: MonthParam = None) -> str:
    """The same as a page of plain text, 78 columns wide."""
    now = datetime.now(UTC)
    return await read_drained(
        platform,
        lambda connection: queries.invoice_text(
            connection, tenant, month, zone=platform.zone, issuer=platform.issuer, now=now
        ),
    )
