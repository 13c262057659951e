"""Rate limits and budgets, checked when a request is admitted.

What a request takes of them, and what it is told when there is no more.

A request takes one permit of each limit on requests per minute, its estimated tokens of each on tokens per minute,
and a slot of each on concurrent requests: all or nothing. Budgets are wallets beside the balance (`meter.wallet`). No
limits cost one empty-tuple check.
"""

import asyncio
import time
from collections.abc import Callable

import msgspec

from tidemill.clock import from_micros
from tidemill.engines.sse import BYTES_PER_TOKEN
from tidemill.gateway.admission.limit_leases import LimitLeases, RateLease, Share, SlotLease
from tidemill.gateway.auth.snapshot import AccessSnapshot, Principal
from tidemill.gateway.errors import BudgetExhausted, RateLimited
from tidemill.gateway.protocols.dialect import OPENAI, Dialect
from tidemill.gateway.protocols.limit_headers import LimitState, limit_headers
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.ledger.limits import Limit, LimitKind, scope_of, span_of, title_of
from tidemill.ledger.money import format_amount
from tidemill.ledger.pricing import PriceTier
from tidemill.ledger.windows import RATE_WINDOW_S
from tidemill.meter.balance_leases import PurseId
from tidemill.store.budgets import BudgetPeriod

EXPECTED_OUTPUT = 1024
"""Tokens that an answer is taken to have at the most until it is known. Many requests set a limit far beyond."""
FILE_TOKENS = 1024
"""What a picture within a prompt is taken for, whatever its bytes."""
FILE_MARK = b";base64,"
FILE_BYTES = 16 * 1024
"""A shorter body is not searched for pictures."""
RECALL_S = 2.5
"""How long a request waits for permits that other gateway processes hold and do not use: they give them back with
their second report, a report a second."""
RECALL_EVERY_S = 0.2


class BudgetLimit:
    """A budget, with its current period."""

    __slots__ = ("_period", "_until_us", "limit", "zone")

    def __init__(self, limit: Limit, zone: str) -> None:
        self.limit = limit
        self.zone = zone
        self._period: BudgetPeriod | None = None
        self._until_us = 0

    def period(self, now_us: int) -> BudgetPeriod:
        """The wallet of the period that contains an instant (microseconds since 1970 UTC)."""
        period = self._period
        if period is None or not now_us < self._until_us:
            assert self.limit.per is not None
            span = span_of(from_micros(now_us), self.limit.per, self.zone)
            period = self._period = BudgetPeriod(self.limit.limit_id, span)
            self._until_us = int(span.end.timestamp() * 1_000_000)
        return period


class BoundLimits(msgspec.Struct, frozen=True):
    """The limits that apply to one key's requests for one model."""

    principal: Principal
    requests: tuple[RateLease, ...]
    tokens: tuple[RateLease, ...]
    slots: tuple[SlotLease, ...]
    budgets: tuple[BudgetLimit, ...]

    @property
    def fewest_tokens(self) -> int:
        """The lowest of the limits on tokens per minute."""
        return min(rate.limit.amount for rate in self.tokens)

    def lacking(self, tokens: int, second: int) -> list[tuple[Share, int]]:
        """The limits that lack permits for a request, with the amounts needed."""
        missing: list[tuple[Share, int]] = [(rate, 1) for rate in self.requests if rate.share.at_hand(second) < 1]
        missing += [(rate, tokens) for rate in self.tokens if rate.share.at_hand(second) < tokens]
        missing += [(slots, 1) for slots in self.slots if slots.share.at_hand(second) < 1]
        return missing


class LimitReservation:
    """The permits of an admitted request. Call `leave` or `cancel` on it, once."""

    __slots__ = ("_plan", "_second", "_shares", "tokens")

    def __init__(self, shares: LimitLeases, plan: BoundLimits, tokens: int, second: int) -> None:
        """Take it all. It must be at hand, and nothing may have happened since that was seen."""
        self._shares = shares
        self._plan = plan
        self._second = second
        self.tokens = tokens
        for rate in plan.requests:
            rate.share.take(1, second)
            if rate.runs_low:
                shares.nudge(rate)
        for rate in plan.tokens:
            rate.share.take(tokens, second)
            if rate.runs_low:
                shares.nudge(rate)
        for slots in plan.slots:
            slots.share.take(second)

    def leave(self, used_tokens: int) -> None:
        """Release an ended request; its actual tokens replace the estimate."""
        for slots in self._plan.slots:
            slots.share.leave()
        for rate in self._plan.tokens:
            if used_tokens < self.tokens:
                rate.share.refund(self.tokens - used_tokens, self._second)
                rate.denied_until = 0.0  # there may be enough now
            elif used_tokens > self.tokens:
                rate.share.overrun(used_tokens - self.tokens, self._shares.second())

    def cancel(self) -> None:
        """Undo the reservation of a request that was not admitted; it counts for nothing."""
        for rate in self._plan.requests:
            rate.share.refund(1, self._second)
        self.leave(0)


