"""Clients that leave, at every moment: what the engine notices, and what is billed (docs/policies.md)."""

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
from tests.support.waiting import at_rest, until
from tidemill.http.client_connection import EngineConnection

LEAVE = pytest.mark.parametrize("how", ["close", "reset"])


@LEAVE
async def test_right_after_the_last_frame(start: Start, how: str) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one"), finish(), usage(3, 1), DONE)

    plane, upstream = await start(script)
    for _ in range(5):
        line = await plane.line()
        await line.send(plane.request(stream=True))
        await line.reader.readuntil(b"[DONE]\n\n")
        getattr(line, how)()
    records = await plane.settled()
    assert [(each.status, each.prompt, each.completion, each.estimated) for each in records] == [
        ("ok", 3, 1, False)
    ] * 5
    assert upstream.connections == 1, "the engine is not cut off for a client that had everything"


@LEAVE
async def test_between_the_usage_and_done(start: Start, how: str) -> None:
    """All has come from the engine; the client leaves before the gateway has seen the end."""
    left = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one"), finish(), usage(3, 1), end=False)
        await left.wait()
        await asyncio.sleep(0.05)
        await caller.chunk(DONE)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script)
    line = await plane.line()
    await line.send(plane.request(stream=True, stream_options={"include_usage": True}))
    await line.reader.readuntil(b'"usage"')
    getattr(line, how)()
    left.set()
    record = await plane.record()
    assert (record.status, record.completion, record.estimated) == ("client_closed", 1, False)


@LEAVE
async def test_in_mid_stream_an_upstream_is_read_to_its_end(start: Start, how: str) -> None:
    """It bills its answer anyway, so the answer is read to learn what it bills: exact usage."""
    left = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one "), word("two "), end=False)
        await left.wait()
        await asyncio.sleep(0.1)
        for each in (word("three"), finish(), usage(9, 3, 4), DONE):
            await caller.chunk(each)
        await caller.send(LAST_CHUNK)

    plane, upstream = await start(script)
    line = await plane.line()
    await line.send(plane.request(stream=True))
    await line.reader.readuntil(b"two")
    getattr(line, how)()
    left.set()
    record = await plane.record()
    assert (record.status, record.prompt, record.cached, record.completion) == ("client_closed", 9, 4, 3)
    assert not record.estimated
    await plane.ask(stream=True)
    assert upstream.connections == 1


@LEAVE
async def test_in_mid_stream_an_upstream_that_does_not_end_in_time(start: Start, how: str) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        await caller.chunk(role())
        for _ in range(100):  # it never falls silent, so only the bound can end it
            await caller.chunk(word(" word"))
            await asyncio.sleep(0.05)

    plane, _ = await start(script, drain_seconds=0.4)
    line = await plane.line()
    await line.send(plane.request(stream=True))
    await line.reader.readuntil(b"word")
    getattr(line, how)()
    started = asyncio.get_running_loop().time()
    record = await plane.record()
    assert 0.3 < asyncio.get_running_loop().time() - started < 1.5
    assert (record.status, record.estimated) == ("client_closed", True)
    assert 3 <= record.completion <= 30
    assert record.charge


@LEAVE
async def test_in_mid_stream_an_engine_of_our_own_is_aborted(start: Start, how: str) -> None:
    """... and what it had reported is billed, exactly where it reports as it goes."""
    hung_up = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(
            role(), word("one ", usage=usage_object(5, 1)), word("two ", usage=usage_object(5, 2)), end=False
        )
        await caller.hangs_up()
        hung_up.set()

    plane, _ = await start(script, owned=True)
    line = await plane.line()
    await line.send(plane.request(stream=True))
    await line.reader.readuntil(b"two")
    getattr(line, how)()
    await asyncio.wait_for(hung_up.wait(), 1.0)
    record = await plane.record()
    assert (record.status, record.prompt, record.completion, record.estimated) == ("client_closed", 5, 2, False)


@LEAVE
@pytest.mark.parametrize("stream", [True, False])
async def test_before_the_first_byte_an_engine_of_our_own_is_aborted(start: Start, how: str, stream: bool) -> None:
    asked_it, hung_up = asyncio.Event(), asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        asked_it.set()
        await caller.hangs_up()
        hung_up.set()

    plane, _ = await start(script, owned=True)
    line = await plane.line()
    await line.send(plane.request(stream=stream))
    await asked_it.wait()
    getattr(line, how)()
    await asyncio.wait_for(hung_up.wait(), 1.0)
    record = await plane.record()
    assert (record.status, record.charge, record.estimated) == ("client_closed", 0, False)


