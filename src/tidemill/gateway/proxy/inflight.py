"""A request in flight: from its hold to its record. Whatever happens in between, it is settled exactly once."""

from collections.abc import Callable

import msgspec

from tidemill.clock import now_us
from tidemill.gateway.admission.admission import Admitted
from tidemill.gateway.admission.quantities import counted, used
from tidemill.gateway.metrics import RequestMetrics
from tidemill.gateway.protocols.reply import Reply
from tidemill.gateway.proxy.relay import Cause, Client, Ending, Relay
from tidemill.gateway.routing.demand import work_done
from tidemill.gateway.routing.replica import ReplicaAttempt
from tidemill.gateway.routing.request_context import RequestContext
from tidemill.gateway.routing.selector import RouteSelector
from tidemill.http.client import AnswerOwner, EngineConnection, EngineLost
from tidemill.ledger.money import format_amount
from tidemill.meter.balance_leases import BalanceLeases
from tidemill.meter.live import LiveTable
from tidemill.meter.log import LogFull, UsageLog
from tidemill.meter.records import Opened, encode_settled, settle

LINE_PATIENCE_S = 3600.0
"""A replica that is lent to batches may get what another one leaves, which may be nothing for long: a line there waits,
and is not lost. (The batch runner waits as long.)"""


class GatewayMeter:
    """The meter of one gateway process: where requests are opened, counted and settled."""

    def __init__(
        self,
        log: UsageLog,
        live: LiveTable,
        leasing: BalanceLeases,
        *,
        metrics: RequestMetrics | None = None,
        tells_charge: bool = False,
    ) -> None:
        """`tells_charge`: answers say what they cost (`gateway.charge_header`)."""
        self.log = log
        self.live = live
        self.leasing = leasing
        self.metrics = metrics or RequestMetrics()
        self.tells_charge = tells_charge


