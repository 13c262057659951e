"""Rating: exact by component, rounded once, bounded by the hold; and what it came to before there were components."""

from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.ledger.values import further
from tests.support.prices import token_price
from tidemill.ledger.components import (
    BASE,
    CACHED_INPUT,
    CATALOGUE,
    INPUT,
    MAX_PRICE,
    MAX_TOKENS,
    OUTPUT,
    Component,
)
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import MAX_NANOS, Nanos
from tidemill.ledger.pricing import (
    MAX_OUTPUT,
    Price,
    PriceVersion,
    affordable_output,
    cost_of,
    covers,
    hold_for,
    rate,
    rate_capped,
)
from tidemill.ledger.usage import TokenUsage

per_million = st.one_of(st.just(0), st.integers(0, 10**6), st.integers(0, MAX_PRICE))
token_prices = st.builds(token_price, per_million, per_million, per_million)
components = st.sampled_from(list(CATALOGUE))
some_rate = st.one_of(st.just(0), st.integers(0, 10**6), st.integers(0, 10**13))
prices = st.dictionaries(components, some_rate).map(Price)
any_count = st.integers(-10, MAX_TOKENS)
tokens_only = st.builds(TokenUsage, any_count, any_count, any_count)
reported = st.builds(TokenUsage, any_count, any_count, any_count, further)

CACHE_WRITE, REASONING, SEARCH = Component.CACHE_WRITE, Component.REASONING_OUTPUT, Component.SEARCH


def test_a_charge_by_hand() -> None:
    price = token_price(4 * 10**9, 10**9, 16 * 10**9)
    charge = rate(TokenUsage(prompt=1000, cached=200, completion=300), price)
    assert charge.amounts == {INPUT: 3_200_000, CACHED_INPUT: 200_000, OUTPUT: 4_800_000}
    assert charge.total == 8_200_000


def test_further_components_by_hand() -> None:
    """A cache write at 3.75 a million, 12 searches at 2.00 a thousand, three images at 0.04 each, 90 seconds at 0.006
    a minute; and documents that have no price.
    """
    price = Price.of(
        input=3 * 10**9, output=0, cache_write=3_750_000_000, search=2 * 10**9, image=40_000_000, audio_second=6_000_000
    )
    more = {CACHE_WRITE: 400, SEARCH: 12, Component.IMAGE: 3, Component.AUDIO_SECOND: 90, Component.DOCUMENT: 7}
    charge = rate(TokenUsage(1000, 100, 0, more), price)
    assert charge.amounts == {
        INPUT: 500 * 3000,
        CACHED_INPUT: 100 * 3000,
        CACHE_WRITE: 400 * 3750,
        SEARCH: 24_000_000,
        Component.IMAGE: 120_000_000,
        Component.AUDIO_SECOND: 9_000_000,
    }


def test_without_a_rate_of_its_own_a_part_is_counted_with_what_it_is_part_of() -> None:
    usage = TokenUsage(1000, 200, 300, {CACHE_WRITE: 100, REASONING: 50, SEARCH: 3})
    price = token_price(4 * 10**9, 10**9, 16 * 10**9)
    assert rate(usage, price) == rate(TokenUsage(1000, 200, 300), price)
    apart = rate(usage, Price(price.rates | {REASONING: 0}))
    assert apart.amounts == {INPUT: 3_200_000, CACHED_INPUT: 200_000, OUTPUT: 4_000_000, REASONING: 0}


def as_before(prompt: int, cached: int, completion: int, price: tuple[int, int, int], cap: int) -> tuple[int, ...]:
    """Rating as it was when a price had three fields, frozen: input, cached, output, uncollected."""

    def rounded(product: int) -> int:
        return (product * 2 + 1_000_000) // 2_000_000

    full = [rounded((prompt - cached) * price[0]), rounded(cached * price[1]), rounded(completion * price[2])]
    over = max(sum(full) - max(cap, 0), 0)
    from_output = min(over, full[2])
    from_cached = min(over - from_output, full[1])
    from_input = min(over - from_output - from_cached, full[0])
    return full[0] - from_input, full[1] - from_cached, full[2] - from_output, from_output + from_cached + from_input


def hold_before(prompt: int, output: int, price: tuple[int, int, int]) -> int:
    """The hold as it was, frozen."""
    dearer = max(price[0], price[1])
    return (
        (prompt * dearer * 2 + 1_000_000) // 2_000_000
        + (output * price[2] * 2 + 1_000_000) // 2_000_000
        + (2 if dearer else 0)
    )


