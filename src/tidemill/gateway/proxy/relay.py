"""One attempt at an answer: which bytes the client gets of the engine's, and what the end of them means.

The fast path and the slow path move bytes and wait; both ask here what an end means. Nothing in this file awaits,
reads a clock or knows a socket. The table `ENDINGS` stands in docs/policies.md too, and is tested row by row.
"""

from enum import StrEnum

import msgspec

from tidemill.engines.protocol import Engine, Tap, TokenCounts
from tidemill.engines.sse import BYTES_PER_TOKEN
from tidemill.errors import TidemillError, Unavailable
from tidemill.gateway.admission.holds import Hold, mid_stream_stop
from tidemill.gateway.protocols.reply import Reply
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.http.client import EngineLost
from tidemill.ledger.usage import RequestStatus


class Cause(StrEnum):
    """What has ended an attempt."""

    DONE = "done"
    """The answer is complete: a whole body, or a stream that says so, or one that ends after something was said."""
    CAP = "cap"
    """The stream was cut off, as it had produced more than the balance, or a budget, pays for."""
    ERROR_EVENT = "error_event"
    """The engine has sent an error as an event of its stream."""
    ENGINE_LOST = "engine_lost"
    """The connection broke, the engine was silent for too long, or what it sent is no answer."""
    ENGINE_REFUSED = "engine_refused"
    """The engine has answered with an error status."""
    GATEWAY_FAULT = "gateway_fault"
    """The gateway itself has failed."""


class Client(StrEnum):
    """How much of the answer the client has, at its end."""

    WAITS = "waits"
    """Nothing was sent yet."""
    READS = "reads"
    """It has a part of a stream."""
    LEFT = "left"


class Billed(StrEnum):
    """Which count is billed."""

    PASSED = "passed"
    """What the engine has reported; what has passed is counted where it did not report."""
    ESTIMATE = "estimate"
    """What has passed is counted, and the prompt with it: whoever runs the engine bills it, and did not say what."""
    NOTHING = "nothing"


class Told(StrEnum):
    """What the client is told at the end."""

    END = "end"
    """Its API's end of a complete answer."""
    ERROR = "error"
    """Its API's error: as the last event of a stream, else as the answer."""
    STOP = "stop"
    """An error that says that the balance, or a budget, is used up."""
    NOTHING = "nothing"


class EndingRule(msgspec.Struct, frozen=True):
    """A row of `ENDINGS`. None: it does not matter."""

    cause: Cause
    client: Client | None
    used_up: bool | None
    """The answer has reached the limit that the balance, or a budget, has set."""
    all_came: bool | None
    """The engine had said all of its answer before it was lost."""
    unreported: bool | None
    """An upstream has the request, will bill it, and has not said how much."""
    status: RequestStatus
    billed: Billed
    told: Told
    """Where the client has left, nothing is told, whatever stands here."""


def _rule(
    cause: Cause,
    status: RequestStatus,
    billed: Billed,
    told: Told,
    *,
    client: Client | None = None,
    used_up: bool | None = None,
    all_came: bool | None = None,
    unreported: bool | None = None,
) -> EndingRule:
    return EndingRule(cause, client, used_up, all_came, unreported, status, billed, told)


ENDINGS = (
    _rule(Cause.DONE, RequestStatus.BALANCE_EXHAUSTED, Billed.PASSED, Told.END, client=Client.WAITS, used_up=True),
    _rule(Cause.DONE, RequestStatus.BALANCE_EXHAUSTED, Billed.PASSED, Told.STOP, used_up=True),
    _rule(Cause.DONE, RequestStatus.CLIENT_CLOSED, Billed.PASSED, Told.NOTHING, client=Client.LEFT),
    _rule(Cause.DONE, RequestStatus.OK, Billed.PASSED, Told.END),
    _rule(Cause.CAP, RequestStatus.BALANCE_EXHAUSTED, Billed.PASSED, Told.STOP),
    _rule(Cause.ERROR_EVENT, RequestStatus.BALANCE_EXHAUSTED, Billed.PASSED, Told.STOP, used_up=True),
    _rule(Cause.ERROR_EVENT, RequestStatus.ENGINE_LOST, Billed.PASSED, Told.END),
    _rule(Cause.ENGINE_LOST, RequestStatus.OK, Billed.PASSED, Told.NOTHING, client=Client.LEFT, all_came=True),
    _rule(
        Cause.ENGINE_LOST,
        RequestStatus.CLIENT_CLOSED,
        Billed.ESTIMATE,
        Told.NOTHING,
        client=Client.LEFT,
        unreported=True,
    ),
    _rule(Cause.ENGINE_LOST, RequestStatus.CLIENT_CLOSED, Billed.PASSED, Told.NOTHING, client=Client.LEFT),
    _rule(Cause.ENGINE_LOST, RequestStatus.ENGINE_LOST, Billed.NOTHING, Told.ERROR, client=Client.WAITS),
    _rule(Cause.ENGINE_LOST, RequestStatus.ENGINE_LOST, Billed.PASSED, Told.STOP, used_up=True),
    _rule(Cause.ENGINE_LOST, RequestStatus.ENGINE_LOST, Billed.PASSED, Told.ERROR),
    _rule(Cause.ENGINE_REFUSED, RequestStatus.ENGINE_ERROR, Billed.NOTHING, Told.ERROR),
    _rule(Cause.GATEWAY_FAULT, RequestStatus.ENGINE_LOST, Billed.PASSED, Told.NOTHING),
)
"""What each end comes to; the first row that fits counts. Every end fits one."""

