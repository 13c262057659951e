"""Reading what a person or a program wrote: names, amounts, months. Errors name the field."""

from sqlalchemy import Connection

from tidemill.errors import BadInput
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, check_currency, parse_amount
from tidemill.ledger.period import Period, parse_period
from tidemill.store.tenants import Tenant, find_tenant


def check_text(param: str, text: str, *, longest: int, empty: bool = False) -> str:
    """Return `text` stripped, or raise BadInput when it is too long, has control characters or (unless `empty`) is
    empty. A database need not be asked for what no name can be: PostgreSQL fails at a NUL.
    """
    text = text.strip()
    if not text.isprintable():
        raise BadInput(f"{param} has characters that cannot be printed, such as a line break.", param=param)
    if len(text) > longest:
        raise BadInput(f"{param} has {len(text)} characters; the longest is {longest}.", param=param)
    if not text and not empty:
        raise BadInput(f"{param} is empty.", param=param)
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
