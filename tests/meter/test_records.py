"""Opened and settled records: rated once, never beyond the hold, and the same after a journey through bytes."""

from hypothesis import given
from hypothesis import strategies as st

from tests.meter.values import START_US, opened
from tidemill.ledger.pricing import Price, rate
from tidemill.ledger.usage import RequestStatus, TokenUsage
from tidemill.meter.records import decode_opened, decode_settled, encode_opened, encode_settled, settle, to_record

tokens = st.integers(0, 2**28)
prices = st.tuples(*[st.integers(0, 10**16)] * 3)


@given(tokens, tokens, tokens, prices, st.integers(0, 2**62), st.sampled_from(list(RequestStatus)), st.booleans())
def test_a_settlement_is_rated_and_capped(
    prompt: int,
    cached: int,
    completion: int,
    price: tuple[int, int, int],
    hold: int,
    status: RequestStatus,
    estimated: bool,
) -> None:
    usage = TokenUsage(prompt, cached, completion)
    request = opened(price=price)
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
    full = rate(usage, Price(*price))
    assert made.charge == min(full.total, hold)
    assert made.charge + made.uncollected == full.total
    assert min(made.charge_input, made.charge_cached, made.charge_output, made.uncollected) >= 0
    record = to_record(made)
    assert record.charge == made.charge
    assert record.usage == usage
    assert (record.status, record.estimated, record.hold, record.device_ns) == (status, estimated, hold, 3)
    assert record.finished_at == record.started_at
    assert decode_settled(encode_settled(made)) == made
    assert decode_opened(encode_opened(request)) == request
