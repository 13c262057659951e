"""What was used: token counts of one request, and the record that says what became of it."""

from datetime import datetime
from enum import StrEnum

import msgspec

from tidemill.ledger.money import Nanos

MAX_TOKENS = 2**28
"""The most tokens of one kind in one request that Tidemill believes: 268 million. With pricing.MAX_PRICE it
bounds a charge to 64 bits."""


class TokenUsage(msgspec.Struct, frozen=True, gc=False):
    """Token counts of one request, in OpenAI's convention.

    `prompt` includes `cached` (prompt tokens that the engine found in its prefix cache); `completion`
    includes reasoning tokens. Always 0 <= cached <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS:
    an engine that reports anything else is not believed and the count is moved to the nearest that is
    possible, because a settled request must leave a record and a negative count must never become a negative
    charge.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __post_init__(self) -> None:
        if 0 <= self.cached <= self.prompt <= MAX_TOKENS and 0 <= self.completion <= MAX_TOKENS:
            return
        prompt = min(max(self.prompt, 0), MAX_TOKENS)
        msgspec.structs.force_setattr(self, "prompt", prompt)
        msgspec.structs.force_setattr(self, "cached", min(max(self.cached, 0), prompt))
        msgspec.structs.force_setattr(self, "completion", min(max(self.completion, 0), MAX_TOKENS))

    @property
    def uncached(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.prompt - self.cached

    @property
    def total(self) -> int:
        return self.prompt + self.completion


class RequestStatus(StrEnum):
    """How a request ended. Every accepted request ends in exactly one of these."""

    OK = "ok"
    CLIENT_CLOSED = "client_closed"
    """The client hung up or stopped reading. Billed: what was produced (docs/policies.md)."""
    BALANCE_EXHAUSTED = "balance_exhausted"
    """Stopped in mid-stream because the hold was eaten up. Billed: the hold at most."""
    ENGINE_ERROR = "engine_error"
    """The engine answered with an error. Nothing is billed."""
    ENGINE_LOST = "engine_lost"
    """The engine died or fell silent after it had accepted the request. Billed: what the client was sent."""
    GATEWAY_LOST = "gateway_lost"
    """The gateway was killed; the record was finished by recovery. Billed: what had passed through."""


DELIVERED = (RequestStatus.OK, RequestStatus.BALANCE_EXHAUSTED)
"""The client has got an answer, or as much of it as its balance pays for."""


LINE_PREFIX = "batch_"
"""How the request ids of batches' lines begin. All attempts at a line have the same id."""


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The one record of one request: who, what, how much, at which price, and how it ended."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    """The model's public name, as the tenant asked for it."""
    replica: str
    """The engine replica that did the work, e.g. `smollm2-135m-instruct/0`."""
    usage: TokenUsage
    estimated: bool
    """True when the engine did not report and the counts are Tidemill's own."""
    status: RequestStatus
    streamed: bool
    price_id: str
    """The price version in force when the request was admitted."""
    currency: str
    charge_input: Nanos
    charge_cached: Nanos
    charge_output: Nanos
    uncollected: Nanos
    """What the usage was worth beyond the hold; the operator's loss, never the tenant's."""
    hold: Nanos
    started_at: datetime
    """Admission, aware UTC."""
    first_token_at: datetime | None
    finished_at: datetime
    device_ns: int
    """The request's fair share of its replica's busy time, nanoseconds (see ledger.costing)."""

    @property
    def charge(self) -> Nanos:
        """What the tenant pays: the sum of the three components, exactly."""
        return Nanos(self.charge_input + self.charge_cached + self.charge_output)

    @property
    def repeatable(self) -> bool:
        """An attempt at a batch's line that gave no answer, and so cost nothing: a later attempt takes its place."""
        return self.request_id.startswith(LINE_PREFIX) and self.status not in DELIVERED

    def after(self, attempt: "UsageRecord") -> "UsageRecord":
        """This record in the place of one that is `repeatable`: what that one cost the operator stays counted."""
        return msgspec.structs.replace(
            self,
            device_ns=self.device_ns + attempt.device_ns,
            uncollected=Nanos(self.uncollected + attempt.uncollected),
        )