class RateLimits:
    """The limits of one gateway process.

    `zone` is the operator's time zone, which bounds the days of budgets.
    """

    def __init__(self, shares: LimitLeases, zone: str, *, wall: Callable[[], float] = time.time) -> None:
        self.shares = shares
        self._zone = zone
        self._wall = wall
        self._plans: dict[tuple[str, str, PriceTier], BoundLimits] = {}
        self._warned: frozenset[tuple[str, str]] = frozenset()

    def update(self, snapshot: AccessSnapshot) -> None:
        """Replace the limits by those of a new snapshot."""
        self._plans.clear()
        self._warned = snapshot.warned
        self.shares.refresh(snapshot.limit_ids)

    def plan(self, principal: Principal, model: str) -> BoundLimits | None:
        """The limits that apply to this request; None if there are none.

        The lines of batches are bound by budgets only.
        """
        if not principal.limits:
            return None
        name = (principal.key_id, model, principal.tier)
        plan = self._plans.get(name)
        if plan is None:
            plan = self._plans[name] = self._make(principal, model)
        return plan

    def _make(self, principal: Principal, model: str) -> BoundLimits:
        binding = [limit for limit in principal.limits if limit.binds(principal.first_key_id, model)]
        live = binding if principal.tier is PriceTier.STANDARD else []
        return BoundLimits(
            principal=principal,
            requests=tuple(self.shares.rate(limit) for limit in live if limit.kind is LimitKind.RPM),
            tokens=tuple(self.shares.rate(limit) for limit in live if limit.kind is LimitKind.TPM),
            slots=tuple(self.shares.slots(limit) for limit in live if limit.kind is LimitKind.CONCURRENCY),
            budgets=tuple(BudgetLimit(limit, self._zone) for limit in binding if limit.kind is LimitKind.BUDGET),
        )

    def purses(self, plan: BoundLimits | None, principal: Principal, now_us: int) -> tuple[PurseId, ...]:
        """The wallets that a request is paid from: the balance, and the budgets' current periods."""
        if plan is None or not plan.budgets:
            return (principal.tenant_id,)
        return (principal.tenant_id, *(budget.period(now_us) for budget in plan.budgets))

    def enter_now(self, plan: BoundLimits, request: ModelRequest, body: bytes) -> LimitReservation | None:
        """Take all permits that the request needs without waiting; None if one is lacking.

        The hot path. Raises RateLimited when it never fits.
        """
        tokens = self._tokens(plan, request, body)
        second = self.shares.second()
        for rate in plan.requests:
            if rate.share.held < 1 or second > rate.share.valid:
                return None
        for rate in plan.tokens:
            if rate.share.held < tokens or second > rate.share.valid:
                return None
        for slots in plan.slots:
            if slots.share.at_hand(second) < 1:
                return None
        return LimitReservation(self.shares, plan, tokens, second)

    def plan_of_count(self, principal: Principal, model: str) -> BoundLimits | None:
        """The limits that apply to a request that only counts tokens.

        Limits on requests per minute, the same as those of its messages.
        """
        plan = self.plan(principal, model)
        if plan is None or not plan.requests:
            return None
        return BoundLimits(principal, plan.requests, (), (), ())

    async def enter(self, plan: BoundLimits, request: ModelRequest, body: bytes) -> LimitReservation:
        """Take all permits that the request needs, asking the store for missing ones.

        Raises RateLimited when there is no more, Unavailable when the store does not answer.
        """
        shares, began = self.shares, self.shares.clock()
        tokens = self._tokens(plan, request, body)
        while lacking := plan.lacking(tokens, second := shares.second()):
            now = shares.clock()
            denied = [
                (share, amount)
                for share, amount in lacking
                if now < share.denied_until and amount >= share.denied_least
            ]
            if denied:
                await self._wait_for_others(plan, denied, now - began)
                for share, _ in denied:
                    share.denied_until = 0.0
            await shares.renew(lacking)
        return LimitReservation(shares, plan, tokens, second)

    async def _wait_for_others(self, plan: BoundLimits, denied: list[tuple[Share, int]], waited_s: float) -> None:
        """Wait a moment if other processes hold enough unused permits. Raises RateLimited if not."""
        for share, amount in denied:
            if waited_s > RECALL_S or share.elsewhere < share.patient + amount:
                raise self._denial(plan, share, amount)
        for share, amount in denied:
            share.patient += amount
        try:
            await asyncio.sleep(RECALL_EVERY_S)
        finally:
            for share, amount in denied:
                share.patient -= amount

    def headers(self, plan: BoundLimits, dialect: Dialect = OPENAI) -> bytes:
        """The rate limit headers of an answer, as bytes.

        They are the tightest limits, as the API's clients read them, and the warnings of soft budgets.
        """
        second = self.shares.second()
        lines = b""
        for what, rates in ((b"requests", plan.requests), (b"tokens", plan.tokens)):
            if rates:
                lines += limit_headers(_tightest(what, rates, second), dialect, self._wall())
        if self._warned:
            lines += self._warnings(plan)
        return lines

    def budget_exhausted(self, plan: BoundLimits, period: BudgetPeriod, needed: int, available: int) -> BudgetExhausted:
        """The error for a request that this budget does not cover."""
        limit = next(budget.limit for budget in plan.budgets if budget.limit.limit_id == period.limit_id)
        currency, span = plan.principal.currency, period.span
        left_s = max(1, int(span.end.timestamp() - self._wall()) + 1)
        return BudgetExhausted(
            f"The {title_of(limit, currency).removeprefix('a ')} for {scope_of(limit)} does not cover this request:"
            f" it may cost up to {format_amount(needed)} {currency}, and"
            f" {format_amount(max(available, 0))} {currency} is available.",
            hint=f"The next period begins at {span.end:%Y-%m-%d %H:%M} UTC; or ask your operator to raise the budget.",
            retry_after_s=left_s,
        )

    def _warnings(self, plan: BoundLimits) -> bytes:
        now_us = int(self._wall() * 1_000_000)
        lines = []
        for budget in plan.budgets:
            period = budget.period(now_us)
            if (period.limit_id, period.span.label) in self._warned:
                limit = budget.limit
                title = title_of(limit, plan.principal.currency)
                lines.append(
                    f"x-tidemill-budget-warning: {limit.soft_percent}% of {title} for {scope_of(limit)} is used\r\n"
                )
        return "".join(lines).encode("ascii", "replace")

    def _tokens(self, plan: BoundLimits, request: ModelRequest, body: bytes) -> int:
        """The number of tokens to take from the limits on tokens per minute.

        Raises RateLimited for a prompt that never fits.
        """
        if not plan.tokens:
            return 0
        prompt, answer = estimate(request, body)
        fewest = plan.fewest_tokens
        if prompt > fewest:
            limit = min((rate.limit for rate in plan.tokens), key=lambda limit: limit.amount)
            raise RateLimited(
                f"This request is too large for {scope_of(limit)}: its prompt is estimated at {prompt:,} tokens, and"
                f" the limit is {title_of(limit, '')}.",
                hint="Send a shorter prompt, or ask your operator to raise the limit.",
                retry_after_s=RATE_WINDOW_S,
            )
        return min(prompt + answer, fewest)

    def _denial(self, plan: BoundLimits, share: Share, amount: int) -> RateLimited:
        limit, now = share.limit, self.shares.clock()
        wait_s = 1 if limit.kind is LimitKind.CONCURRENCY else max(1, -int(now - share.frees_at))
        asked = f" This request needs {amount:,} tokens." if limit.kind is LimitKind.TPM else ""
        when = "when one of them has finished" if limit.kind is LimitKind.CONCURRENCY else f"in {wait_s} s"
        return RateLimited(
            f"Rate limit reached for {scope_of(limit)}: {title_of(limit, '')}.{asked}",
            hint=f"Try again {when}.",
            retry_after_s=wait_s,
        )


def estimate(request: ModelRequest, body: bytes) -> tuple[int, int]:
    """The estimated tokens of a request, before they are known: (prompt, answer)."""
    size = request.body_bytes
    prompt = size // BYTES_PER_TOKEN
    if len(body) > FILE_BYTES and (files := body.count(FILE_MARK)):
        prompt = min(prompt, FILE_BYTES // BYTES_PER_TOKEN + files * FILE_TOKENS)
    if not request.ask.generates:
        return prompt, 0
    return prompt, min(request.ask.max_tokens or EXPECTED_OUTPUT, EXPECTED_OUTPUT) * request.ask.choices


def _tightest(what: bytes, rates: tuple[RateLease, ...], second: int) -> LimitState:
    """The limit with the least left."""
    tightest = min(rates, key=lambda rate: rate.remaining(second)) if len(rates) > 1 else rates[0]
    reset_s = max(tightest.share.last_used + RATE_WINDOW_S + 1 - second, 0)
    return LimitState(what, tightest.limit.amount, tightest.remaining(second), reset_s)
