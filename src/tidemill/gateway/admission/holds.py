"""Holds: the maximum cost of a request is held before it runs.

It is held in every wallet that pays for the request, or in none.

A wallet is the tenant's balance, or a budget. The prompt is bounded by its bytes, as a token has at least one. The
engine counts the prompt exactly only if a wallet does not cover that bound. If a wallet can't cover the maximum cost,
one request at a time may run, capped at what it covers; a stream that reaches the cap ends with an error event. Written
down for tenants in docs/policies.md.
"""

from collections.abc import Awaitable, Callable

import msgspec

from tidemill.errors import TidemillError
from tidemill.gateway.admission.quantities import bound
from tidemill.gateway.auth.snapshot import PricePoint, Principal
from tidemill.gateway.errors import BudgetExhausted, InsufficientQuota
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.routing.models import ModelRoute
from tidemill.ledger.money import Nanos, format_amount
from tidemill.ledger.pricing import affordable_output, hold_for
from tidemill.meter.balance_leases import BalanceLeases, PurseId
from tidemill.store.budgets import BudgetPeriod

TEMPLATE_TOKENS = 256
"""What a chat template may add to a prompt beyond its bytes, such as a default system message."""

CountPrompt = Callable[[], Awaitable[int | None]]


class Hold(msgspec.Struct, frozen=True, gc=False):
    """Money set aside for a request."""

    amount: Nanos
    output_cap: int
    """Tokens that each choice may have."""
    cut_short: bool
    """The cap is what the balance, or a budget, pays for, not what the client asked for."""
    purses: tuple[PurseId, ...]
    """What it is held in: the balance, and the budgets that bind the request."""
    scarce: PurseId | None = None
    """The wallet that limits the answer."""


def output_bound(request: ModelRequest, route: ModelRoute) -> int:
    """The maximum tokens of each choice: the client's limit or the model's, within the context."""
    if not request.ask.generates:
        return 0
    asked = request.ask.max_tokens or route.spec.max_output_tokens
    return min(asked, route.spec.context) if route.spec.context else asked


def prompt_bound(request: ModelRequest, route: ModelRoute) -> int:
    """The maximum tokens of the prompt, or of all prompts together."""
    bound = request.body_bytes + TEMPLATE_TOKENS + route.engine.unseen_tokens(request.ask)
    return min(bound, route.spec.context * request.ask.prompts) if route.spec.context else bound


def hold_now(
    request: ModelRequest, route: ModelRoute, price: PricePoint, leasing: BalanceLeases, purses: tuple[PurseId, ...]
) -> Hold | None:
    """Hold the maximum cost from this process's leases; None if they don't cover it. The hot path."""
    cap = output_bound(request, route)
    amount = hold_for(
        price.price,
        prompt_tokens=prompt_bound(request, route),
        output_tokens=cap * request.ask.choices,
        counted=bound(request.ask, price.price),
    )
    if leasing.hold_all_now(purses, amount):
        return Hold(amount, cap, cut_short=False, purses=purses)
    return None


class PurseTooSmall(Exception):
    """A wallet does not cover the maximum cost of a request."""

    def __init__(self, purse: PurseId, needed: int, available: int, prompt: int, output: int) -> None:
        super().__init__(purse)
        self.purse = purse
        self.needed = needed
        self.available = available
        self.prompt = prompt
        self.output = output


async def hold_scarce(
    request: ModelRequest,
    route: ModelRoute,
    price: PricePoint,
    leasing: BalanceLeases,
    purses: tuple[PurseId, ...],
    count_prompt: CountPrompt,
) -> Hold:
    """Hold what a request needs from wallets that are nearly empty.

    Or that are not leased to this process yet.

    Raises NotCovered when one does not cover it, Unavailable when the store does not answer.
    """
    choices = request.ask.choices
    cap = output_bound(request, route)
    prompt = prompt_bound(request, route)
    most = bound(request.ask, price.price)

    def needed(prompt: int, output: int) -> Nanos:
        return hold_for(price.price, prompt_tokens=prompt, output_tokens=output, counted=most)

    amount = needed(prompt, cap * choices)
    lacking = await leasing.hold_all(purses, amount)
    if lacking is None:
        return Hold(amount, cap, cut_short=False, purses=purses)

    wallet = leasing.purse(lacking).wallet
    if needed(1, 1) <= wallet.available:
        counted = await count_prompt()
        if counted is not None and counted < prompt:
            prompt = counted
            amount = needed(prompt, cap * choices)
            still = await leasing.hold_all(purses, amount)
            if still is None:
                return Hold(amount, cap, cut_short=False, purses=purses)
            lacking, wallet = still, leasing.purse(still).wallet
        if wallet.holds == 0 and request.ask.generates and (request.ask.stream or request.ask.max_tokens is None):
            budget = Nanos(wallet.available)
            fits = affordable_output(price.price, budget=budget, prompt_tokens=prompt, counted=most) // choices
            rest = needed(prompt, fits * choices)
            if fits >= 1 and rest <= wallet.available and await leasing.hold_all(purses, rest) is None:
                return Hold(rest, fits, cut_short=True, purses=purses, scarce=lacking)
    raise PurseTooSmall(lacking, amount, leasing.free(lacking), prompt, cap * choices)


def insufficient(principal: Principal, lack: PurseTooSmall) -> InsufficientQuota:
    """The error for a request that the balance does not cover."""
    currency = principal.currency
    return InsufficientQuota(
        f"Your balance does not cover this request: it may cost up to {format_amount(lack.needed)} {currency}"
        f" ({lack.prompt} prompt and {lack.output} output tokens), and {format_amount(max(lack.available, 0))}"
        f" {currency} is available.",
        hint="Top up the balance, wait until requests in flight have finished, or lower max_tokens.",
    )


def mid_stream_stop(hold: Hold) -> TidemillError:
    """The error for the end of a stream that has used up the balance or a budget."""
    if isinstance(hold.scarce, BudgetPeriod):
        return BudgetExhausted(
            "Your budget is used up; the answer was stopped here.",
            hint="Try again in its next period, or ask your operator to raise it.",
            retry_after_s=0,
        )
    return InsufficientQuota(
        "Your balance is used up; the answer was stopped here.", hint="Top up the balance and try again."
    )
