"""The invoice as plain text, 78 columns wide, for a person in finance.

Amounts stand in one column with their decimal points under each other, and every exact amount shows the same
number of decimals. Nothing is ever cut off: what is too long for its column goes on to the next line.
"""

import shlex
import unicodedata
from datetime import datetime

from tidemill.ledger.components import CATALOGUE, INPUT
from tidemill.ledger.devices import US_PER_HOUR, DeviceTier
from tidemill.ledger.invoice import CreditLine, DeviceLine, Invoice, InvoiceLine, InvoiceStatus
from tidemill.ledger.money import NANOS_PER_UNIT, format_amount, minor_digits, round_ratio
from tidemill.ledger.period import zone_named
from tidemill.ledger.pricing import PriceTier

WIDTH = 78
"""Columns of a terminal or a monospaced page; a CJK character takes two."""

_LABEL = 14
TOKENS_PER_PRICE = CATALOGUE[INPUT].per
"""What the heading says that prices are for."""
_TIERS = {
    DeviceTier.STANDARD: "standard",
    DeviceTier.PREEMPTIBLE: "preemptible",
    DeviceTier.RESERVED: "reserved",
}


def display_width(text: str) -> int:
    """Columns that `text` takes: two for wide characters (CJK, emoji), none for combining marks."""
    width = 0
    for char in text:
        if not unicodedata.combining(char) and unicodedata.category(char) not in ("Mn", "Me"):
            width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return width