@given(tokens_only, st.tuples(per_million, per_million, per_million), st.integers(-100, 10**19), further)
def test_a_price_of_three_rates_gives_what_it_always_gave(
    usage: TokenUsage, three: tuple[int, int, int], cap: int, more: dict[Component, int]
) -> None:
    told = TokenUsage(usage.prompt, usage.cached, usage.completion, more)
    for each in (usage, told):  # whatever further components an engine tells of
        charge = rate_capped(each, token_price(*three), Nanos(cap))
        found = (*(charge.amounts.get(component, 0) for component in BASE), charge.uncollected)
        assert found == as_before(usage.prompt, usage.cached, usage.completion, three, cap)
        assert charge.amounts.keys() <= set(BASE)


@given(st.integers(0, MAX_TOKENS), st.integers(0, MAX_TOKENS), st.tuples(per_million, per_million, per_million))
def test_so_does_its_hold(prompt: int, output: int, three: tuple[int, int, int]) -> None:
    price = token_price(*three)
    assert hold_for(price, prompt_tokens=prompt, output_tokens=output) == hold_before(prompt, output, three)


@given(reported, prices)
def test_each_component_is_the_exact_price_rounded_once(usage: TokenUsage, price: Price) -> None:
    charge = rate(usage, price)
    quantities = usage.billed(price.rates)
    for component, nanos in charge.amounts.items():
        exact = Fraction(quantities[component] * price.rates[component], CATALOGUE[component].per)
        assert 0 <= nanos
        assert abs(nanos - exact) <= Fraction(1, 2)
    assert {each for each, quantity in quantities.items() if quantity} == charge.amounts.keys()
    assert charge.total == sum(charge.amounts.values())
    assert charge.uncollected == 0


@given(reported, prices)
def test_no_token_is_billed_twice_and_none_is_lost(usage: TokenUsage, price: Price) -> None:
    quantities = usage.billed(price.rates)
    assert min(quantities.values()) >= 0
    tokens = sum(quantity for each, quantity in quantities.items() if CATALOGUE[each].unit == "tokens")
    assert tokens == usage.total


@given(reported, reported, prices)
def test_more_never_costs_less(usage: TokenUsage, other: TokenUsage, price: Price) -> None:
    """By component: more of it, and no less of any other, is no cheaper."""
    smaller, larger = usage.billed(price.rates), other.billed(price.rates)
    ordered = all(larger.get(each, 0) >= quantity for each, quantity in smaller.items())
    if ordered:
        assert rate(other, price).total >= rate(usage, price).total
    for component, amount in rate(usage, price).amounts.items():
        if larger.get(component, 0) >= smaller[component]:
            assert rate(other, price).amounts.get(component, 0) >= amount


@given(reported, prices, st.integers(-100, 10**19))
def test_never_more_than_the_cap_and_nothing_is_lost(usage: TokenUsage, price: Price, cap: int) -> None:
    full, charge = rate(usage, price), rate_capped(usage, price, Nanos(cap))
    assert charge.total == min(full.total, max(cap, 0))
    assert charge.total + charge.uncollected == full.total
    assert charge.amounts.keys() == full.amounts.keys()
    assert all(0 <= charge.amounts[component] <= full.amounts[component] for component in full.amounts)


def test_the_output_gives_way_first_then_cached_then_input() -> None:
    price, usage = token_price(10**6, 10**6, 10**6), TokenUsage(20, 10, 10)
    by_cap = [rate_capped(usage, price, Nanos(cap)).amounts for cap in (25, 15, 5)]
    assert [tuple(each.values()) for each in by_cap] == [(10, 10, 5), (10, 5, 0), (5, 0, 0)]


def test_the_dearest_request_fits_a_database_column() -> None:
    dear = Price({component: spec.max_rate for component, spec in CATALOGUE.items()})
    most = {component: spec.most for component, spec in CATALOGUE.items() if component not in BASE}
    usage = TokenUsage(MAX_TOKENS, 0, MAX_TOKENS, most)
    assert rate(usage, dear).total <= MAX_NANOS
    assert rate_capped(usage, dear, Nanos(0)).uncollected <= MAX_NANOS


