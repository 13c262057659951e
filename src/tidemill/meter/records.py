"""The meter's log records: opened requests and settled requests.

Both are MessagePack arrays, as they are written on the hot path: instants are integers of microseconds since 1970
UTC, amounts are nanos. The first element is the format's number, so that no program takes what it only half
understands; `meter.records_format1` reads what was written before there was one.
"""

import msgspec

from tidemill.clock import from_micros
from tidemill.ledger.components import CACHED_INPUT, INPUT, OUTPUT, Component
from tidemill.ledger.money import Nanos
from tidemill.ledger.pricing import Price, PriceTier, rate_capped
from tidemill.ledger.usage import DELIVERED, RequestStatus, TokenUsage, UsageLabels, UsageRecord, charges_of
from tidemill.meter.records_format1 import read_opened, read_settled

FORMAT = 2
"""Of what is written now. A change of what an element means is a new format, and the old one is still read."""


class Opened(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=FORMAT):
    """An admitted request, with all that recovery needs to finish its record."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    replica: str
    price_id: str
    currency: str
    price: Price
    streamed: bool
    started_us: int
    tier: PriceTier = PriceTier.STANDARD
    counted: dict[Component, int] = {}
    """What was counted when it was admitted, such as its documents. Billed once something of the answer has come."""
    labels: UsageLabels | None = None


class Settled(msgspec.Struct, array_like=True, frozen=True, gc=False, tag=FORMAT):
    """The outcome of an opened request. Together they are one `UsageRecord`."""

    opened: Opened
    status: str
    prompt: int
    cached: int
    completion: int
    estimated: bool
    hold: int
    charge_input: int
    charge_cached: int
    charge_output: int
    more: dict[Component, tuple[int, int | None]]
    """Of each further component the quantity, and what it costs if it is billed apart."""
    uncollected: int
    first_token_us: int
    """0 when no token came."""
    finished_us: int
    device_ns: int
    list_amount: int | None = None

    @property
    def charge(self) -> Nanos:
        """What the tenant pays."""
        total = self.charge_input + self.charge_cached + self.charge_output
        if self.more:
            total += sum(amount or 0 for _, amount in self.more.values())
        return Nanos(total)


def settle(
    opened: Opened,
    usage: TokenUsage,
    *,
    status: RequestStatus,
    estimated: bool,
    hold: int,
    first_token_us: int,
    finished_us: int,
    device_ns: int,
) -> Settled:
    """Price the usage, never beyond the hold, and make the settled record. Pure.

    What was counted at the beginning is used as soon as something of the answer is.
    The line of a batch is charged only for the answer that it got: an attempt that gave none is repeated, under the
    same request id, and what it was worth is the operator's loss.
    """
    if opened.counted and (usage.total or status in DELIVERED):
        usage = msgspec.structs.replace(usage, more=opened.counted | usage.more)
    cap = hold if opened.tier is PriceTier.STANDARD or status in DELIVERED else 0
    charge = rate_capped(usage, opened.price, Nanos(cap))
    amounts = charge.amounts
    return Settled(
        opened=opened,
        status=status.value,
        prompt=usage.prompt,
        cached=usage.cached,
        completion=usage.completion,
        estimated=estimated,
        hold=hold,
        charge_input=amounts.get(INPUT, 0),
        charge_cached=amounts.get(CACHED_INPUT, 0),
        charge_output=amounts.get(OUTPUT, 0),
        more={component: (quantity, amounts.get(component)) for component, quantity in usage.more.items()},
        uncollected=charge.uncollected,
        first_token_us=first_token_us,
        finished_us=max(finished_us, opened.started_us),
        device_ns=device_ns,
    )


_STATUSES = {status.value: status for status in RequestStatus}


def to_record(settled: Settled) -> UsageRecord:
    """The ledger's view of a settled request."""
    opened, more = settled.opened, settled.more
    usage = TokenUsage(
        settled.prompt,
        settled.cached,
        settled.completion,
        {component: quantity for component, (quantity, _) in more.items()},
    )
    base = settled.charge_input, settled.charge_cached, settled.charge_output
    return UsageRecord(
        request_id=opened.request_id,
        tenant_id=opened.tenant_id,
        key_id=opened.key_id,
        model=opened.model,
        replica=opened.replica,
        usage=usage,
        estimated=settled.estimated,
        status=_STATUSES[settled.status],
        streamed=opened.streamed,
        price_id=opened.price_id,
        currency=opened.currency,
        charges=charges_of(usage, base, {each: amount for each, (_, amount) in more.items() if amount is not None}),
        uncollected=Nanos(settled.uncollected),
        hold=Nanos(settled.hold),
        started_at=from_micros(opened.started_us),
        first_token_at=from_micros(settled.first_token_us) if settled.first_token_us else None,
        finished_at=from_micros(settled.finished_us),
        device_ns=settled.device_ns,
        labels=opened.labels,
        list_amount=None if settled.list_amount is None else Nanos(settled.list_amount),
    )


def _format_of(payload: bytes) -> int:
    """The number that a payload begins with; 1 for those that begin with none."""
    first = payload[3 if payload[0] == 0xDC else 1]  # behind the head of an array of more than 15, or of fewer
    return first if first < 0x80 else 1


encode_opened = msgspec.msgpack.Encoder().encode
encode_settled = msgspec.msgpack.Encoder().encode
_decode_opened = msgspec.msgpack.Decoder(Opened).decode
_decode_settled = msgspec.msgpack.Decoder(Settled).decode


def decode_opened(payload: bytes) -> Opened:
    """Read an opened record of any format. Raises ValueError."""
    return _decode_opened(payload) if _format_of(payload) != 1 else Opened(**read_opened(payload))


def decode_settled(payload: bytes) -> Settled:
    """Read a settled record of any format. Raises ValueError."""
    if _format_of(payload) != 1:
        return _decode_settled(payload)
    opened, outcome = read_settled(payload)
    return Settled(opened=Opened(**opened), more={}, **outcome)