class InFlightRequest:
    """One admitted request. Its slot in the live table exists from here on, so a record will come out."""

    attempts = 1
    resent = False
    """It was sent once more after an engine that had it was lost."""
    device_ns = 0
    """Its share of the time of replicas that it has left again."""
    connection: EngineConnection | None = None
    hedge: AnswerOwner | None = None
    """Who waits at a second replica as well (`gateway.proxy.hedge`)."""
    given_up = False
    """The client has left."""
    settled = False
    first_token_us = 0
    _guessed = False
    """The live table says that its counts are an estimate."""
    _charge_told = b""

    def __init__(
        self,
        meter: GatewayMeter,
        context: RequestContext,
        selector: RouteSelector,
        attempt: ReplicaAttempt,
        admitted: Admitted,
        reply: Reply,
    ) -> None:
        """Open the record. Raises Unavailable (LogFull, TooManyOpen) and then leaves nothing open."""
        exchange, request, principal, price = context.exchange, context.request, context.principal, context.price
        self._meter = meter
        self.exchange = exchange
        self.request = request
        self.selector = selector
        self.hold = admitted.hold
        self._admitted = admitted
        self._reply = reply
        self._begun_at = attempt.replica.pool.loop.time()
        self._budget_s = (
            LINE_PATIENCE_S if attempt.replica.spec.batch_only else selector.route.spec.ttft_timeout_seconds
        )
        self._attempt = attempt
        self.route = selector.route
        self.replica = attempt.replica
        self.relay = Relay(self.route.engine, request, admitted.hold, reply)
        self.opened = Opened(
            request_id=exchange.request_id,
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            model=request.model,
            replica=attempt.replica.label,
            price_id=price.price_id,
            currency=principal.currency,
            price=price.price,
            streamed=request.ask.stream,
            started_us=admitted.started_us,
            tier=principal.tier,
            counted=counted(request.ask, price.price),
        )
        meter.log.reserve()
        try:
            self._slot = meter.live.open(self.opened, self.hold.amount)
        except BaseException:
            meter.log.release()
            raise
        attempt.start(self._begun_at, self.hold.output_cap, request.ask.choices)
        self._expected = attempt.work
        if selector.demand is not None:
            selector.demand.arrived(attempt.work)
        exchange.on_gone = self._client_left

    def move(self, attempt: ReplicaAttempt) -> None:
        """Start over on another replica. The record will name that one; the time of all of them is in it.

        Raises Unavailable (TooManyOpen), and then stays where it is.
        """
        opened = msgspec.structs.replace(self.opened, replica=attempt.replica.label)
        # A kill in between leaves two slots of one request, of which one record is made.
        slot = self._meter.live.open(opened, self.hold.amount)
        self._meter.live.close_slot(self._slot)
        self.opened, self._slot = opened, slot
        self.device_ns += self._attempt.finish()
        self._attempt = attempt
        self.route = self.selector.route
        self.replica = attempt.replica
        self.relay = Relay(self.route.engine, self.request, self.hold, self._reply)
        self.connection = None
        self.first_token_us = 0
        self._guessed = False
        self.attempts += 1
        if not attempt.started:
            attempt.start(attempt.replica.pool.loop.time(), self.hold.output_cap, self.request.ask.choices)

    def leave(self, attempt: ReplicaAttempt) -> None:
        """A leg beside the request's own has come to nothing; its time counts."""
        self.device_ns += attempt.finish()

    def hedged(self, *, won: bool) -> None:
        """A second replica was asked as well; `won`: it was the first to speak."""
        self._meter.metrics.hedge(self.route.name, won=won)

    @property
    def idle_s(self) -> float:
        """How long the engine may be silent within its answer, seconds."""
        return LINE_PATIENCE_S if self.replica.spec.batch_only else self.route.spec.idle_timeout_seconds

    def time_left(self) -> float:
        """Seconds until an answer must have begun: the limit of the model that it started with, for all attempts."""
        return self._begun_at + self._budget_s - self.replica.pool.loop.time()

    def _client_left(self) -> None:
        """Docs/policies.md: an own engine is aborted; an upstream is read to its end, within a bound."""
        self.given_up = True
        for owner in (self, self.hedge):
            connection = owner.connection if owner is not None else None
            if connection is None:
                continue
            if self.route.engine.owned:
                connection.abort(EngineLost("The client left."))
            else:
                connection.expire_in(self.route.spec.drain_seconds)

    @property
    def client(self) -> Client:
        """How much of the answer the client has."""
        if self.given_up:
            return Client.LEFT
        return Client.READS if self.exchange.streaming else Client.WAITS

    def note(self) -> None:
        """Store the running counts where they outlive this process."""
        tap = self.relay.tap
        if self._guessed and not tap.exact:
            self._meter.live.count_completion(self._slot, tap.estimated_completion)
            return
        if not tap.begun:
            return
        if not self.first_token_us:
            self.first_token_us = now_us()
            self._attempt.first_token()
        if tap.exact:
            counts, estimated = tap.counts, False
        else:
            counts, estimated = self.relay.estimate(), True
            self._guessed = True
        self._meter.live.count(
            self._slot,
            counts.prompt,
            counts.cached,
            counts.completion,
            self.first_token_us,
            self.hold.amount,
            estimated,
        )

    @property
    def charge_header(self) -> bytes:
        """What a settled request has cost, as a header line; nothing unless the operator wants it told."""
        return self._charge_told and self._charge_told + b"\r\n"

    @property
    def charge_comment(self) -> bytes:
        """The same as a comment of an event stream, which every client passes over (WHATWG HTML, 9.2.6)."""
        return self._charge_told and b": " + self._charge_told + b"\n\n"

    def close(self, cause: Cause, failure: Exception | None = None) -> Ending:
        """What the end of this attempt comes to (`gateway.proxy.relay`)."""
        return self.relay.close(cause, self.client, failure)

    async def settle(self, ending: Ending) -> None:
        """Rate, charge, and write the record; returns when it is on disk. Once only.

        Raises LogFull when the disk refuses it; the request then stays open in the live table, and recovery writes
        its record at the next start.
        """
        try:
            await self._meter.log.append(self._rate(ending))
        except OSError as error:
            raise _unwritten(error) from error
        self._meter.live.close_slot(self._slot)

    def settle_then(self, ending: Ending, then: Callable[[LogFull | None], None]) -> None:
        """The same without waiting: `then` is called when the record is on disk, or with what `settle` would raise."""

        def durable(failure: OSError | None) -> None:
            if failure is not None:
                then(_unwritten(failure))
                return
            self._meter.live.close_slot(self._slot)
            then(None)

        self._meter.log.append_then(self._rate(ending), durable)

    def _rate(self, ending: Ending) -> bytes:
        """Rate and charge; gives the record."""
        assert not self.settled
        self.settled = True
        self.exchange.on_gone = None  # which has this request, which has the exchange
        counts = ending.counts
        settled = settle(
            self.opened,
            used(counts),
            status=ending.status,
            estimated=ending.estimated,
            hold=self.hold.amount,
            first_token_us=self.first_token_us,
            finished_us=now_us(),
            device_ns=self.device_ns + self._attempt.finish(),
        )
        self._admitted.settle(self._meter.leasing, settled.charge, counts.prompt + counts.completion)
        self.replica.done += work_done(settled)
        if self.selector.demand is not None:
            self.selector.demand.ended(self._expected, settled, self.selector.waited_us)
        self._meter.metrics.note(settled)
        if self._meter.tells_charge:
            self._charge_told = b"x-tidemill-charge: %b %b" % (
                format_amount(settled.charge).encode(),
                self.opened.currency.encode(),
            )
        return encode_settled(settled)


def _unwritten(error: OSError) -> LogFull:
    return LogFull(f"The usage of this request cannot be recorded: {error.strerror}.")
