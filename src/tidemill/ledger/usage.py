"""What was used: the counts of one request, and the record that says what became of it."""

from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from enum import StrEnum

import msgspec

from tidemill.ledger.components import BASE, CACHED_INPUT, CATALOGUE, INPUT, MAX_TOKENS, OUTPUT, Component
from tidemill.ledger.money import Nanos


class TokenUsage(msgspec.Struct, frozen=True, gc=False):
    """What one request used: token counts in OpenAI's convention, and a quantity of each further component.

    `prompt` includes `cached` (prompt tokens that the engine found in its prefix cache); `completion`
    includes reasoning tokens. Always 0 <= cached <= prompt <= MAX_TOKENS and 0 <= completion <= MAX_TOKENS:
    an engine that reports anything else is not believed and the count is moved to the nearest that is
    possible, because a settled request must leave a record and a negative count must never become a negative
    charge. So it is with `more`: each quantity is within what its component can be, and tokens that are part of
    a prompt or an answer are no more than those.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    more: dict[Component, int] = {}
    """Quantities of the components that are not in `components.BASE`, where there are any; none is zero."""

    def __post_init__(self) -> None:
        if not (0 <= self.cached <= self.prompt <= MAX_TOKENS and 0 <= self.completion <= MAX_TOKENS):
            prompt = min(max(self.prompt, 0), MAX_TOKENS)
            msgspec.structs.force_setattr(self, "prompt", prompt)
            msgspec.structs.force_setattr(self, "cached", min(max(self.cached, 0), prompt))
            msgspec.structs.force_setattr(self, "completion", min(max(self.completion, 0), MAX_TOKENS))
        if self.more:
            msgspec.structs.force_setattr(self, "more", self._possible())

    def _possible(self) -> dict[Component, int]:
        left = self._base()
        found: dict[Component, int] = {}
        for component, quantity in self.more.items():
            spec = CATALOGUE[component]
            if component in left:
                continue  # it has a field of its own
            most = spec.most if spec.part_of is None else left[spec.part_of]
            quantity = min(quantity, most)
            if quantity > 0:
                found[component] = quantity
                if spec.part_of is not None:
                    left[spec.part_of] -= quantity
        return found

    def _base(self) -> dict[Component, int]:
        return {INPUT: self.prompt - self.cached, CACHED_INPUT: self.cached, OUTPUT: self.completion}

    def billed(self, apart: Container[Component]) -> dict[Component, int]:
        """The quantity of each base component, and of those further ones that are billed `apart`.

        One that is not, is counted with what it is part of, or with nothing.
        """
        quantities = self._base()
        for component, quantity in self.more.items():
            if component in apart:
                quantities[component] = quantity
                part_of = CATALOGUE[component].part_of
                if part_of is not None:
                    quantities[part_of] -= quantity
        return quantities

    @property
    def uncached(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.prompt - self.cached

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def charges_of(usage: TokenUsage, base: Sequence[int], more: Mapping[Component, int]) -> dict[Component, Nanos]:
    """The charges of a record, as `UsageRecord` has them, from the amounts of the base components and of those further
    ones that are billed apart.
    """
    charges = {component: Nanos(amount) for component, amount in more.items()}
    quantities = usage.billed(charges)
    for component, amount in zip(BASE, base, strict=True):
        if amount or quantities[component]:
            charges[component] = Nanos(amount)
    return charges


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


class UsageLabels(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a record says of its request beside counts.

    Kept from the beginning, as it cannot be added to the past.

    Nothing sets these yet, and no report reads them.
    """

    service_class: str = ""
    """The class of service: such as `reserved`, or `overflow` of a reservation."""
    mode: str = ""
    """The way that the model worked, where that has a price of its own: `thinking` or not."""
    project: str = ""
    tags: tuple[str, ...] = ()
    rule_id: str = ""
    """The rule of the price book that it was rated by."""


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
    charges: dict[Component, Nanos]
    """What each component costs that is billed, which is each that has a quantity and a rate of its own."""
    uncollected: Nanos
    """What the usage was worth beyond the hold; the operator's loss, never the tenant's."""
    hold: Nanos
    started_at: datetime
    """Admission, aware UTC."""
    first_token_at: datetime | None
    finished_at: datetime
    device_ns: int
    """The request's fair share of its replica's busy time, nanoseconds (see ledger.costing)."""
    labels: UsageLabels | None = None
    """None where there are none."""
    list_amount: Nanos | None = None
    """What it would have cost at list prices; None where that is not told apart."""

    @property
    def charge(self) -> Nanos:
        """What the tenant pays: the sum of all components, exactly."""
        return Nanos(sum(self.charges.values()))

    def lines(self) -> dict[Component, tuple[int, Nanos]]:
        """Quantity and amount by component, as an invoice adds them up; components with neither are left out."""
        return {
            component: (quantity, amount)
            for component, quantity in self.usage.billed(self.charges).items()
            if (amount := self.charges.get(component, Nanos(0))) or quantity
        }

    @property
    def repeatable(self) -> bool:
        """An attempt at a batch's line that gave no answer, and so cost nothing.

        A later attempt takes its place.
        """
        return self.request_id.startswith(LINE_PREFIX) and self.status not in DELIVERED

    def after(self, attempt: "UsageRecord") -> "UsageRecord":
        """This record in the place of one that is `repeatable`: what that one cost the operator stays counted."""
        return msgspec.structs.replace(
            self,
            device_ns=self.device_ns + attempt.device_ns,
            uncollected=Nanos(self.uncollected + attempt.uncollected),
        )
