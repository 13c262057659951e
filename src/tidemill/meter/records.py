"""What the meter writes down: a request that was opened, and a request that was settled.

Both are MessagePack arrays, as they are written on the hot path: instants are integers of microseconds since 1970
UTC, amounts are nanos.
"""

import msgspec

from tidemill.clock import from_micros
from tidemill.ledger.money import Nanos
from tidemill.ledger.pricing import Charge, Price, PriceTier, rate_capped
from tidemill.ledger.usage import DELIVERED, RequestStatus, TokenUsage, UsageRecord


class Opened(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request that was admitted: all that recovery needs to finish its record without the process that began it."""

    request_id: str
    tenant_id: str
    key_id: str
    model: str
    replica: str
    price_id: str
    currency: str
    price: tuple[int, int, int]
    """Nanos per million tokens: input, cached input, output."""
    streamed: bool
    started_us: int
    tier: PriceTier = PriceTier.STANDARD


class Settled(msgspec.Struct, array_like=True, frozen=True, gc=False):
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
    uncollected: int
    first_token_us: int
    """0 when no token came."""
    finished_us: int
    device_ns: int

    @property
    def charge(self) -> Nanos:
        return Nanos(self.charge_input + self.charge_cached + self.charge_output)


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
    """Rate what was used, never beyond the hold, and make the settled record. Pure.

    The line of a batch is charged only for the answer that it got: an attempt that gave none is repeated, under the
    same request id, and what it was worth is the operator's loss.
    """
    cap = hold if opened.tier is PriceTier.STANDARD or status in DELIVERED else 0
    charge: Charge = rate_capped(usage, Price(*opened.price), Nanos(cap))
    return Settled(
        opened=opened,
        status=status.value,
        prompt=usage.prompt,
        cached=min(usage.cached, usage.prompt),
        completion=usage.completion,
        estimated=estimated,
        hold=hold,
        charge_input=charge.input,
        charge_cached=charge.cached,
        charge_output=charge.output,
        uncollected=charge.uncollected,
        first_token_us=first_token_us,
        finished_us=max(finished_us, opened.started_us),
        device_ns=device_ns,
    )


_STATUSES = {status.value: status for status in RequestStatus}


def to_record(settled: Settled) -> UsageRecord:
    """The ledger's view of a settled request."""
    opened = settled.opened
    return UsageRecord(
        request_id=opened.request_id,
        tenant_id=opened.tenant_id,
        key_id=opened.key_id,
        model=opened.model,
        replica=opened.replica,
        usage=TokenUsage(settled.prompt, settled.cached, settled.completion),
        estimated=settled.estimated,
        status=_STATUSES[settled.status],
        streamed=opened.streamed,
        price_id=opened.price_id,
        currency=opened.currency,
        charge_input=Nanos(settled.charge_input),
        charge_cached=Nanos(settled.charge_cached),
        charge_output=Nanos(settled.charge_output),
        uncollected=Nanos(settled.uncollected),
        hold=Nanos(settled.hold),
        started_at=from_micros(opened.started_us),
        first_token_at=from_micros(settled.first_token_us) if settled.first_token_us else None,
        finished_at=from_micros(settled.finished_us),
        device_ns=settled.device_ns,
    )


encode_opened = msgspec.msgpack.Encoder().encode
decode_opened = msgspec.msgpack.Decoder(Opened).decode
encode_settled = msgspec.msgpack.Encoder().encode
decode_settled = msgspec.msgpack.Decoder(Settled).decode
