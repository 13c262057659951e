"""The first format of the log's records, without a number: three prices, three counts, three amounts.

Only read: logs and live tables that a program of before has left.
"""

from typing import Any

import msgspec

from tidemill.ledger.components import BASE
from tidemill.ledger.pricing import Price, PriceTier


class _Opened(msgspec.Struct, array_like=True, gc=False):
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


class _Settled(msgspec.Struct, array_like=True, gc=False):
    opened: _Opened
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
    finished_us: int
    device_ns: int


_decode_opened = msgspec.msgpack.Decoder(_Opened).decode
_decode_settled = msgspec.msgpack.Decoder(_Settled).decode


def read_opened(payload: bytes) -> dict[str, Any]:
    """The fields of `records.Opened`. Raises ValueError."""
    return _of_now(_decode_opened(payload))


def read_settled(payload: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `records.Opened`, and those of `records.Settled` beside it. Raises ValueError."""
    settled = _decode_settled(payload)
    outcome = msgspec.structs.asdict(settled)
    del outcome["opened"]
    return _of_now(settled.opened), outcome


def _of_now(opened: _Opened) -> dict[str, Any]:
    price = Price(dict(zip(BASE, opened.price, strict=True)))
    return msgspec.structs.asdict(opened) | {"price": price}
