"""Reading what a person or a program wrote: names, amounts, months. Errors name the field."""

import re
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

from sqlalchemy import Connection

from tidemill.errors import BadInput
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, check_currency, parse_amount
from tidemill.ledger.period import Period, parse_period, zone_named
from tidemill.store.tenants import Tenant, find_tenant
from tidemill.suggestions import did_you_mean

_DURATION = re.compile(r"([0-9]{1,6})\s*(s|m|h|d|w)")
LONGEST = timedelta(days=36_500)
"""The longest time that a key can be given."""
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def check_text(param: str, text: str, *, longest: int, empty: bool = False) -> str:
    """Return `text` stripped. Raises BadInput.

    It must not be too long, have control characters or (unless `empty`) be empty. A database need not be asked for what
    no name can be: PostgreSQL fails at a NUL.
    """
    text = text.strip()
    if not text.isprintable():
        raise BadInput(f"{param} must not have unprintable characters such as line breaks.", param=param)
    if len(text) > longest:
        raise BadInput(f"{param} has {len(text)} characters; at most {longest} are allowed.", param=param)
    if not text and not empty:
        raise BadInput(f"{param} must not be empty.", param=param)
    return text


def tenant_named(connection: Connection, name: str) -> Tenant:
    """The tenant of this name or id. Raises NotFound, or BadInput for what no name can be."""
    return find_tenant(connection, check_text("tenant", name, longest=1024))


def read_amount(param: str, text: str) -> Nanos:
    """An amount written as a decimal. Raises BadInput naming the field."""
    try:
        return parse_amount(text)
    except LedgerError as error:
        raise BadInput(f"{param}: {error}.", param=param) from error


def read_month(text: str, zone: str) -> Period:
    """A billing month such as 2026-11. Raises BadInput."""
    try:
        return parse_period(text, zone)
    except LedgerError as error:
        raise BadInput(f"month: {error}.", param="month") from error


def read_currency(text: str) -> str:
    """A currency's code. Raises BadInput."""
    try:
        return check_currency(text)
    except LedgerError as error:
        raise BadInput(f"currency: {error}.", param="currency") from error


def read_duration(param: str, text: str) -> timedelta:
    """A time such as 90d, 24h or 30m. Raises BadInput."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise BadInput(f"{param}: {text[:80]!r} is not a duration.", hint="Write 24h, 90d or 30m.", param=param)
    duration = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if duration > LONGEST:
        raise BadInput(f"{param}: {text[:80]} is too long; the maximum is {LONGEST.days}d.", param=param)
    return duration


def read_expiry(param: str, text: str, *, zone: str, now: datetime) -> datetime:
    """Read when something ends.

    It is a time from now such as 90d, a day in the operator's zone (to its end), or an instant.

    Raises BadInput, also for what is over.
    """
    text = text.strip()
    if _DURATION.fullmatch(text):
        ends = now + read_duration(param, text)
    else:
        try:
            ends = datetime.fromisoformat(text)
        except ValueError as error:
            hint = "Write 90d, 2027-01-31 or 2027-01-31T12:00:00Z."
            raise BadInput(
                f"{param}: {text[:80]!r} is neither a duration nor a date.", hint=hint, param=param
            ) from error
        if ends.year > now.year + LONGEST.days // 365:
            raise BadInput(f"{param}: the year of {text[:80]} is too far in the future.", param=param)
        if ends.year < now.year:
            raise BadInput(f"{param}: {text[:80]} is in the past.", param=param)
        if len(text) <= len("2027-01-31"):
            ends += timedelta(days=1)
        ends = (ends if ends.tzinfo else ends.replace(tzinfo=zone_named(zone))).astimezone(UTC)
    if ends <= now:
        raise BadInput(f"{param}: {text[:80]} is in the past.", param=param)
    return ends


def known_model(name: str, models: Collection[str]) -> str:
    """The name of a model that is served. Raises BadInput with the nearest one."""
    name = check_text("model", name, longest=128)
    if name not in models:
        hint = did_you_mean(name, list(models)) or f"Known models: {', '.join(sorted(models)) or 'none'}."
        raise BadInput(f"There is no model {name!r}.", hint=hint, param="model")
    return name


def read_network(text: str) -> str:
    """A network in CIDR notation, or one address. Raises BadInput."""
    text = text.strip()
    try:
        return str(ip_network(text))
    except ValueError as error:
        try:
            hint = f"Did you mean {ip_network(text, strict=False)}?"
        except ValueError:
            hint = "Write 10.1.0.0/16, 192.0.2.7 or 2001:db8::/32."
        raise BadInput(f"ips: {text[:80]!r} is not a valid network.", hint=hint, param="ips") from error
