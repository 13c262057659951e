"""The fast way and the slow one: a client cannot tell them apart, however the bytes come, and neither can the meter."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.data_plane import Start
from tests.support.examples import examples
from tests.support.plane import Plane
from tests.support.upstream import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Asked,
    Caller,
    Upstream,
    completion,
    finish,
    role,
    usage,
    usage_object,
    word,
)
from tests.support.waiting import at_rest, until

STREAM = (role(), word("one "), word("two "), word("three"), finish(), usage(7, 3, 2), DONE)


def framed(*events: bytes, upper: bool = False) -> bytes:
    size = b"%X" if upper else b"%x"
    return b"".join(size % len(each) + b"\r\n" + each + b"\r\n" for each in events)


async def warm(plane: Plane) -> None:
    """The first request of a tenant waits for its lease, and makes the connection to the engine."""
    assert (await plane.ask()).status == 200
    await plane.settled()


async def whole(asked: Asked, caller: Caller) -> None:
    await caller.whole(completion(usage=usage_object(9, 4)))


@pytest.mark.parametrize("stream", [False, True])
async def test_no_task_is_made_for_what_goes_as_it_should(start: Start, stream: bool, monkeypatch: Any) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await (caller.stream(*STREAM) if asked.json.get("stream") else whole(asked, caller))

    plane, upstream = await start(script)
    await warm(plane)
    made: list[object] = []
    spawn = plane.server.spawn

    def counted(work: Any) -> None:
        made.append(work)
        spawn(work)

    monkeypatch.setattr(plane.server, "spawn", counted)
    for _ in range(3):
        answer = await plane.ask(stream=True) if stream else await plane.ask()
        assert answer.status == 200
        if stream:
            assert answer.text == "one two three"
    assert made == []
    assert upstream.connections == 1
    records = await plane.settled()
    assert [record.status for record in records] == ["ok"] * 4
    assert records[-1].completion == (3 if stream else 4)


@pytest.mark.parametrize("upper", [False, True])
async def test_chunks_go_on_in_their_own_frames(start: Start, upper: bool) -> None:
    long = word("x" * 3000)

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for each in (*STREAM[:2], long, *STREAM[2:]):
            await caller.send(framed(each, upper=upper))
            await asyncio.sleep(0.002)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script)
    for _ in range(2):
        answer = await plane.ask(stream=True)
        assert answer.text == "one " + "x" * 3000 + "two three"
    assert all(record.completion == 3 and not record.estimated for record in await plane.settled())


@examples(0.25)
@given(cuts=st.lists(st.integers(1, 2000), max_size=8), together=st.integers(1, 4))
async def test_however_a_stream_is_cut(start: Start, cuts: list[int], together: int) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        events = [b"".join(STREAM[at : at + together]) for at in range(0, len(STREAM), together)]
        data = STREAM_HEAD + framed(*events) + LAST_CHUNK
        ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
        begin = 0
        for end in ends:
            await caller.send(data[begin:end])
            await asyncio.sleep(0.001)
            begin = end

    plane, upstream = PLANES.get(id(start)) or await start(script)
    PLANES.clear()
    PLANES[id(start)] = plane, upstream
    upstream.script = script
    before = len(await plane.settled())
    answer = await plane.ask(stream=True)
    assert answer.text == "one two three"
    record = (await plane.settled())[before]
    assert (record.status, record.prompt, record.cached, record.completion) == ("ok", 7, 2, 3)


PLANES: dict[int, tuple[Plane, Upstream]] = {}


@pytest.mark.parametrize("size", [b"0x10", b"+10", b" 10", b"1_0", b"10 ", b"10;x=y", b"000000010", b"-1", b"zz"])
async def test_a_chunk_size_is_hexadecimal_digits_or_the_parsers_affair(start: Start, size: bytes) -> None:
    """What is forwarded in its own frame must be a frame to everybody."""
    event = b"data: {}\n\n" + b":" + b" " * 3 + b"\n\n"  # 16 bytes, hexadecimal 10
    assert len(event) == 16

    async def script(asked: Asked, caller: Caller) -> None:
        if not asked.json.get("stream"):
            await whole(asked, caller)
            return
        await caller.send(STREAM_HEAD + framed(role()))
        await asyncio.sleep(0.01)
        await caller.send(size + b"\r\n" + event + b"\r\n")
        await asyncio.sleep(0.01)
        await caller.send(framed(usage(7, 3), DONE) + LAST_CHUNK)

    plane, _ = await start(script)
    await warm(plane)
    answer = await plane.ask(stream=True)  # its chunks are decoded strictly
    assert size + b"\r\n" not in answer.body
    assert answer.events[-1] == "[DONE]"
    assert len(await plane.settled()) == 2


async def test_a_kept_connection_that_the_engine_has_closed(start: Start) -> None:
    closing = False

    async def script(asked: Asked, caller: Caller) -> None:
        await whole(asked, caller)
        if closing:
            caller.close()

    plane, upstream = await start(script)
    await warm(plane)
    closing = True
    for _ in range(4):
        assert (await plane.ask()).status == 200
    assert {record.status for record in await plane.settled()} == {"ok"}
    assert upstream.connections >= 4


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_refuses_or_dies_behind_a_warm_connection(start: Start, stream: bool) -> None:
    how = "well"

    async def script(asked: Asked, caller: Caller) -> None:
        if how == "refuse":
            await caller.whole({"error": {"message": "too long for me", "code": 400}}, status=400)
        elif how == "die":
            await caller.send(STREAM_HEAD + framed(role(), word("one ")))
            await asyncio.sleep(0.02)
            caller.reset()
        else:
            await whole(asked, caller)

    plane, _ = await start(script)
    await warm(plane)
    how = "refuse"
    assert (await plane.ask(stream=stream)).status == 400
    how = "die"
    answer = await plane.ask(stream=stream)
    if stream:
        assert "engine_lost" in answer.events[-2]
    else:
        assert answer.status == 502
    how = "well"
    assert [record.status for record in await plane.settled()] == ["ok", "engine_error", "engine_lost"]


async def test_a_slow_reader_behind_a_warm_connection_makes_the_engine_wait(start: Start) -> None:
    sent, waits = 0, False
    words = word("x" * 8000)

    async def script(asked: Asked, caller: Caller) -> None:
        nonlocal sent, waits
        if not asked.json.get("stream"):
            await whole(asked, caller)
            return
        await caller.send(STREAM_HEAD + framed(role()))
        for _ in range(4000):
            waits = True
            await caller.chunk(words)
            waits = False
            sent += 1
        await caller.send(framed(usage(7, 4000), DONE) + LAST_CHUNK)

    plane, _ = await start(script)
    await warm(plane)
    line = await plane.line(receive_buffer=4096)
    await line.send(plane.request(stream=True))
    await until(lambda: waits and plane.holds_back)
    assert await at_rest(lambda: sent) < 3000, "32 MB were taken from the engine for a client that reads nothing"
    answer = await line.answer(within_s=60)
    assert answer.text.count("x") == 4000 * 8000
    line.close()
    assert (await plane.settled())[-1].completion == 4000


async def test_the_client_leaves_in_mid_stream(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        if not asked.json.get("stream"):
            await whole(asked, caller)
            return
        await caller.send(STREAM_HEAD + framed(role(), word("one ")))
        await caller.hangs_up()

    plane, _ = await start(script, owned=True)
    await warm(plane)
    line = await plane.line()
    await line.send(plane.request(stream=True))
    await line.reader.readuntil(b"one ")
    line.close()
    assert [record.status for record in await plane.settled()] == ["ok", "client_closed"]


async def test_the_same_client_asks_for_different_things_on_one_connection(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        content = asked.json["messages"][0]["content"]
        await caller.whole({**completion(usage=usage_object(9, 4)), "echo": content})

    plane, _ = await start(script)
    line = await plane.line()
    for text in ("a", "b", "longer than that", "", "z" * 70_000, "ü", "c" * 300_000, "d"):
        await line.send(plane.request(messages=[{"role": "user", "content": text}]))
        assert (await line.answer()).json["echo"] == text
    line.close()
