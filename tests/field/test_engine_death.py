"""An engine killed with -9 in the middle of a hundred streams: what each client sees, and what is billed.

Peers: an answer that broke off is billed for its error text, refunded whole, or not recorded at all
(BerriAI/litellm 14457; QuantumNous/new-api 4463, 5235, 5288).
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.field.books import check_books
from tests.field.load import Stream
from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform
from tidemill.ledger.usage import RequestStatus, TokenUsage

STREAMS = 100
WAITING = 20
"""So many more have been asked of the engines, but have no token yet."""
TOKENS = 60
PROMPT = 3
CREDIT = "1000"
CONFIG = """
[models.mock]
engine = "openai"
base_urls = ["{0}", "{1}"]
on_disconnect = "abort"

[prices.mock]
input = "4.00"
output = "16.00"
"""


@pytest.fixture
def engines() -> Iterator[list[Mock]]:
    with Mock() as one, Mock() as other:
        yield [one, other]


@pytest.fixture
def platform(engines: list[Mock], tmp_path: Path) -> Iterator[Platform]:
    with start_platform(tmp_path, CONFIG.format(*(each.url for each in engines)), workers=2) as platform:
        yield platform


@pytest.mark.slow
async def test_an_engine_killed_in_the_middle_of_100_streams(platform: Platform, engines: list[Mock]) -> None:
    """litellm 14457, new-api 4463, 5235, 5288: each stream ends properly, each has one record of what was produced,
    what had not begun is answered by the other replica, and nothing is held any more."""
    key = platform.new_tenant("crowd", CREDIT)
    slow = {"max_tokens": TOKENS, "mock": {"chunks": TOKENS, "interval_ms": 40}}
    late = {"max_tokens": TOKENS, "mock": {"chunks": TOKENS, "interval_ms": 1, "ttft_ms": 1000}}
    begun = await asyncio.gather(*(Stream.begin(platform.port, key, **slow) for _ in range(STREAMS)))
    await asyncio.gather(*(stream.read(tokens=3) for stream in begun))
    waiting = [asyncio.create_task(Stream.begin(platform.port, key, **late)) for _ in range(WAITING)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in waiting)
    engines[0].kill9()
    await asyncio.gather(*(stream.read() for stream in begun))
    late_ones = await asyncio.gather(*waiting)
    await asyncio.gather(*(stream.read() for stream in late_ones))

    assert all(stream.status == 200 and stream.done for stream in [*begun, *late_ones]), "a proper end for everybody"
    broken = {stream.request_id: stream for stream in begun if stream.error is not None}
    assert STREAMS / 4 < len(broken) < STREAMS * 3 / 4, "half of them were on the one that died"
    assert {stream.error["code"] for stream in broken.values() if stream.error} == {"engine_lost"}
    assert all(3 <= stream.tokens < TOKENS for stream in broken.values())
    whole = {stream.request_id: stream for stream in [*begun, *late_ones] if stream.error is None}
    assert all(stream.tokens == TOKENS for stream in whole.values())
    assert whole.keys() >= {stream.request_id for stream in late_ones}, "the other replica has answered"

    await asyncio.to_thread(platform.stop)
    records = {each.request_id: each for each in check_books(platform, {"crowd": CREDIT})["crowd"]}
    assert records.keys() == broken.keys() | whole.keys()
    for request_id, stream in broken.items():
        record = records[request_id]
        assert (record.status, record.replica.partition("#")[0]) == (RequestStatus.ENGINE_LOST, "mock/0")
        assert record.usage.completion == stream.tokens and record.estimated
    for request_id in whole:
        record = records[request_id]
        assert (record.status, record.replica.partition("#")[0]) == (RequestStatus.OK, "mock/1")
        assert record.usage == TokenUsage(PROMPT, 0, TOKENS) and not record.estimated
