import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.ledger.values import record
from tidemill.ledger.components import MAX_TOKENS
from tidemill.ledger.usage import TokenUsage

anything = st.integers(-(2**70), 2**70)


@given(anything, anything, anything)
def test_whatever_an_engine_reports_the_counts_are_possible(prompt: int, cached: int, completion: int) -> None:
    usage = TokenUsage(prompt, cached, completion)
    assert 0 <= usage.cached <= usage.prompt <= MAX_TOKENS
    assert 0 <= usage.completion <= MAX_TOKENS
    assert usage.uncached + usage.cached == usage.prompt
    assert usage.total == usage.prompt + usage.completion


@given(st.integers(0, MAX_TOKENS), st.integers(0, MAX_TOKENS), st.integers(0, MAX_TOKENS))
def test_possible_counts_are_kept(one: int, other: int, completion: int) -> None:
    usage = TokenUsage(max(one, other), min(one, other), completion)
    assert (usage.prompt, usage.cached, usage.completion) == (max(one, other), min(one, other), completion)


def test_impossible_counts_are_mended_when_decoded_and_replaced_too() -> None:
    assert msgspec.json.decode(b'{"prompt": 5, "cached": 9, "completion": -1}', type=TokenUsage) == TokenUsage(5, 5, 0)
    assert msgspec.structs.replace(TokenUsage(5, 5, 0), prompt=3) == TokenUsage(3, 3, 0)


def test_a_record_survives_a_round_trip_and_its_charge_is_the_sum_of_its_parts() -> None:
    one = record()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=type(one)) == one
    assert one.charge == sum(one.charges.values())
    assert one.charge == 800 * 4_000 + 200 * 1_000 + 300 * 16_000
