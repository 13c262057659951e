from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import MAX_NANOS, Nanos
from tidemill.ledger.pricing import (
    MAX_OUTPUT,
    MAX_PRICE,
    Price,
    PriceVersion,
    affordable_output,
    hold_for,
    rate,
    rate_capped,
)
from tidemill.ledger.usage import MAX_TOKENS, TokenUsage

per_million = st.one_of(st.just(0), st.integers(0, 10**6), st.integers(0, MAX_PRICE))
prices = st.builds(Price, per_million, per_million, per_million)
any_count = st.integers(-10, MAX_TOKENS)
reported = st.builds(TokenUsage, any_count, any_count, any_count)


def test_a_charge_by_hand() -> None:
    price = Price(input=4 * 10**9, cached_input=10**9, output=16 * 10**9)
    charge = rate(TokenUsage(prompt=1000, cached=200, completion=300), price)
    assert (charge.input, charge.cached, charge.output) == (3_200_000, 200_000, 4_800_000)
    assert charge.total == 8_200_000


@given(reported, prices)
def test_each_component_is_the_exact_price_rounded_once(usage: TokenUsage, price: Price) -> None:
    charge = rate(usage, price)
    for nanos, tokens, per in (
        (charge.input, usage.uncached, price.input),
        (charge.cached, usage.cached, price.cached_input),
        (charge.output, usage.completion, price.output),
    ):
        assert 0 <= nanos
        assert abs(nanos - Fraction(tokens * per, 10**6)) <= Fraction(1, 2)
    assert charge.uncollected == 0


@given(reported, prices, st.integers(-100, 10**19))
def test_never_more_than_the_cap_and_nothing_is_lost(usage: TokenUsage, price: Price, cap: int) -> None:
    full, charge = rate(usage, price), rate_capped(usage, price, Nanos(cap))
    assert charge.total == min(full.total, max(cap, 0))
    assert charge.total + charge.uncollected == full.total
    for given_, asked in (
        (charge.input, full.input),
        (charge.cached, full.cached),
        (charge.output, full.output),
    ):
        assert 0 <= given_ <= asked


def test_the_output_gives_way_first_then_cached_then_input() -> None:
    price, usage = Price(10**6, 10**6, 10**6), TokenUsage(20, 10, 10)
    by_cap = {cap: rate_capped(usage, price, Nanos(cap)) for cap in (25, 15, 5)}
    assert [(c.input, c.cached, c.output) for c in by_cap.values()] == [(10, 10, 5), (10, 5, 0), (5, 0, 0)]


def test_the_dearest_request_fits_a_database_column() -> None:
    dearest = rate(TokenUsage(MAX_TOKENS, 0, MAX_TOKENS), Price(MAX_PRICE, MAX_PRICE, MAX_PRICE))
    assert dearest.total <= MAX_NANOS
    assert (
        rate_capped(TokenUsage(MAX_TOKENS, 0, MAX_TOKENS), Price(*[MAX_PRICE] * 3), Nanos(0)).uncollected <= MAX_NANOS
    )


@given(reported, prices, st.integers(0, 1000), st.integers(0, 1000))
@example(TokenUsage(2, 1, 0), Price(500_000, 500_000, 0), 0, 0)  # both halves of the prompt round up
def test_the_hold_covers_every_request_within_its_bounds(
    usage: TokenUsage, price: Price, spare_prompt: int, spare_output: int
) -> None:
    hold = hold_for(price, prompt_tokens=usage.prompt + spare_prompt, output_tokens=usage.completion + spare_output)
    assert rate(usage, price).total <= hold


@given(prices, st.integers(0, MAX_NANOS).map(Nanos), st.integers(0, 10**6))
@example(Price(0, 0, 1), Nanos(0), 0)
def test_affordable_output_is_the_exact_inverse_of_the_hold(price: Price, budget: Nanos, prompt: int) -> None:
    output = affordable_output(price, budget=budget, prompt_tokens=prompt)
    if hold_for(price, prompt_tokens=prompt, output_tokens=0) > budget:
        assert output == 0
        return
    assert hold_for(price, prompt_tokens=prompt, output_tokens=output) <= budget
    if output < MAX_OUTPUT:
        assert hold_for(price, prompt_tokens=prompt, output_tokens=output + 1) > budget


def test_bad_prices_are_refused() -> None:
    with pytest.raises(LedgerError, match="price of output is negative"):
        Price(1, 1, -1)
    with pytest.raises(LedgerError, match=r"price of input is .* the highest is 10000000\.00"):
        Price(MAX_PRICE + 1, 1, 1)
    with pytest.raises(LedgerError, match="no time zone"):
        PriceVersion("p", "m", "CNY", Price(1, 1, 1), datetime(2026, 1, 1))
    with pytest.raises(LedgerError, match="currency"):
        PriceVersion("p", "m", "yuan", Price(1, 1, 1), datetime(2026, 1, 1, tzinfo=UTC))