@given(reported, prices, st.integers(0, 1000), st.integers(0, 1000))
@example(TokenUsage(2, 1, 0), token_price(500_000, 500_000, 0), 0, 0)  # both halves of the prompt round up
@example(TokenUsage(3, 1, 0, {CACHE_WRITE: 1}), Price.of(input=500_000, cache_write=500_000), 0, 0)
@example(TokenUsage(0, 0, 2, {REASONING: 1}), Price.of(output=500_000, reasoning_output=500_000), 0, 0)
def test_the_hold_covers_every_request_within_its_bounds(
    usage: TokenUsage, price: Price, spare_prompt: int, spare_output: int
) -> None:
    counted = {each: quantity for each, quantity in usage.more.items() if CATALOGUE[each].part_of is None}
    hold = hold_for(
        price,
        prompt_tokens=usage.prompt + spare_prompt,
        output_tokens=usage.completion + spare_output,
        counted=counted,
    )
    assert rate(usage, price).total <= hold


@given(prices, st.integers(0, MAX_NANOS).map(Nanos), st.integers(0, 10**6), st.integers(0, 1000))
@example(token_price(0, 0, 1), Nanos(0), 0, 0)
def test_affordable_output_is_the_exact_inverse_of_the_hold(
    price: Price, budget: Nanos, prompt: int, searches: int
) -> None:
    counted = {SEARCH: searches} if searches else {}
    output = affordable_output(price, budget=budget, prompt_tokens=prompt, counted=counted)
    if hold_for(price, prompt_tokens=prompt, output_tokens=0, counted=counted) > budget:
        assert output == 0
        return
    assert hold_for(price, prompt_tokens=prompt, output_tokens=output, counted=counted) <= budget
    if output < MAX_OUTPUT:
        assert hold_for(price, prompt_tokens=prompt, output_tokens=output + 1, counted=counted) > budget


@given(prices, prices, reported)
def test_what_covers_its_cost_never_loses(price: Price, cost: Price, usage: TokenUsage) -> None:
    quantities = usage.billed(CATALOGUE)
    if covers(price, cost):
        assert cost_of(quantities, price) >= cost_of(quantities, cost)


def test_a_price_for_cache_writes_covers_only_a_cost_that_is_not_higher() -> None:
    cost = Price.of(input=3, cached_input=1, cache_write=4, output=9)
    assert not covers(Price.of(input=3, cached_input=1, output=9), cost)  # writes would be sold at 3
    assert covers(Price.of(input=4, cached_input=1, output=9), cost)
    assert covers(Price.of(input=3, cached_input=1, cache_write=4, output=9), cost)
    assert not covers(Price.of(input=9, output=9), Price.of(request=1))


@given(st.lists(tokens_only, max_size=5), st.tuples(per_million, per_million, per_million))
def test_the_cost_of_sums_is_rounded_once(usages: list[TokenUsage], three: tuple[int, int, int]) -> None:
    sums = {component: sum(each.billed(())[component] for each in usages) for component in BASE}
    exact = sum((Fraction(sums[each] * rate, 10**6) for each, rate in zip(BASE, three, strict=True)), Fraction(0))
    assert abs(cost_of(sums, token_price(*three)) - exact) <= Fraction(1, 2)


def test_a_price_always_has_rates_for_prompts_and_answers() -> None:
    assert Price.of(search=5).rates == {INPUT: 0, CACHED_INPUT: 0, OUTPUT: 0, SEARCH: 5}
    assert Price.of(input=4, output=16) == token_price(4, 4, 16)
    assert Price.of(input=4, cached_input=0, output=16).rates[CACHED_INPUT] == 0


@given(prices)
def test_half_a_price_is_half_of_each_rate(price: Price) -> None:
    half = price.scaled(1, 2)
    assert half.rates.keys() == price.rates.keys()
    assert all(abs(2 * half.rates[each] - price.rates[each]) <= 1 for each in price.rates)


def test_bad_prices_are_refused() -> None:
    with pytest.raises(LedgerError, match="price of output must be zero or more"):
        token_price(1, 1, -1)
    with pytest.raises(LedgerError, match=r"price of input is .* the maximum is 10000000\.00"):
        token_price(MAX_PRICE + 1, 1, 1)
    with pytest.raises(LedgerError, match=r"price of image is .* per image; the maximum is 10000\.00"):
        Price.of(image=10**13 + 1)
    with pytest.raises(LedgerError, match="no time zone"):
        PriceVersion("p", "m", "CNY", token_price(1, 1, 1), datetime(2026, 1, 1))
    with pytest.raises(LedgerError, match="currency"):
        PriceVersion("p", "m", "yuan", token_price(1, 1, 1), datetime(2026, 1, 1, tzinfo=UTC))
