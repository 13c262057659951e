"""Opened and settled records: rated once, never beyond the hold, and the same after a journey through bytes."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ledger.values import further
from tests.meter.values import START_US, opened
from tests.support.prices import token_price
from tidemill.ledger.components import CATALOGUE, Component
from tidemill.ledger.pricing import Price, PriceTier, rate
from tidemill.ledger.usage import DELIVERED, RequestStatus, TokenUsage, UsageLabels
from tidemill.meter.frames import read_frames
from tidemill.meter.live import read_unfinished
from tidemill.meter.loader import finish_record
from tidemill.meter.records import (
    FORMAT,
    Opened,
    decode_opened,
    decode_settled,
    encode_opened,
    encode_settled,
    settle,
    to_record,
)

FORMAT1 = Path(__file__).parent / "recordings" / "format1"
"""The directory of a gateway process that was killed, as the last program that knew three prices has left it."""

tokens = st.integers(0, 2**28)
components = st.sampled_from(list(CATALOGUE))
prices = st.dictionaries(components, st.integers(0, 10**13)).map(Price)
labels = st.none() | st.builds(
    UsageLabels, st.text(max_size=9), st.just("thinking"), st.text(max_size=9), st.just(("a", "b"))
)


@given(
    st.builds(TokenUsage, tokens, tokens, tokens, further),
    prices,
    further,
    labels,
    st.integers(0, 2**62),
    st.sampled_from(list(RequestStatus)),
    st.booleans(),
    st.sampled_from(list(PriceTier)),
)
def test_a_settlement_is_rated_and_capped(
    usage: TokenUsage,
    price: Price,
    counted: dict[Component, int],
    labels: UsageLabels | None,
    hold: int,
    status: RequestStatus,
    estimated: bool,
    tier: PriceTier,
) -> None:
    counted = {each: quantity for each, quantity in counted.items() if CATALOGUE[each].part_of is None}
    request = msgspec.structs.replace(opened(price=price), counted=counted, labels=labels, tier=tier)
    made = settle(
        request,
        usage,
        status=status,
        estimated=estimated,
        hold=hold,
        first_token_us=0,
        finished_us=START_US - 5,  # a clock that went back
        device_ns=3,
    )
    answered = usage.total > 0 or status in DELIVERED
    whole = TokenUsage(usage.prompt, usage.cached, usage.completion, (counted if answered else {}) | usage.more)
    full = rate(whole, price)
    free = tier is PriceTier.BATCH and status not in DELIVERED
    assert made.charge == (0 if free else min(full.total, hold))
    assert made.charge + made.uncollected == full.total
    record = to_record(made)
    assert record.charge == made.charge
    assert record.usage == whole
    assert record.charges.keys() == full.amounts.keys()
    assert min(record.charges.values(), default=0) >= 0
    assert (record.status, record.estimated, record.hold, record.device_ns) == (status, estimated, hold, 3)
    assert record.labels == labels
    assert record.finished_at == record.started_at
    assert decode_settled(encode_settled(made)) == made
    assert decode_opened(encode_opened(request)) == request


def test_what_was_counted_at_the_beginning_is_not_billed_when_nothing_came() -> None:
    request = msgspec.structs.replace(
        opened(price=Price.of(search=2 * 10**9)), counted={Component.SEARCH: 3, Component.DOCUMENT: 250}
    )

    def charged(status: RequestStatus, usage: TokenUsage) -> Any:
        return settle(
            request,
            usage,
            status=status,
            estimated=False,
            hold=10**12,
            first_token_us=0,
            finished_us=START_US + 1,
            device_ns=1,
        )

    assert charged(RequestStatus.ENGINE_ERROR, TokenUsage()).charge == 0
    assert charged(RequestStatus.CLIENT_CLOSED, TokenUsage()).more == {}
    assert charged(RequestStatus.OK, TokenUsage()).charge == 6_000_000
    told = charged(RequestStatus.OK, TokenUsage(90, 0, 0, {Component.SEARCH: 4}))
    assert told.more == {Component.SEARCH: (4, 8_000_000), Component.DOCUMENT: (250, None)}


# On disk


def as_before(record: Any) -> dict[str, Any]:
    """A record as the old program wrote it down."""
    plain: dict[str, Any] = msgspec.to_builtins(record)
    charges = record.charges
    for name, component in (
        ("input", Component.INPUT),
        ("cached", Component.CACHED_INPUT),
        ("output", Component.OUTPUT),
    ):
        plain["charge_" + name] = charges.get(component, 0)
    assert plain.pop("labels") is None and plain.pop("list_amount") is None
    assert plain["usage"].pop("more") == {}
    del plain["charges"]
    return plain


def test_the_log_and_live_table_of_an_older_program_are_read_to_the_nano() -> None:
    expected = msgspec.json.decode((FORMAT1 / "expected.json").read_bytes())
    settled = [decode_settled(frame.payload) for frame in read_frames(FORMAT1, (1, 0))]
    left = [finish_record(each) for each in read_unfinished(FORMAT1 / "live")]
    found = [to_record(each) for each in settled] + [each for each in left if each.request_id != "req_both"]
    assert [as_before(each) for each in found] == expected
    assert len(expected) == 11
    assert {each.opened.tier for each in settled} == {PriceTier.STANDARD, PriceTier.BATCH}


def test_an_opened_record_of_an_older_program_is_read() -> None:
    payload = bytes.fromhex((FORMAT1 / "opened.hex").read_text())
    assert decode_opened(payload) == Opened(
        request_id="req_both",
        tenant_id="ten_1",
        key_id="key_1",
        model="deepseek-r1",
        replica="deepseek-r1/0#life_1",
        price_id="prc_1",
        currency="CNY",
        price=token_price(4_000_000_000, 1_000_000_000, 16_000_000_000),
        streamed=True,
        started_us=START_US,
    )


def test_records_say_their_format_and_one_of_the_future_is_refused() -> None:
    for payload, decode in ((encode_opened(opened()), decode_opened), (encode_settled(settled_one()), decode_settled)):
        plain = msgspec.msgpack.decode(payload)
        assert plain[0] == FORMAT == 2
        plain[0] = FORMAT + 1
        with pytest.raises(ValueError, match="3"):
            decode(msgspec.msgpack.encode(plain))


def test_an_older_program_does_not_half_understand_a_record() -> None:
    """It takes the first element for the request, or its id, and fails there."""
    assert not isinstance(msgspec.msgpack.decode(encode_settled(settled_one()))[0], list)
    assert not isinstance(msgspec.msgpack.decode(encode_opened(opened()))[0], str)


def settled_one() -> Any:
    return settle(
        opened(),
        TokenUsage(100, 20, 50),
        status=RequestStatus.OK,
        estimated=False,
        hold=10**12,
        first_token_us=START_US + 1,
        finished_us=START_US + 9,
        device_ns=7,
    )
