"""Limits that an operator sets: what they count, whom they bind, and the days and months of budgets."""

from datetime import UTC, date, datetime, timedelta
from enum import StrEnum

import msgspec

from tidemill.ledger.money import MAX_NANOS, format_amount
from tidemill.ledger.period import parse_period, period_of, zone_named

MAX_AMOUNT = 10**12
"""The highest limit on requests or tokens per minute, or concurrent requests."""


class LimitKind(StrEnum):
    """What a limit counts."""

    RPM = "rpm"
    """Requests a minute."""
    TPM = "tpm"
    """Tokens a minute, of prompts and answers."""
    CONCURRENCY = "concurrency"
    """Requests at a time."""
    BUDGET = "budget"
    """Money in a day or a month."""


class Per(StrEnum):
    """A budget's period, in the operator's time zone."""

    DAY = "day"
    MONTH = "month"


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """One limit. `key_id` and `model` narrow it to what one key, or one model, is used for.

    `key_id` is the first key of a line of rotated keys: a key and its successors share their limits.
    """

    limit_id: str
    tenant_id: str
    kind: LimitKind
    amount: int
    """Requests, tokens, or nanos of the tenant's currency."""
    key_id: str | None = None
    model: str | None = None
    per: Per | None = None
    soft_percent: int | None = None
    """Of a budget: the share of it at which a warning is given."""

    def binds(self, key_id: str, model: str) -> bool:
        """Whether it counts what this key (the first of its line) asks of this model."""
        return self.key_id in (None, key_id) and self.model in (None, model)

    @property
    def soft_amount(self) -> int | None:
        """Nanos at which the warning is given."""
        return None if self.soft_percent is None else -(-self.amount * self.soft_percent // 100)

    @property
    def most(self) -> int:
        """The highest amount that a limit of its kind may have."""
        return MAX_NANOS if self.kind is LimitKind.BUDGET else MAX_AMOUNT


def scope_of(limit: Limit) -> str:
    """Whom a limit binds, for a reader: `your account`, `this key`, `this key, for the model 'big'`."""
    whom = "this key" if limit.key_id else "your account"
    return f"{whom}, for the model {limit.model!r}" if limit.model else whom


def title_of(limit: Limit, currency: str) -> str:
    """A limit in words: `100 requests per minute`, `a budget of 5.00 USD per day`."""
    match limit.kind:
        case LimitKind.RPM:
            return f"{limit.amount:,} request{'s' * (limit.amount != 1)} per minute"
        case LimitKind.TPM:
            return f"{limit.amount:,} token{'s' * (limit.amount != 1)} per minute"
        case LimitKind.CONCURRENCY:
            return f"{limit.amount:,} concurrent request{'s' * (limit.amount != 1)}"
        case LimitKind.BUDGET:
            return f"a budget of {format_amount(limit.amount, grouped=True)} {currency} per {limit.per}"


class BudgetSpan(msgspec.Struct, frozen=True):
    """One period of a budget: the instants from `start` up to and without `end`, aware UTC."""

    label: str
    """`2026-11-24` or `2026-11`."""
    start: datetime
    end: datetime


def span_of(instant: datetime, per: Per, zone: str) -> BudgetSpan:
    """The day or month that `instant` (aware) falls in.

    They follow each other without a gap, whatever clocks do.
    """
    if per is Per.MONTH:
        month = period_of(instant, zone)
        return BudgetSpan(month.month, month.start, month.end)
    day = instant.astimezone(zone_named(zone)).date()
    span = _day(day, zone)
    # Where clocks went back over midnight, the wall shows the old day for a while after the new has begun.
    return _day(day + timedelta(days=1), zone) if instant >= span.end else span


def span_labelled(label: str, per: Per, zone: str) -> BudgetSpan:
    """The day or month of that label, such as `2026-11-03` or `2026-11`."""
    if per is Per.MONTH:
        month = parse_period(label, zone)
        return BudgetSpan(month.month, month.start, month.end)
    return _day(date.fromisoformat(label), zone)


def _day(day: date, zone: str) -> BudgetSpan:
    return BudgetSpan(day.isoformat(), _midnight(day, zone), _midnight(day + timedelta(days=1), zone))


def _midnight(day: date, zone: str) -> datetime:
    """The first midnight of a day, or the instant at which the clocks leap over it (as in `period`)."""
    return datetime(day.year, day.month, day.day, tzinfo=zone_named(zone), fold=0).astimezone(UTC)