_DONE = tuple(rule for rule in ENDINGS if rule.cause is Cause.DONE)


def rule_for(cause: Cause, client: Client, *, used_up: bool, all_came: bool, unreported: bool) -> EndingRule:
    """The row of `ENDINGS` for an end."""
    for rule in _DONE if cause is Cause.DONE else ENDINGS:
        if (
            rule.cause is cause
            and (rule.client is None or rule.client is client)
            and (rule.used_up is None or rule.used_up is used_up)
            and (rule.all_came is None or rule.all_came is all_came)
            and (rule.unreported is None or rule.unreported is unreported)
        ):
            return rule
    raise AssertionError(f"no rule for the end {cause}")


class Ending(msgspec.Struct, frozen=True, gc=False):
    """What the end of an attempt comes to, for the record, the bill and the client."""

    status: RequestStatus
    counts: TokenCounts
    estimated: bool
    told: Told
    error: TidemillError | None = None
    """What the client is told, where that is an error."""


class Relay:
    """One attempt at an answer. `ask` is the request as the engine takes it, `tap` reads the engine's stream, `reply`
    writes it in the client's API.
    """

    __slots__ = ("_engine", "_hold", "_request", "ask", "reply", "tap")

    def __init__(self, engine: Engine, request: ModelRequest, hold: Hold, reply: Reply) -> None:
        self._engine = engine
        self._request = request
        self._hold = hold
        self.ask = ask = request.ask_for(engine)
        self.reply = reply.form(native=ask.path in engine.native)
        self.tap: Tap = engine.tap(ask)

    @property
    def over_the_cap(self) -> bool:
        """More has been produced than the balance pays for; only an engine that ignores its limit gets here.

        Events are not quite tokens: an engine that does not count them as it goes is stopped only far beyond.
        """
        if not self._hold.cut_short:
            return False
        cap = self._hold.output_cap * self._request.ask.choices
        return self.tap.produced > (cap if self.tap.exact else 2 * cap + 16)

    def uses_up(self, completion: int) -> bool:
        """True if an answer of `completion` tokens has reached the limit that the balance has set."""
        return self._hold.cut_short and completion >= self._hold.output_cap * self._request.ask.choices

    def passed(self) -> tuple[TokenCounts, bool]:
        """What has passed so far, and whether that is an estimate. Nothing passed is nothing, exactly."""
        tap = self.tap
        if tap.exact or not tap.begun:
            return tap.counts, False
        return self.estimate(), True

    def estimate(self) -> TokenCounts:
        """The best count of what has passed, of a stream whose engine did not report."""
        return self.tap.estimate(self._request.body_bytes)

    def whole(self, body: bytes, client: Client) -> tuple[Ending, bytes]:
        """The end of an answer that the engine gave in one piece, and what the client gets. Raises BrokenStream."""
        counts, estimated = self._whole_counts(body)
        # Before it is billed, as it may not be what the client asked for.
        answer = self.reply.whole(self._engine.answer(self.ask, body), counts)
        rule = rule_for(Cause.DONE, client, used_up=self.uses_up(counts.completion), all_came=True, unreported=False)
        return Ending(rule.status, counts, estimated, rule.told), answer

    def _whole_counts(self, body: bytes) -> tuple[TokenCounts, bool]:
        """What a whole answer has used, and whether that is an estimate. Raises BrokenStream."""
        ask, counts = self._request.ask, self._engine.usage(body)
        if counts is not None and (counts.prompt or not ask.documents):
            return counts, False
        prompt = self._request.body_bytes // BYTES_PER_TOKEN
        completion = len(body) // BYTES_PER_TOKEN if ask.generates else 0
        return TokenCounts(prompt, 0, completion, searches=0 if counts is None else counts.searches), True

    def close(self, cause: Cause, client: Client, failure: Exception | None = None) -> Ending:
        """The end of a stream, or of an attempt that gave no answer. `failure`: what the client is told of it."""
        tap = self.tap
        rule = rule_for(
            cause,
            client,
            used_up=self.uses_up(tap.produced),
            all_came=tap.done and not tap.failed,
            unreported=not self._engine.owned and not tap.exact and getattr(failure, "sent", True),
        )
        if rule.billed is Billed.PASSED:
            counts, estimated = self.passed()
        elif rule.billed is Billed.ESTIMATE:
            counts, estimated = self.estimate(), True
        else:
            counts, estimated = TokenCounts(), False
        told = Told.NOTHING if client is Client.LEFT else rule.told
        error: TidemillError | None = None
        if told is Told.STOP:
            error = mid_stream_stop(self._hold)
        elif told is Told.ERROR:
            error = _error_of(failure)
        return Ending(rule.status, counts, estimated, told, error)

    def last_events(self, ending: Ending) -> bytes:
        """What ends the client's stream. To be asked once, when the record is on disk: a reply may keep its answer."""
        if ending.told is Told.NOTHING:
            return b""
        return self.reply.end(ending.counts) if ending.error is None else self.reply.stopped(ending.error)


def _error_of(failure: Exception | None) -> TidemillError:
    """What a client is told of a failed attempt."""
    if isinstance(failure, EngineLost) and not failure.sent:
        return Unavailable("The model's engine cannot be reached.", hint="Try again shortly.")
    if isinstance(failure, TidemillError):
        return failure
    return EngineLost(f"The engine's stream is broken: {failure}.")
