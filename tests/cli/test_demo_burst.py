"""The balance of the demo's burst is enough for ten requests, and for no eleventh, by the gateway's own arithmetic."""

import random

import pytest

from tests.support.prices import token_price
from tidemill.cli import demo, demo_burst
from tidemill.cli.demo_platform import body_of
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.pricing import hold_for, rate
from tidemill.ledger.usage import TokenUsage

BALANCE = demo_burst.balance(demo.MODEL, demo.PRICE)
MOST = demo_burst.most(demo.MODEL, demo.PRICE)


def test_it_is_what_the_tenant_is_granted() -> None:
    assert parse_amount(demo.TENANTS[demo.SHOAL][1]) == BALANCE


def test_all_requests_have_as_many_bytes() -> None:
    lengths = {len(body_of(demo_burst.wanted(demo.MODEL, number))) for number in range(demo_burst.BURST)}
    assert len(lengths) == 1


@pytest.mark.parametrize("seed", range(200))
def test_ten_are_let_in_whatever_the_order(seed: int) -> None:
    """Each is held for by the bound, or by its exact prompt; answers end at any time, with any share of it cached."""
    chance = random.Random(seed)
    free, answered = BALANCE, 0
    held: list[tuple[Nanos, int]] = []
    for _ in range(demo_burst.BURST):
        while held and chance.random() < 0.3:
            hold, prompt = held.pop(chance.randrange(len(held)))
            usage = TokenUsage(prompt=prompt, cached=chance.randint(0, prompt), completion=demo_burst.TOKENS)
            free = Nanos(free + hold - rate(usage, demo.PRICE).total)
        prompt = chance.randint(1, 139)
        counted = hold_for(demo.PRICE, prompt_tokens=prompt, output_tokens=demo_burst.TOKENS)
        fits = next((amount for amount in (MOST, counted) if amount <= free), None)
        if fits is not None:
            free = Nanos(free - fits)
            held.append((fits, prompt))
            answered += 1
    assert answered == demo_burst.ENOUGH_FOR


def test_prices_at_which_it_cannot_be_exact_are_refused() -> None:
    with pytest.raises(ValueError, match="no balance is enough for 10"):
        demo_burst.balance(demo.MODEL, token_price(6_000_000_000, 1_500_000_000, 60_000_000_000))