@LEAVE
@pytest.mark.parametrize("stream", [True, False])
async def test_before_the_first_byte_an_upstream_is_read_to_its_end(start: Start, how: str, stream: bool) -> None:
    asked_it, left = asyncio.Event(), asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        asked_it.set()
        await left.wait()
        await asyncio.sleep(0.05)
        if stream:
            await caller.stream(role(), word("one"), finish(), usage(4, 1), DONE)
        else:
            await caller.whole(completion(usage=usage_object(4, 1)))

    plane, _ = await start(script)
    line = await plane.line()
    await line.send(plane.request(stream=stream))
    await asked_it.wait()
    getattr(line, how)()
    left.set()
    record = await plane.record()
    assert (record.status, record.prompt, record.completion, record.estimated) == ("client_closed", 4, 1, False)


@pytest.mark.parametrize("stream", [True, False])
async def test_before_the_first_byte_an_upstream_that_never_answers(start: Start, stream: bool) -> None:
    """Nobody knows what it bills; the prompt's estimate is the best there is, marked as such."""
    asked_it = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        asked_it.set()
        await caller.hangs_up()

    plane, _ = await start(script, drain_seconds=0.3)
    line = await plane.line()
    await line.send(plane.request(stream=stream))
    await asked_it.wait()
    line.close()
    record = await plane.record()
    assert (record.status, record.completion, record.estimated) == ("client_closed", 0, True)


async def test_before_anything_was_sent_nothing_is_billed(start: Start) -> None:
    """The client leaves while the connection to the upstream is still being made."""

    async def script(asked: Asked, caller: Caller) -> None:
        raise AssertionError("nothing should be asked")

    plane, _ = await start(script)
    pool = plane.routes.by_name["mock"].replicas[0].pool
    connect, connecting, go_on = pool.connect, asyncio.Event(), asyncio.Event()

    async def slow_connect() -> EngineConnection:
        connecting.set()
        await go_on.wait()
        return await connect()

    pool.connect = slow_connect  # type: ignore[method-assign]
    line = await plane.line()
    await line.send(plane.request(stream=True))
    await connecting.wait()
    line.reset()
    await asyncio.sleep(0.05)
    go_on.set()
    record = await plane.record()
    assert (record.status, record.charge, record.estimated) == ("client_closed", 0, False)


@pytest.mark.parametrize("owned", [True, False])
async def test_a_client_that_never_reads(start: Start, owned: bool) -> None:
    """It is taken for gone after the write timeout; until then the engine has to wait, and memory does not grow."""
    sent, waits = 0, False

    async def script(asked: Asked, caller: Caller) -> None:
        nonlocal sent, waits
        await caller.send(STREAM_HEAD)
        await caller.chunk(role())
        while sent < 20_000:
            waits = True
            await caller.chunk(word("x" * 1000))
            waits = False
            sent += 1
        await caller.chunk(usage(1, 20_000) + DONE)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script, owned=owned, write_timeout_s=600.0, max_output_tokens=50_000, drain_seconds=60.0)
    line = await plane.line(receive_buffer=4096)
    await line.send(plane.request(stream=True))
    await until(lambda: plane.server.connections)
    (client,) = plane.server.connections
    await until(lambda: waits and client.blocked and plane.holds_back)
    assert await at_rest(lambda: sent) < 20_000, "the engine goes on although nobody reads"
    assert waits and client.blocked and plane.holds_back
    plane.server._write_timeout_s = 0.0  # it is over
    record = await plane.record()
    line.close()
    assert record.status == "client_closed"
    if owned:
        assert record.estimated and 0 < record.completion <= 20_000
    else:
        assert (record.completion, record.estimated) == (20_000, False)


async def test_a_client_that_never_reads_a_short_answer(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one"), finish(), usage(3, 1), DONE)

    plane, _ = await start(script)
    line = await plane.line(receive_buffer=4096)
    await line.send(plane.request(stream=True))
    assert (await plane.record()).status == "ok"
    line.reset()


@pytest.mark.parametrize("owned", [True, False])
async def test_many_leave_at_once(start: Start, owned: bool) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for _ in range(100):
            await caller.chunk(word("one "))
            await asyncio.sleep(0.02)
        await caller.chunk(usage(2, 100) + DONE)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script, owned=owned)
    lines = [await plane.line() for _ in range(60)]
    for n, line in enumerate(lines):
        await line.send(plane.request(stream=True))
        if n % 4 == 0:
            line.reset()
    for n, line in enumerate(lines):
        if n % 4 in (1, 2):  # who leaves before admission leaves no record
            assert (await line.head())[0] == 200
    for n, line in enumerate(lines):
        if n % 4 == 1:
            line.close()
        elif n % 4 == 2:
            line.reset()
    for n, line in enumerate(lines):
        if n % 4 == 3:
            assert "one one" in (await line.answer()).text
            line.close()
    records = await plane.settled()
    assert sum(each.status == "ok" for each in records) == 15
    assert {each.status for each in records} == {"ok", "client_closed"}
    assert 45 <= len(records) <= 60
