"""Prices and rating: usage x price version -> charge, and the most that a request can cost.

A price is a rate for each component (`ledger.components`): nanos for so many units as the catalogue says. A price
version is never edited: a new price is a new version, in force from its own moment on, and each usage record names the
version it was rated by.
"""

import math
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum

import msgspec

from tidemill.ledger.components import CACHED_INPUT, CATALOGUE, INPUT, OUTPUT, PLACE, Component, group_of
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, check_currency, format_amount, round_ratio
from tidemill.ledger.usage import TokenUsage

MAX_OUTPUT = 2**31 - 1
"""The answer of `affordable_output` when money is no bound."""


class PriceTier(StrEnum):
    """What a model's price depends on beside the currency."""

    STANDARD = "standard"
    BATCH = "batch"
    """The lines of batches, which wait for free capacity."""


class Price(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A rate for each component: nanos of a currency for so many units as the catalogue says.

    Input, cached input and output always have one: zero where none is given, and cached input that of input. Any other
    component without a rate is counted with what it is part of (cache writes with input, reasoning with output), or
    costs nothing.
    """

    rates: dict[Component, int]

    def __post_init__(self) -> None:
        given = self.rates
        base = {INPUT: 0, CACHED_INPUT: given.get(INPUT, 0), OUTPUT: 0}
        rates = base | given
        for component, rate in rates.items():
            if 0 <= rate <= CATALOGUE[component].max_rate:
                continue
            spec, name = CATALOGUE[component], component.key
            if rate < 0:
                raise LedgerError(f"the price of {name} must be zero or more per {spec.per_text}")
            raise LedgerError(
                f"the price of {name} is {format_amount(rate)} per {spec.per_text};"
                f" the maximum is {format_amount(spec.max_rate)}"
            )
        msgspec.structs.force_setattr(self, "rates", rates)

    @classmethod
    def of(cls, **rates: int) -> "Price":
        """A price by the components' names: `Price.of(input=4_000_000_000, output=16_000_000_000)`."""
        return cls({Component[name.upper()]: rate for name, rate in rates.items()})

    def rate_of(self, component: Component) -> int:
        """What a unit of it costs: its own rate, or that of what it is counted with."""
        rate = self.rates.get(component)
        if rate is None:
            part_of = CATALOGUE[component].part_of
            rate = 0 if part_of is None else self.rates[part_of]
        return rate

    def scaled(self, numerator: int, denominator: int) -> "Price":
        """This price times a fraction, each rate rounded apart."""
        return Price({component: round_ratio(rate * numerator, denominator) for component, rate in self.rates.items()})


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
    """The price of one request, by component. Each amount is rounded once, their sum never."""

    amounts: dict[Component, Nanos]
    """Of each component that is billed: it has a quantity, and a rate of its own."""
    uncollected: Nanos = Nanos(0)
    """Worth of the usage beyond the cap of `rate_capped`."""

    @property
    def total(self) -> Nanos:
        return Nanos(sum(self.amounts.values()))


_PER = {component: spec.per for component, spec in CATALOGUE.items()}


def rate(usage: TokenUsage, price: Price) -> Charge:
    """Rate `usage` by `price`.

    Components are rounded apart so that an invoice which lists input, cached input and output tokens on lines
    of their own adds up to its records without a remainder.
    """
    rates = price.rates
    return Charge(
        {
            component: Nanos(round_ratio(quantity * rates[component], _PER[component]))
            for component, quantity in usage.billed(rates).items()
            if quantity
        }
    )


def rate_capped(usage: TokenUsage, price: Price, cap: Nanos) -> Charge:
    """Rate `usage`, but never charge more than `cap` (the hold); what lies above is `uncollected`.

    The components give way from the last of the catalogue to the first, so the output before the input, and none falls
    below zero.
    """
    full = rate(usage, price)
    over = full.total - max(cap, 0)
    if over <= 0:
        return full
    amounts, left = dict(full.amounts), over
    for component in sorted(amounts, key=PLACE.__getitem__, reverse=True):
        taken = min(left, amounts[component])
        amounts[component] = Nanos(amounts[component] - taken)
        left -= taken
    return Charge(amounts, Nanos(over))


def cost_of(quantities: Mapping[Component, int], cost: Price) -> Nanos:
    """What sums of quantities, of any size, have cost; rounded once.

    `quantities` are as `TokenUsage.billed` gives them with every component apart: none is part of another.
    """
    whole = math.lcm(*(_PER[component] for component in quantities))
    exact = sum(
        quantity * cost.rate_of(component) * (whole // _PER[component]) for component, quantity in quantities.items()
    )
    return Nanos(round_ratio(exact, whole))


NOTHING: Mapping[Component, int] = {}

_PROMPT = (*group_of(INPUT), *group_of(CACHED_INPUT))
_ANSWER = group_of(OUTPUT)


def hold_for(
    price: Price, *, prompt_tokens: int, output_tokens: int, counted: Mapping[Component, int] = NOTHING
) -> Nanos:
    """The most that a request of at most these tokens, and these quantities of other components, can cost.

    The dearest of the prompt's rates counts, as nobody knows yet what the cache holds, and the dearest of the answer's.
    """
    prompt_rate, prompt_slack = _dearest(price, _PROMPT)
    answer_rate, answer_slack = _dearest(price, _ANSWER)
    hold = (
        round_ratio(prompt_tokens * prompt_rate, _PER[INPUT])
        + round_ratio(output_tokens * answer_rate, _PER[OUTPUT])
        + prompt_slack
        + answer_slack
    )
    for component, quantity in counted.items():
        hold += round_ratio(quantity * price.rate_of(component), _PER[component])
    return Nanos(hold)


def _dearest(price: Price, group: tuple[Component, ...]) -> tuple[int, int]:
    """The highest rate of components that share a bound.

    And the nanos by which they may together exceed it, as an odd split rounds up in each of them.
    """
    rates = price.rates
    dearest = parts = 0
    for component in group:
        rate = rates.get(component)
        if rate is not None:
            parts += 1
            if rate > dearest:
                dearest = rate
    return dearest, parts if dearest and parts > 1 else 0


def covers(price: Price, cost: Price) -> bool:
    """Whether selling at `price` can never lose against `cost`, whatever the request.

    Each component covers its own cost. A comparison of sums would let a long cached prompt be sold below cost because
    answers earn well.
    """
    return all(price.rate_of(component) >= cost.rate_of(component) for component in price.rates.keys() | cost.rates)


def affordable_output(
    price: Price, *, budget: Nanos, prompt_tokens: int, counted: Mapping[Component, int] = NOTHING
) -> int:
    """How many output tokens `budget` pays for after a prompt of `prompt_tokens`.

    0 when not even the prompt.

    The exact inverse of `hold_for`: hold_for(prompt, answer) <= budget, and one token more would exceed it.
    The answer is bounded by 2**31 - 1, which no engine reaches and which a free output always gets.
    """
    left = budget - hold_for(price, prompt_tokens=prompt_tokens, output_tokens=0, counted=counted)
    if left < 0:
        return 0
    dearest, _ = _dearest(price, _ANSWER)
    if dearest == 0:
        return MAX_OUTPUT
    # The largest t with round_ratio(t * price, M) <= left, that is (2 t price + M) // 2 M <= left.
    return min((_PER[OUTPUT] * (2 * left + 1) - 1) // (2 * dearest), MAX_OUTPUT)
