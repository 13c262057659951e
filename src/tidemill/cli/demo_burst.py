"""The burst of `tidemill demo`: many concurrent requests, and a balance for exactly ten.

Exactly, at any speed and in any order, as the money is reckoned from both sides:

- ten times the most that a request can be held for, so that nobody's hold keeps one of the ten out;
- less than eleven answers cost, whatever the prompts come to, so that no money that is free again lets one more in.

The two meet only where an answer costs far more than the bound on its prompt (its bytes and a chat template's, in
docs/policies.md). With a balance of ten charges instead, what is answered hangs on how soon the first ones end: their
holds are bounds, of which five fill the balance, and the rest gets in as money comes back.
"""

from typing import Any

from tidemill.cli.demo_platform import body_of
from tidemill.gateway.admission.holds import TEMPLATE_TOKENS
from tidemill.ledger.components import OUTPUT
from tidemill.ledger.money import Nanos
from tidemill.ledger.pricing import Price, hold_for

BURST = 200
"""Requests sent at once."""
ENOUGH_FOR = 10
TOKENS = 72
"""Of each answer, no fewer: an answer that ends early would leave money for another one."""
STEP = Nanos(10_000)
"""A balance is granted in whole multiples of this: 0.00001."""


def wanted(model: str, number: int) -> dict[str, Any]:
    """One of the requests. All have as many bytes."""
    content = f"Tell me fact {number:03} about tides."
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": TOKENS, "ignore_eos": True}


def most(model: str, price: Price) -> Nanos:
    """The most that one request can cost, as the gateway holds it."""
    bound = len(body_of(wanted(model, 0))) + TEMPLATE_TOKENS
    return hold_for(price, prompt_tokens=bound, output_tokens=TOKENS)


def answer_alone(price: Price) -> Nanos:
    """The least that one request costs: its answer, with a prompt for nothing."""
    return hold_for(Price.of(output=price.rates[OUTPUT]), prompt_tokens=0, output_tokens=TOKENS)


def balance(model: str, price: Price) -> Nanos:
    """What is enough for ENOUGH_FOR requests, and for none more. Raises ValueError when no amount is."""
    amount = Nanos(-(-ENOUGH_FOR * most(model, price) // STEP) * STEP)
    if amount >= (ENOUGH_FOR + 1) * answer_alone(price):
        raise ValueError(f"at {price} no balance is enough for {ENOUGH_FOR} requests and never for one more")
    return amount
