"""Money at the door: what a balance pays for is served, and not a token more."""

import asyncio

import pytest

from tests.support.data_plane import Start
from tests.support.upstream import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Asked,
    Caller,
    completion,
    finish,
    role,
    usage,
    usage_object,
    word,
)
from tests.support.waiting import until
from tidemill.gateway.admission.holds import TEMPLATE_TOKENS
from tidemill.store.accounts import tenant_balance


def hold_of(body_bytes: int, output: int) -> int:
    """At support.plane's prices: 1000 nanos a prompt token, 2000 a token of the answer, and two for rounding."""
    return (body_bytes + TEMPLATE_TOKENS) * 1000 + output * 2000 + 2


async def whole(asked: Asked, caller: Caller) -> None:
    await asyncio.sleep(0.02)
    await caller.whole(completion(usage=usage_object(100, 50)))


async def obedient(asked: Asked, caller: Caller) -> None:
    """Streams as many tokens as it may, and reports them at the end."""
    limit = asked.json["max_tokens"]
    await caller.send(STREAM_HEAD)
    await caller.chunk(role())
    for _ in range(limit):
        await caller.chunk(word("a "))
    for each in (finish("length"), usage(3, limit), DONE):
        await caller.chunk(each)
    await caller.send(LAST_CHUNK)


async def test_two_hundred_at_once_on_a_balance_for_ten(start: Start) -> None:
    plane, upstream = await start(whole, credit="0.0049")
    size = len(plane.request(max_tokens=50).partition(b"\r\n\r\n")[2])
    assert hold_of(size, 50) * 10 < 4_900_000 < hold_of(size, 50) * 11
    answers = await asyncio.gather(*(plane.ask(max_tokens=50, within_s=30) for _ in range(200)))
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    assert 1 <= len(served) <= 24, "each costs 0.0002 in the end, so more than ten may pass one after the other"
    assert {answer.status for answer in refused} == {402}
    for answer in refused:
        assert answer.error["code"] == answer.error["type"] == "insufficient_quota"
        assert "0.00" in answer.error["message"] and "USD" in answer.error["message"]
    records = await plane.settled()
    assert len(records) == len(served) == len(upstream.asked)
    assert sum(each.charge for each in records) == len(served) * 200_000
    assert plane.wallet.spent <= 4_900_000
    with plane.store.read() as connection:
        assert tenant_balance(connection, plane.tenant_id) == 4_900_000  # the loader will take it down
    # No hold is left: what remains pays for a request that fits.
    assert (await plane.ask(max_tokens=50)).status == 200


async def test_at_no_moment_is_more_at_work_than_the_balance_pays_for(start: Start) -> None:
    """Ten holds fit; the upstream never sees more than ten at a time."""
    at_work = most = 0
    go_on = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await go_on.wait()
        at_work -= 1
        await caller.whole(completion(usage=usage_object(1, 1)))

    plane, upstream = await start(script, credit="0.0049")
    asks = [asyncio.create_task(plane.ask(max_tokens=50, within_s=60)) for _ in range(200)]
    await until(lambda: sum(ask.done() for ask in asks) >= 190)
    assert [ask.result().status for ask in asks if ask.done()] == [402] * 190
    await until(lambda: at_work == 10)
    go_on.set()
    assert sum([(await ask).status == 200 for ask in asks]) == 10
    answers = await asyncio.gather(*(plane.ask(max_tokens=50, within_s=60) for _ in range(200)))
    assert sum(answer.status == 200 for answer in answers) >= 10, "as some end, others may begin"
    assert most == 10
    assert len(await plane.settled()) == len(upstream.asked)


async def test_no_balance_at_all(start: Start) -> None:
    plane, upstream = await start(whole, credit="0")
    for stream in (True, False):
        answer = await plane.ask(stream=stream)
        assert answer.status == 402
        assert answer.error["code"] == "insufficient_quota"
    assert not upstream.asked and not await plane.settled()


async def test_a_whole_answer_with_a_limit_of_its_own_that_is_not_covered(start: Start) -> None:
    """The message names what it may cost and what there is."""
    plane, upstream = await start(whole, credit="0.001")
    answer = await plane.ask(max_tokens=1000)
    assert answer.status == 402
    assert "0.001 USD is available" in answer.error["message"]
    assert "1000 output tokens" in answer.error["message"]
    assert not upstream.asked


