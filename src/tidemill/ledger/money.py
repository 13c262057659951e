"""Money as integers: nanos, 1e-9 of a currency unit, and the one rounding rule of the house.

Binary floating point cannot hold 0.1, and a sum of a million rounded charges drifts. So every amount in
Tidemill is an `int` of nanos; decimals exist only where a person types or reads an amount.
"""

import re
from collections.abc import Sequence
from typing import NewType

from tidemill.ledger.errors import LedgerError

Nanos = NewType("Nanos", int)
"""An amount of money in 1e-9 of a currency unit. May be negative (a debit)."""

NANOS_PER_UNIT = 1_000_000_000
MAX_NANOS = 2**63 - 1
"""The largest amount a database column of 64 bits holds: 9.22 billion currency units."""

ZERO = Nanos(0)

_CURRENCY = re.compile(r"[A-Z]{3}")
_AMOUNT = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]+))?")

# ISO 4217, list one: the currencies whose minor unit is not a hundredth.
_NO_DECIMALS = frozenset(
    {"BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG"}
    | {"RWF", "UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"}
)
_THREE_DECIMALS = frozenset({"BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"})
_FOUR_DECIMALS = frozenset({"CLF", "UYW"})


class MoneyError(LedgerError):
    """An amount or a currency that cannot be taken as written."""


def round_ratio(numerator: int, denominator: int) -> int:
    """Round `numerator / denominator` to the nearest integer, halves away from zero.

    This is the only place where money is rounded (`apportion` splits a sum, and loses nothing of it).
    `denominator` must be positive.
    """
    if denominator <= 0:
        raise ValueError(f"denominator must be positive, got {denominator}")
    if numerator < 0:
        return -((-numerator * 2 + denominator) // (denominator * 2))
    return (numerator * 2 + denominator) // (denominator * 2)


def parse_amount(text: str) -> Nanos:
    """Read a plain decimal amount ("100", "0.000123", "-3.50") exactly.

    Raises MoneyError when the text is not a plain decimal, has more than nine decimals, or does not fit 64
    bits.
    """
    text = text.strip()
    shown = repr(text if len(text) <= 40 else text[:37] + "...")
    match = _AMOUNT.fullmatch(text)
    if not match:
        raise MoneyError(f"{shown} is not an amount; write a plain decimal such as 100 or 0.25")
    # By digits, not by decimal.Decimal: its arithmetic rounds to whatever precision the caller's context has.
    whole, fraction = match[2].lstrip("0"), (match[3] or "").rstrip("0")
    if len(fraction) > 9:
        raise MoneyError(f"{shown} has more than nine decimals; the smallest amount is 0.000000001")
    if len(whole) > 10 or (nanos := int(whole + fraction.ljust(9, "0"))) > MAX_NANOS:
        raise MoneyError(f"{shown} is larger than Tidemill can hold (9,223,372,036 units)")
    return Nanos(-nanos if match[1] == "-" else nanos)


def format_amount(nanos: int, *, places: int = 2, grouped: bool = False) -> str:
    """Write nanos as an exact decimal, trailing zeros trimmed down to `places` decimals.

    1500 -> "0.0000015".

    `grouped` sets commas between the thousands, for readers; machines get none.
    """
    sign = "-" if nanos < 0 else ""
    whole, rest = divmod(abs(nanos), NANOS_PER_UNIT)
    fraction = f"{rest:09d}".rstrip("0").ljust(places, "0")
    units = f"{whole:,}" if grouped else str(whole)
    return f"{sign}{units}.{fraction}" if fraction else f"{sign}{units}"


def check_currency(code: str) -> str:
    """Return `code` if it has the form of an ISO 4217 code (three capital letters), else raise MoneyError."""
    if not _CURRENCY.fullmatch(code):
        raise MoneyError(f"{code!r} is not a currency code; write three capital letters such as USD or CNY")
    return code


def minor_digits(currency: str) -> int:
    """How many decimals the currency is paid in (ISO 4217): 2 for most, 0 for JPY and KRW, 3 for KWD."""
    if currency in _NO_DECIMALS:
        return 0
    if currency in _THREE_DECIMALS:
        return 3
    return 4 if currency in _FOUR_DECIMALS else 2


def round_to_minor(nanos: int, currency: str) -> Nanos:
    """Round to what can be paid in `currency`, halves away from zero: 0.005 USD -> 0.01, 0.5 JPY -> 1."""
    unit = NANOS_PER_UNIT // 10 ** minor_digits(currency)
    return Nanos(round_ratio(nanos, unit) * unit)


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` in proportion to `weights` into integers that add up to it exactly (largest remainder).

    No share is off its exact value by 1 or more. Of equal remainders the earlier one gets the unit. `total`
    may be negative; weights may not, and at least one must be positive.
    """
    whole = sum(weights)
    if whole <= 0 or min(weights) < 0:
        raise ValueError("weights must be zero or more, and one of them positive")
    sign = -1 if total < 0 else 1
    shares = [divmod(abs(total) * weight, whole) for weight in weights]
    left = abs(total) - sum(share for share, _ in shares)
    rounded_up = frozenset(sorted(range(len(shares)), key=lambda index: -shares[index][1])[:left])
    return [sign * (share + (index in rounded_up)) for index, (share, _) in enumerate(shares)]
