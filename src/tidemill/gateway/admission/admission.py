"""Admission: a request's rate limits, holds and queue slot, taken before work starts.

All of it or nothing.

The limits come first (`gateway.admission.rate_limits`), then the money (`gateway.admission.holds`), then, if the model
is full, the queue (`gateway.admission.fair_queue`).
"""

import msgspec

from tidemill.clock import now_us
from tidemill.errors import Unavailable
from tidemill.gateway.admission.fair_queue import FairQueues, ModelQueue, Priority, QueueSlot, priority_of
from tidemill.gateway.admission.holds import CountPrompt, Hold, PurseTooSmall, hold_now, hold_scarce, insufficient
from tidemill.gateway.admission.rate_limits import BoundLimits, LimitReservation, RateLimits, estimate
from tidemill.gateway.auth.snapshot import Principal
from tidemill.gateway.protocols.dialect import dialect_of
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.routing.request_context import RequestContext
from tidemill.http.server import Exchange
from tidemill.ledger.pricing import PriceTier
from tidemill.meter.balance_leases import BalanceLeases, PurseId
from tidemill.store.budgets import BudgetPeriod

DO_NOT_RETRY = b"x-should-retry: false\r\n"
"""OpenAI's clients try a 429 again unless they read this."""


class Admitted(msgspec.Struct):
    """Everything that an admitted request holds. Call `settle` or `cancel` on it, once."""

    hold: Hold
    started_us: int
    """The instant whose budgets are held: microseconds since 1970 UTC."""
    stay: LimitReservation | None = None
    place: QueueSlot | None = None

    def settle(self, leasing: BalanceLeases, charge: int, used_tokens: int) -> None:
        """Settle an ended request with its cost and its tokens."""
        leasing.settle_all(self.hold.purses, self.hold.amount, charge)
        if self.stay is not None:
            self.stay.leave(used_tokens)
        if self.place is not None:
            self.place.leave(used_tokens)

    def cancel(self, leasing: BalanceLeases) -> None:
        """Release everything of a request that does not run after all."""
        leasing.settle_all(self.hold.purses, self.hold.amount, 0)
        if self.stay is not None:
            self.stay.cancel()
        if self.place is not None:
            self.place.leave(0)