async def test_a_whole_answer_without_a_limit_is_limited_to_what_is_there(start: Start) -> None:
    plane, upstream = await start(whole, credit="0.0005")
    answer = await plane.ask()
    assert answer.status == 200
    cap = upstream.asked[0].json["max_tokens"]
    assert 1 <= cap < 256
    record = await plane.record()
    assert record.charge <= record.hold <= 500_000


async def test_a_whole_answer_that_reached_the_limit_says_so_in_its_record(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole(completion(usage=usage_object(3, asked.json["max_tokens"])))

    plane, _ = await start(script, credit="0.0005")
    assert (await plane.ask()).status == 200
    assert (await plane.record()).status == "balance_exhausted"


async def test_a_stream_that_eats_the_last_of_the_balance(start: Start) -> None:
    plane, upstream = await start(obedient, credit="0.0007")
    answer = await plane.ask(stream=True, max_tokens=100_000)
    assert answer.status == 200
    error = answer.chunks[-1]["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert "balance is used up" in error["message"]
    record = await plane.record()
    assert record.status == "balance_exhausted"
    assert record.completion == upstream.asked[0].json["max_tokens"]
    assert record.charge <= record.hold <= 700_000
    assert record.uncollected == 0


async def test_a_stream_that_ends_before_the_balance_is_a_stream_like_any_other(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("short"), finish(), usage(3, 1), DONE)

    plane, _ = await start(script, credit="0.0007")
    answer = await plane.ask(stream=True, max_tokens=100_000)
    assert answer.text == "short" and "error" not in answer.chunks[-1]
    assert (await plane.record()).status == "ok"


async def test_only_one_stream_at_a_time_runs_on_the_last_of_a_balance(start: Start) -> None:
    plane, _ = await start(obedient, credit="0.0007")
    answers = await asyncio.gather(*(plane.ask(stream=True, max_tokens=100_000) for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 402, 402, 402, 402]
    await plane.settled()


@pytest.mark.parametrize("owned", [True, False])
async def test_an_engine_that_ignores_its_limit_is_stopped(start: Start, owned: bool) -> None:
    """Its tokens beyond the hold are the operator's loss, and that is bounded."""
    hung_up = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        try:
            for _ in range(100_000):
                await caller.chunk(word("a "))
                await asyncio.sleep(0)
        except ConnectionError:
            hung_up.set()

    plane, upstream = await start(script, credit="0.0007", owned=owned)
    answer = await plane.ask(stream=True, max_tokens=100_000)
    assert answer.chunks[-1]["error"]["code"] == "insufficient_quota"
    await asyncio.wait_for(hung_up.wait(), 5)
    cap = upstream.asked[0].json["max_tokens"]
    assert len(answer.chunks) < 3 * cap + 100
    record = await plane.record()
    assert (record.status, record.estimated) == ("balance_exhausted", True)
    assert record.charge <= record.hold
    assert plane.wallet.available >= 0


async def test_several_choices_are_held_for(start: Start) -> None:
    """Role and finish chunks of each choice are no tokens: a choice-rich stream is not stopped before its end."""

    async def script(asked: Asked, caller: Caller) -> None:
        limit = asked.json["max_tokens"]
        await caller.send(STREAM_HEAD)
        for index in range(4):
            await caller.chunk(role(index))
        for _ in range(limit - 1):
            for index in range(4):
                await caller.chunk(word("a ", index))
        for index in range(4):
            await caller.chunk(finish("stop", index))
        await asyncio.sleep(0.05)
        await caller.chunk(usage(3, 4 * (limit - 1)) + DONE)
        await caller.send(LAST_CHUNK)

    plane, upstream = await start(script, credit="0.0007")
    answer = await plane.ask(stream=True, n=4, max_tokens=100_000)
    limit = upstream.asked[0].json["max_tokens"]
    record = await plane.record()
    assert (record.completion, record.estimated) == (4 * (limit - 1), False)
    assert "error" not in answer.chunks[-1]
    assert record.hold <= 700_000


async def test_a_failure_costs_nothing_and_gives_the_hold_back(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole(b'{"error":{"message":"no"}}', 400)

    plane, _ = await start(script, credit="0.0007")
    for _ in range(20):
        assert (await plane.ask(stream=True, max_tokens=20)).status == 400
    assert plane.wallet.spent == 0


async def test_a_broken_answer_that_nobody_saw_costs_nothing(start: Start) -> None:
    """A whole answer of an engine that died in the middle: the client got an error, so it pays nothing."""

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(b'HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n{"choices":[{"message":')
        caller.close()

    plane, _ = await start(script)
    assert (await plane.ask()).status == 502
    record = await plane.record()
    assert (record.status, record.charge) == ("engine_lost", 0)
