"""Admission: the most that a request can cost is held against the tenant's balance before work starts.

The prompt is bounded by its bytes, as a token has at least one. Only when the balance does not cover that bound is
the engine asked to count the prompt exactly. What remains of a balance may still be used by one request at a time
that asks for more than it pays for: its answer is limited to what the balance covers, and a stream that reaches the
limit ends with an error event. Written down for tenants in docs/policies.md.
"""

from collections.abc import Awaitable, Callable

import msgspec

from tidemill.gateway.errors import InsufficientQuota
from tidemill.gateway.requests import ModelRequest
from tidemill.gateway.routing import Route
from tidemill.gateway.snapshot import PricePoint, Principal
from tidemill.ledger.money import Nanos, format_amount
from tidemill.ledger.pricing import affordable_output, hold_for
from tidemill.meter.leasing import Leasing

TEMPLATE_TOKENS = 256
"""What a chat template may add to a prompt beyond its bytes, such as a default system message."""

CountPrompt = Callable[[], Awaitable[int | None]]


class Hold(msgspec.Struct, frozen=True):
    """Money set aside for a request."""

    amount: Nanos
    output_cap: int
    """Tokens that each choice may have."""
    cut_short: bool
    """The cap is what the balance pays for, not what the client asked for."""


def output_bound(request: ModelRequest, route: Route) -> int:
    """The most tokens that each choice can have: the client's limit or the model's, within the context."""
    if not request.ask.generates:
        return 0
    asked = request.ask.max_tokens or route.spec.max_output_tokens
    return min(asked, route.spec.context) if route.spec.context else asked


def prompt_bound(request: ModelRequest, route: Route) -> int:
    """The most tokens that the prompt, or all prompts together, can have."""
    bound = request.body_bytes + TEMPLATE_TOKENS
    return min(bound, route.spec.context * request.ask.prompts) if route.spec.context else bound


def hold_now(
    request: ModelRequest, route: Route, principal: Principal, price: PricePoint, leasing: Leasing
) -> Hold | None:
    """Hold the bound from what this process has leased; None when that is not enough. The hot path."""
    cap = output_bound(request, route)
    amount = hold_for(price.price, prompt_tokens=prompt_bound(request, route), output_tokens=cap * request.ask.choices)
    if leasing.hold_now(principal.tenant_id, amount):
        return Hold(amount, cap, cut_short=False)
    return None


async def hold_scarce(
    request: ModelRequest,
    route: Route,
    principal: Principal,
    price: PricePoint,
    leasing: Leasing,
    count_prompt: CountPrompt,
) -> Hold:
    """Hold what a request needs from a balance that is nearly used up, or not leased to this process yet.

    Raises InsufficientQuota when the balance does not cover it, Unavailable when the store does not answer.
    """
    tenant, choices = principal.tenant_id, request.ask.choices
    cap = output_bound(request, route)
    prompt = prompt_bound(request, route)
    amount = hold_for(price.price, prompt_tokens=prompt, output_tokens=cap * choices)
    if await leasing.hold(tenant, amount):
        return Hold(amount, cap, cut_short=False)

    wallet = leasing.purse(tenant).wallet
    if hold_for(price.price, prompt_tokens=1, output_tokens=1) <= wallet.available:
        counted = await count_prompt()
        if counted is not None and counted < prompt:
            prompt = counted
            amount = hold_for(price.price, prompt_tokens=prompt, output_tokens=cap * choices)
            if await leasing.hold(tenant, amount):
                return Hold(amount, cap, cut_short=False)
        if wallet.holds == 0 and request.ask.generates and (request.ask.stream or request.ask.max_tokens is None):
            budget = Nanos(wallet.available)
            fits = affordable_output(price.price, budget=budget, prompt_tokens=prompt) // choices
            rest = hold_for(price.price, prompt_tokens=prompt, output_tokens=fits * choices)
            if fits >= 1 and wallet.hold(rest):
                return Hold(rest, fits, cut_short=True)
    raise _insufficient(principal, amount, wallet.available, prompt, cap * choices)


def _insufficient(principal: Principal, needed: int, available: int, prompt: int, output: int) -> InsufficientQuota:
    currency = principal.currency
    return InsufficientQuota(
        f"Your balance does not cover this request: it may cost up to {format_amount(needed)} {currency}"
        f" ({prompt} prompt and {output} output tokens), and {format_amount(max(available, 0))} {currency} is free.",
        hint="Top up the balance, wait until requests in flight have finished, or lower max_tokens.",
    )


def mid_stream_stop() -> InsufficientQuota:
    """The last event of a stream that has used the balance up."""
    return InsufficientQuota(
        "Your balance is used up; the answer was stopped here.", hint="Top up the balance and ask again."
    )