class Admission:
    """Admits the requests of one gateway process."""

    def __init__(
        self, leasing: BalanceLeases, limits: RateLimits | None = None, queues: FairQueues | None = None
    ) -> None:
        self._leasing = leasing
        self._limits = limits
        self._queues = queues

    def admit_now(self, context: RequestContext) -> Admitted | None:
        """Admit a request without waiting, or return None if it would have to wait. The hot path.

        Raises RateLimited for what can never be admitted.
        """
        limits, queue = self._limits_of(context), self._queue(context)
        started_us = now_us()
        purses = self._purses(limits, context.principal, started_us)
        hold = hold_now(context.request, context.route, context.price, self._leasing, purses)
        if hold is None:
            return None
        admitted = Admitted(hold, started_us)
        if limits is None and queue is None:
            return admitted
        complete = False
        try:
            complete = self._take_now(admitted, context, limits, queue)
        finally:
            if not complete:
                admitted.cancel(self._leasing)
        return admitted if complete else None

    def _take_now(
        self, admitted: Admitted, context: RequestContext, limits: BoundLimits | None, queue: ModelQueue | None
    ) -> bool:
        """Take a slot and permits beside the hold; False if it would have to wait for one of them."""
        if queue is not None:
            admitted.place = queue.enter_now(*_turn(context))
            if admitted.place is None:
                return False
        if limits is not None:
            assert self._limits is not None
            admitted.stay = self._limits.enter_now(limits, context.request, context.exchange.body)
            if admitted.stay is None:
                return False
            self._note_limits(context.exchange, limits)
        return True

    async def admit(self, context: RequestContext, count_prompt: CountPrompt) -> Admitted | None:
        """Admit a request, waiting for what it needs; None if its client leaves meanwhile.

        Raises RateLimited, BudgetExhausted, InsufficientQuota or QueueFull when there is no more of something, and
        Unavailable when the store does not answer.
        """
        exchange, request = context.exchange, context.request
        limits, queue = self._limits_of(context), self._queue(context)
        stay = await self._enter(exchange, limits, request) if limits is not None else None
        admitted: Admitted | None = None
        try:
            started_us = now_us()
            admitted = Admitted(await self._hold(context, limits, started_us, count_prompt), started_us, stay)
            if queue is not None and not exchange.gone:
                turn = _turn(context)
                admitted.place = queue.enter_now(*turn) or await queue.enter(exchange, *turn)
        except BaseException:
            if admitted is not None:
                admitted.cancel(self._leasing)
            elif stay is not None:
                stay.cancel()
            raise
        if exchange.gone:
            admitted.cancel(self._leasing)
            return None
        return admitted

    async def admit_count(self, exchange: Exchange, request: ModelRequest, principal: Principal) -> None:
        """Admit a request that only counts tokens: it takes a permit of each limit on requests per minute.

        Raises RateLimited when there is no more, Unavailable when the store does not answer.
        """
        plan = self._limits.plan_of_count(principal, request.model) if self._limits is not None else None
        if plan is not None:
            await self._enter(exchange, plan, request)

    def _limits_of(self, context: RequestContext) -> BoundLimits | None:
        return self._limits.plan(context.principal, context.request.model) if self._limits is not None else None

    def _queue(self, context: RequestContext) -> ModelQueue | None:
        """The queue that the request may have to wait in; None if there is none.

        A line that goes to a replica lent to batches takes nobody's place.
        """
        route = context.route
        if self._queues is None or (route.batch_only and context.principal.tier is PriceTier.BATCH and route.lends):
            return None
        return self._queues.of(route.spec.name)

    async def _enter(self, exchange: Exchange, plan: BoundLimits, request: ModelRequest) -> LimitReservation:
        assert self._limits is not None
        try:
            return await self._limits.enter(plan, request, exchange.body)
        finally:
            self._note_limits(exchange, plan)

    async def _hold(
        self, context: RequestContext, limits: BoundLimits | None, started_us: int, count_prompt: CountPrompt
    ) -> Hold:
        purses = self._purses(limits, context.principal, started_us)
        try:
            return await hold_scarce(context.request, context.route, context.price, self._leasing, purses, count_prompt)
        except PurseTooSmall as lack:
            self._leasing.let_go(lack.purse)
            if isinstance(lack.purse, BudgetPeriod):
                assert limits is not None and self._limits is not None
                context.exchange.extra += DO_NOT_RETRY
                raise self._limits.budget_exhausted(limits, lack.purse, lack.needed, lack.available) from None
            raise insufficient(context.principal, lack) from None
        except Unavailable as failure:
            raise Unavailable(
                "Your balance cannot be checked now: the database does not answer, and what this gateway had"
                " reserved is used up.",
                hint="Try again in a moment.",
            ) from failure

    def _purses(self, plan: BoundLimits | None, principal: Principal, started_us: int) -> tuple[PurseId, ...]:
        if plan is None or self._limits is None:
            return (principal.tenant_id,)
        return self._limits.purses(plan, principal, started_us)

    def _note_limits(self, exchange: Exchange, plan: BoundLimits) -> None:
        assert self._limits is not None
        exchange.extra += self._limits.headers(plan, dialect_of(exchange))


def _turn(context: RequestContext) -> tuple[str, int, int, Priority]:
    """The request's priority, tenant and estimated work, for the queue.

    Whose it is, with what weight, how much work, of which class.
    """
    request, principal = context.request, context.principal
    work = sum(estimate(request, context.exchange.body))
    return principal.tenant_id, principal.weight, work, priority_of(request, principal)