def printable(text: str) -> str:
    """`text` on one line without control and format characters: a name must not be able to forge a line."""
    spaced = "".join(" " if char.isspace() else char for char in text)
    return "".join(char for char in spaced if unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def wrap(text: str, width: int) -> list[str]:
    """Break `text` into one or more lines of at most `width` columns, at spaces where there are any."""
    lines: list[str] = []
    line = ""
    for word in printable(text).split():
        joined = f"{line} {word}" if line else word
        if display_width(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        line = word
        while display_width(line) > width:
            cut = next(n for n in range(1, len(line) + 1) if display_width(line[: n + 1]) > width)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line] if line or not lines else lines


def to_text(invoice: Invoice) -> str:
    """The whole invoice, ending in a newline."""
    return "".join(line.rstrip() + "\n" for line in _Page(invoice).lines())


class _Page:
    """The layout of one invoice: knows how many decimals its amounts need, and puts them in their column."""

    def __init__(self, invoice: Invoice) -> None:
        self.invoice = invoice
        self.minor = minor_digits(invoice.currency)
        balance = invoice.opening_balance, invoice.closing_balance, invoice.used_from_balance, invoice.granted
        exact = [line.amount for line in invoice.lines] + [*balance, invoice.subtotal, invoice.uncollected]
        exact += [line.amount for line in invoice.device_lines]
        self.places = max(_decimals(amount, self.minor) for amount in exact)

    def lines(self) -> list[str]:
        devices = [*self.devices(), ""] if self.invoice.device_lines else []
        usage = [*self.usage(), ""] if self.invoice.lines or not devices else []
        return [*self.head(), "", *usage, *devices, *self.total(), "", *self.balance(), "", *self.notes()]

    def head(self) -> list[str]:
        invoice = self.invoice
        period, status = invoice.period, invoice.status.value.upper()
        number, *more = wrap(invoice.number, WIDTH - 16)
        first = f"INVOICE  {number}"
        return [
            first + status.rjust(WIDTH - display_width(first)),
            *(" " * 9 + line for line in more),
            "=" * WIDTH,
            "",
            *(self.field("From", invoice.issuer) if printable(invoice.issuer).strip() else []),
            *self.field("To", invoice.tenant_name),
            *(self.field("Account", invoice.tenant_id) if invoice.tenant_id != invoice.tenant_name else []),
            *self.field("For", f"{self.subject()} in {period.title}"),
            *self.field("Period", f"{self.when(period.start)} to {self.when(period.end)}, {period.zone}"),
            *self.field("Drawn up", self.when(invoice.as_of)),
            *self.field("Currency", invoice.currency),
            *self.field("Requests", f"{invoice.requests:,}"),
        ]

    def subject(self) -> str:
        if not self.invoice.device_lines:
            return "model usage"
        return "model usage and device time" if self.invoice.lines else "device time"

    def devices(self) -> list[str]:
        out = [self.row("", "device hours", "rentals", "per hour", "amount"), "-" * WIDTH]
        above = ""
        for line in self.invoice.device_lines:
            what = f"{line.kind}, {_TIERS[line.tier]}, at the price of {self.day(line.price_from)} ({line.price_id})"
            if what != above:
                out += ["", *wrap(what, WIDTH)] if above else wrap(what, WIDTH)
                above = what
            out += self.device_row(line)
        return [*out, "-" * WIDTH]

    def device_row(self, line: DeviceLine) -> list[str]:
        hours = f"{round_ratio(line.device_us * 10_000, US_PER_HOUR) / 10_000:,.4f}"
        price = format_amount(line.hour, places=self.minor, grouped=True)
        amount = self.exact(line.amount)
        row = self.row("  device time", hours, f"{line.meters:,}", price, amount)
        if len(row) <= WIDTH:
            return [row]
        return [self.row("  device time", hours, f"{line.meters:,}", "", ""), f"{price}  {amount}".rjust(WIDTH)]

    def usage(self) -> list[str]:
        out = [self.row("", "tokens", "requests", "per million", "amount"), "-" * WIDTH]
        above: tuple[str, str] | None = None
        for line in self.invoice.lines:
            if (line.model, line.price_id) != above:
                if above:
                    out.append("")
                above = line.model, line.price_id
                day = self.day(line.price_from)
                what = line.model if line.tier is PriceTier.STANDARD else f"{line.model} in batches"
                out += wrap(f"{what}, at the price of {day} ({line.price_id})", WIDTH)
            out += self.usage_row(line)
        if not self.invoice.lines:
            out.append("No usage in this period." if not self.invoice.requests else "No billable usage.")
        return [*out, "-" * WIDTH]

    def usage_row(self, line: InvoiceLine) -> list[str]:
        spec = CATALOGUE[line.component]
        label, quantity, requests = f"  {spec.label}", f"{line.quantity:,}", f"{line.requests:,}"
        price = format_amount(line.rate, places=self.minor, grouped=True)
        if spec.per != TOKENS_PER_PRICE:
            price += f"/{spec.per:,}"
        amount = self.exact(line.amount)
        row = self.row(label, quantity, requests, price, amount)
        if len(row) <= WIDTH:
            return [row]
        return [self.row(label, quantity, requests, "", ""), f"{price}  {amount}".rjust(WIDTH)]

    def total(self) -> list[str]:
        invoice = self.invoice
        unit = format_amount(NANOS_PER_UNIT // 10**self.minor, places=self.minor)
        return [
            *self.amount("Subtotal, the exact sum of the lines", self.exact(invoice.subtotal)),
            *self.amount(f"Rounding to {unit}", self.exact(invoice.rounding)),
            *self.amount(f"Total {invoice.currency}", self.payable(invoice.total)),
            *self.amount("Paid from the prepaid balance", self.payable(-invoice.paid_from_balance)),
            "-" * WIDTH,
            *self.amount(f"AMOUNT DUE {invoice.currency}", self.payable(invoice.amount_due)),
        ]

    def balance(self) -> list[str]:
        invoice = self.invoice
        draft = invoice.status is InvoiceStatus.DRAFT
        closing = f"Balance at {self.when(min(invoice.as_of, invoice.period.end) if draft else invoice.period.end)}"
        return [
            f"Prepaid balance, {invoice.currency}",
            "-" * WIDTH,
            *self.amount(f"Balance at {self.when(invoice.period.start)}", self.exact(invoice.opening_balance)),
            *(row for credit in invoice.credits for row in self.credit(credit)),
            *self.amount("Used for the lines above", self.exact(-invoice.used_from_balance)),
            *self.amount(closing, self.exact(invoice.closing_balance)),
        ]

    def credit(self, credit: CreditLine) -> list[str]:
        memo = printable(credit.memo).strip()
        return self.amount(
            f"Credit granted {self.day(credit.at)}" + (f": {memo}" if memo else ""), self.exact(credit.amount)
        )

    def notes(self) -> list[str]:
        invoice = self.invoice
        notes = []
        if invoice.status is InvoiceStatus.DRAFT:
            why = "the period is not over and the figures will change"
            if invoice.period.is_over(invoice.as_of):
                why = "device time of the period is still being counted, and the figures may change"
            notes.append(f"This is a draft: {why}.")
        if invoice.uncollected:
            notes.append(
                f"Usage worth {format_amount(invoice.uncollected, places=self.minor)} {invoice.currency}"
                " went beyond what was held for it and is not charged: its tokens are in the lines,"
                " its price is not."
            )
        if invoice.device_lines:
            notes.append(
                "Device time is counted to the microsecond, and each line is the exact sum of its rentals: attempts at"
                " jobs, and reservations."
            )
        if invoice.lines or not invoice.device_lines:
            notes.append(
                f"Each request is priced on its own, to 0.000000001 {invoice.currency}, and each line is the"
                " exact sum of its requests, so that tokens times price may differ in the last decimals."
                " The requests behind the lines:"
            )
        else:
            notes.append("The rentals behind the lines:")
        command = f"tidemill usage --tenant {shlex.quote(printable(invoice.tenant_name))}"
        command += f" --month {invoice.period.month} --records"
        return [
            *(line for note in notes for line in wrap(note, WIDTH)),
            *("  " + line for line in wrap(command, WIDTH - 2)),
        ]

    def field(self, label: str, text: str) -> list[str]:
        first, *more = wrap(text, WIDTH - _LABEL)
        return [label.ljust(_LABEL) + first, *(" " * _LABEL + line for line in more)]

    def row(self, label: str, tokens: str, requests: str, price: str, amount: str) -> str:
        return f"{label:<14} {tokens:>15} {requests:>11} {price:>13} {amount:>21}"

    def amount(self, label: str, amount: str) -> list[str]:
        first, *more = wrap(label, WIDTH - 4 - max(len(amount), 20))
        *above, last = first, *("  " + line for line in more)
        return [*above, last + amount.rjust(WIDTH - display_width(last))]

    def exact(self, nanos: int) -> str:
        return format_amount(nanos, places=self.places, grouped=True)

    def payable(self, nanos: int) -> str:
        """An amount in the minor unit, its decimal point under those of the exact amounts."""
        short = format_amount(nanos, places=self.minor, grouped=True)
        return short + " " * (self.places - self.minor + (1 if self.places and not self.minor else 0))

    def day(self, instant: datetime) -> str:
        return self.when(instant)[:10]

    def when(self, instant: datetime) -> str:
        return instant.astimezone(zone_named(self.invoice.period.zone)).isoformat(" ", "minutes")[:16]


def _decimals(nanos: int, at_least: int) -> int:
    return len(format_amount(nanos, places=at_least).partition(".")[2])
