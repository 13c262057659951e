"""Prices and rating: usage x price version -> charge, and the most that a request can cost.

A price is a number of nanos for a million tokens. A price version is never edited: a new price is a new
version, in force from its own moment on, and each usage record names the version it was rated by.
"""

from datetime import datetime
from enum import StrEnum

import msgspec

from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, check_currency, format_amount, round_ratio
from tidemill.ledger.usage import TokenUsage

TOKENS_PER_PRICE = 1_000_000
"""Prices are quoted per this many tokens."""

MAX_PRICE = 10**16
"""The highest price, nanos per million tokens: ten currency units a token. With usage.MAX_TOKENS it keeps
each charge, and what is `uncollected` of it, within the 64 bits of a database column."""


MAX_OUTPUT = 2**31 - 1
"""The answer of `affordable_output` when money is no bound."""


class PriceTier(StrEnum):
    """What a model's price depends on beside the currency."""

    STANDARD = "standard"
    BATCH = "batch"
    """The lines of batches, which wait for free capacity."""


class Price(msgspec.Struct, frozen=True, gc=False):
    """Nanos of a currency per million tokens, by kind of token."""

    input: int
    cached_input: int
    output: int

    def __post_init__(self) -> None:
        if not (0 <= self.input <= MAX_PRICE and 0 <= self.cached_input <= MAX_PRICE and 0 <= self.output <= MAX_PRICE):
            for name in ("input", "cached_input", "output"):
                price = getattr(self, name)
                if price < 0:
                    raise LedgerError(f"the price of {name} is negative; a price is zero or more per million tokens")
                if price > MAX_PRICE:
                    raise LedgerError(
                        f"the price of {name} is {format_amount(price)} per million tokens;"
                        f" the highest is {format_amount(MAX_PRICE)}"
                    )

    def scaled(self, numerator: int, denominator: int) -> "Price":
        """This price times a fraction, each kind of token rounded apart."""
        return Price(
            round_ratio(self.input * numerator, denominator),
            round_ratio(self.cached_input * numerator, denominator),
            round_ratio(self.output * numerator, denominator),
        )


class PriceVersion(msgspec.Struct, frozen=True):
    """One model's price in one currency and tier from `valid_from` (aware UTC) until the next version."""

    price_id: str
    model: str
    currency: str
    price: Price
    valid_from: datetime
    tier: PriceTier = PriceTier.STANDARD

    def __post_init__(self) -> None:
        check_currency(self.currency)
        if self.valid_from.utcoffset() is None:
            raise LedgerError(f"price {self.price_id}: valid_from {self.valid_from} has no time zone")


class Charge(msgspec.Struct, frozen=True, gc=False):
    """The price of one request, by kind of token. Each component is rounded once, their sum never."""

    input: Nanos
    cached: Nanos
    output: Nanos
    uncollected: Nanos = Nanos(0)
    """Worth of the usage beyond the cap of `rate_capped`."""

    @property
    def total(self) -> Nanos:
        return Nanos(self.input + self.cached + self.output)


def rate(usage: TokenUsage, price: Price) -> Charge:
    """Rate `usage` by `price`.

    Components are rounded apart so that an invoice which lists input, cached input and output tokens on lines
    of their own adds up to its records without a remainder.
    """
    return Charge(
        input=Nanos(round_ratio(usage.uncached * price.input, TOKENS_PER_PRICE)),
        cached=Nanos(round_ratio(usage.cached * price.cached_input, TOKENS_PER_PRICE)),
        output=Nanos(round_ratio(usage.completion * price.output, TOKENS_PER_PRICE)),
    )


def cost_of(*, uncached: int, cached: int, completion: int, cost: Price) -> Nanos:
    """What sums of tokens have cost, of any size; rounded once."""
    return Nanos(
        round_ratio(uncached * cost.input + cached * cost.cached_input + completion * cost.output, TOKENS_PER_PRICE)
    )


def rate_capped(usage: TokenUsage, price: Price, cap: Nanos) -> Charge:
    """Rate `usage`, but never charge more than `cap` (the hold); what lies above is `uncollected`.

    The output gives way first, then cached input, then input, so that the components stay non-negative.
    """
    full = rate(usage, price)
    over = full.total - max(cap, 0)
    if over <= 0:
        return full
    from_output = min(over, full.output)
    from_cached = min(over - from_output, full.cached)
    from_input = min(over - from_output - from_cached, full.input)
    return Charge(
        input=Nanos(full.input - from_input),
        cached=Nanos(full.cached - from_cached),
        output=Nanos(full.output - from_output),
        uncollected=Nanos(from_output + from_cached + from_input),
    )


def hold_for(price: Price, *, prompt_tokens: int, output_tokens: int) -> Nanos:
    """The most that a request of at most these tokens can cost.

    The dearer of the two input prices counts, as nobody knows yet what the cache holds. The extra two nanos
    cover the case that an odd split of the prompt rounds up in both components.
    """
    dearer = max(price.input, price.cached_input)
    return Nanos(
        round_ratio(prompt_tokens * dearer, TOKENS_PER_PRICE)
        + round_ratio(output_tokens * price.output, TOKENS_PER_PRICE)
        + (2 if dearer else 0)
    )


def covers(price: Price, cost: Price) -> bool:
    """Whether selling at `price` can never lose against `cost`, whatever the request: each kind of token covers its
    own cost. A comparison of sums would let a long cached prompt be sold below cost because answers earn well.
    """
    return price.input >= cost.input and price.cached_input >= cost.cached_input and price.output >= cost.output


def affordable_output(price: Price, *, budget: Nanos, prompt_tokens: int) -> int:
    """How many output tokens `budget` pays for after a prompt of `prompt_tokens`; 0 when not even the prompt.

    The exact inverse of `hold_for`: hold_for(prompt, answer) <= budget, and one token more would exceed it.
    The answer is bounded by 2**31 - 1, which no engine reaches and which a free output always gets.
    """
    left = budget - hold_for(price, prompt_tokens=prompt_tokens, output_tokens=0)
    if left < 0:
        return 0
    if price.output == 0:
        return MAX_OUTPUT
    # The largest t with round_ratio(t * price, M) <= left, that is (2 t price + M) // 2 M <= left.
    return min((TOKENS_PER_PRICE * (2 * left + 1) - 1) // (2 * price.output), MAX_OUTPUT)
