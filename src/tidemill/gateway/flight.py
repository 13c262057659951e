"""A request in flight: from its hold to its record. Whatever happens in between, it is settled exactly once."""

import msgspec

from tidemill.engines.protocol import Counts, Tap
from tidemill.gateway.admission import Admitted
from tidemill.gateway.http import Exchange
from tidemill.gateway.replica import Leg
from tidemill.gateway.replies import Reply
from tidemill.gateway.requests import ModelRequest
from tidemill.gateway.snapshot import PricePoint, Principal
from tidemill.gateway.upstream import Connection, EngineLost
from tidemill.gateway.way import Way
from tidemill.ledger.usage import Status, TokenUsage
from tidemill.meter.leasing import Leasing
from tidemill.meter.live import LiveTable, now_us
from tidemill.meter.log import LogFull, UsageLog
from tidemill.meter.records import Opened, encode_settled, settle


class Meter:
    """The meter of one gateway process: where flights are opened, counted and settled."""

    def __init__(self, log: UsageLog, live: LiveTable, leasing: Leasing) -> None:
        self.log = log
        self.live = live
        self.leasing = leasing


class Flight:
    """One admitted request. Its slot in the live table exists from here on, so a record will come out."""

    def __init__(
        self,
        meter: Meter,
        exchange: Exchange,
        request: ModelRequest,
        way: Way,
        leg: Leg,
        principal: Principal,
        price: PricePoint,
        admitted: Admitted,
        reply: Reply,
    ) -> None:
        """Open the record. Raises Unavailable (LogFull, TooManyOpen) and then leaves nothing open."""
        self._meter = meter
        self.exchange = exchange
        self.request = request
        self.way = way
        self.hold = admitted.hold
        self._admitted = admitted
        self.reply = reply
        self.attempts = 1
        self.resent = False
        """It was sent once more after an engine that had it was lost."""
        self.device_ns = 0
        """Its share of the time of replicas that it has left again."""
        self._begun_at = leg.replica.pool.loop.time()
        self._budget_s = way.route.spec.ttft_timeout_seconds
        self._leg = leg
        self.route = way.route
        self.replica = leg.replica
        self.tap: Tap = self.route.engine.tap(request.ask)
        self.connection: Connection | None = None
        self.given_up = False
        """The client has left."""
        self.settled = False
        self.first_token_us = 0
        self.opened = Opened(
            request_id=exchange.request_id,
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            model=request.model,
            replica=leg.replica.label,
            price_id=price.price_id,
            currency=principal.currency,
            price=(price.price.input, price.price.cached_input, price.price.output),
            streamed=request.ask.stream,
            started_us=admitted.started_us,
            tier=principal.tier,
        )
        meter.log.reserve()
        try:
            self._slot = meter.live.open(self.opened, self.hold.amount)
        except BaseException:
            meter.log.release()
            raise
        leg.start(self._begun_at, self.hold.output_cap, request.ask.choices)
        exchange.on_gone = self._client_left

    def move(self, leg: Leg) -> None:
        """Start over on another replica. The record will name that one; the time of all of them is in it.

        Raises Unavailable (TooManyOpen), and then stays where it is.
        """
        opened = msgspec.structs.replace(self.opened, replica=leg.replica.label)
        # A kill in between leaves two slots of one request, of which one record is made.
        slot = self._meter.live.open(opened, self.hold.amount)
        self._meter.live.close_slot(self._slot)
        self.opened, self._slot = opened, slot
        self.device_ns += self._leg.finish()
        self._leg = leg
        self.route = self.way.route
        self.replica = leg.replica
        self.tap = self.route.engine.tap(self.request.ask)
        self.connection = None
        self.first_token_us = 0
        self.attempts += 1
        leg.start(leg.replica.pool.loop.time(), self.hold.output_cap, self.request.ask.choices)

    def time_left(self) -> float:
        """Seconds until an answer must have begun: the limit of the model that it started with, for all attempts."""
        return self._begun_at + self._budget_s - self.replica.pool.loop.time()

    def _client_left(self) -> None:
        """Docs/policies.md: an own engine is aborted; an upstream is read to its end, within a bound."""
        self.given_up = True
        connection = self.connection
        if connection is None:
            return
        if self.route.engine.owned:
            connection.abort(EngineLost("The client left."))
        else:
            connection.expire_in(self.route.spec.drain_seconds)

    @property
    def over_the_cap(self) -> bool:
        """More has been produced than the balance pays for; only an engine that ignores its limit gets here.

        Events are not quite tokens: an engine that does not count them as it goes is stopped only far beyond.
        """
        cap = self.hold.output_cap * self.request.ask.choices
        return self.hold.cut_short and self.tap.produced > (cap if self.tap.exact else 2 * cap + 16)

    @property
    def used_up(self) -> bool:
        """The answer has reached the limit that the balance set."""
        return self.uses_up(self.tap.produced)

    def uses_up(self, completion: int) -> bool:
        """An answer of so many tokens has reached the limit that the balance set."""
        return self.hold.cut_short and completion >= self.hold.output_cap * self.request.ask.choices

    def note(self) -> None:
        """Store the running counts where they outlive this process."""
        tap = self.tap
        if not tap.begun:
            return
        if not self.first_token_us:
            self.first_token_us = now_us()
            self._leg.first_token()
        if tap.exact:
            counts, estimated = tap.counts, False
        else:
            counts, estimated = tap.estimate(self.request.body_bytes), True
        self._meter.live.count(
            self._slot,
            counts.prompt,
            counts.cached,
            counts.completion,
            self.first_token_us,
            self.hold.amount,
            estimated,
        )

    def passed(self) -> tuple[Counts, bool]:
        """What has passed so far, and whether that is an estimate. Nothing passed is nothing, exactly."""
        if self.tap.exact or not self.first_token_us:
            return self.tap.counts, False
        return self.tap.estimate(self.request.body_bytes), True

    async def settle(self, status: Status, counts: Counts, estimated: bool) -> None:
        """Rate, charge, and write the record; returns when it is on disk. Once only.

        Raises LogFull when the disk refuses it; the request then stays open in the live table, and recovery writes
        its record at the next start.
        """
        assert not self.settled
        self.settled = True
        settled = settle(
            self.opened,
            TokenUsage(counts.prompt, counts.cached, counts.completion),
            status=status,
            estimated=estimated,
            hold=self.hold.amount,
            first_token_us=self.first_token_us,
            finished_us=now_us(),
            device_ns=self.device_ns + self._leg.finish(),
        )
        self._admitted.settle(self._meter.leasing, settled.charge, counts.prompt + counts.completion)
        try:
            await self._meter.log.append(encode_settled(settled))
        except OSError as error:
            raise LogFull(f"The usage of this request cannot be written down: {error.strerror}.") from error
        self._meter.live.close_slot(self._slot)
