"""The edges of HTTP on both sides of the gateway: any cut of the bytes, and answers that could be read in two ways."""

import asyncio
import json
from itertools import pairwise

import pytest
import pytest_asyncio
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

INTERIM = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
TEXTS = ["Grüße, ", "東京 ", "🌊🌊", " \u2028 end"]
EVENTS = [role(), *(word(each) for each in TEXTS), finish(), usage(5, 6), DONE]


def raw_answer(interims: int, groups: list[bytes]) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in groups)
    return INTERIM * interims + STREAM_HEAD + body + LAST_CHUNK


def cut(data: bytes, places: list[float]) -> list[bytes]:
    at = sorted({round(place * len(data)) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(at)]


cuts = st.lists(st.floats(0, 1), max_size=8)


@pytest_asyncio.fixture
async def both(start: Start) -> tuple[Plane, Upstream]:
    """One plane for all examples of a test, which set the engine's script."""

    async def none(asked: Asked, caller: Caller) -> None:
        raise AssertionError("no script")

    return await start(none)


@examples(0.4)
@given(interims=st.integers(0, 3), chunks=cuts, parts=cuts, request_parts=cuts)
async def test_wherever_request_and_answer_are_cut_the_same_arrives(
    both: tuple[Plane, Upstream],
    interims: int,
    chunks: list[float],
    parts: list[float],
    request_parts: list[float],
) -> None:
    """A byte-splitting proxy on both sides: cuts in heads, chunk sizes, events and characters; interim answers before;
    the bytes of the events spread over HTTP chunks as they like."""
    plane, upstream = both
    answer_bytes = raw_answer(interims, cut(b"".join(EVENTS), chunks))

    async def script(asked: Asked, caller: Caller) -> None:
        assert asked.json["messages"][0]["content"] == "".join(TEXTS)
        for part in cut(answer_bytes, parts):
            await caller.send(part)
            await asyncio.sleep(0)

    upstream.script = script
    known = len(upstream.asked)
    line = await plane.line()
    for _ in range(2):  # the connection to the client, and that to the engine, stay usable
        request = plane.request(stream=True, messages=[{"role": "user", "content": "".join(TEXTS)}])
        for part in cut(request, request_parts):
            await line.send(part)
            await asyncio.sleep(0)
        answer = await line.answer()
        assert (answer.status, answer.text) == (200, "".join(TEXTS))
    line.close()
    assert len(upstream.asked) == known + 2 and upstream.connections == 1
    last = (await plane.settled())[-1]
    assert (last.status, last.prompt, last.completion, last.estimated) == ("ok", 5, 6, False)


def whole_answer(text: str) -> bytes:
    body = json.dumps(completion(text, usage_object(5, 1))).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "extra", [whole_answer("for somebody else"), b"HTTP/1.1 200 OK\r\n", b"x", b"\r\nGET / HTTP/1.1\r\n\r\n"]
)
async def test_what_an_engine_says_unasked_is_nobodys_answer(start: Start, extra: bytes, later: bool) -> None:
    """Bytes behind an answer, at once or while the connection is idle: the next request must not take them for its
    own, least of all when it is another tenant's."""

    async def script(asked: Asked, caller: Caller) -> None:
        if len(upstream.asked) > 1:
            await caller.send(whole_answer("mine"))
        elif later:
            await caller.send(whole_answer("first"))
            await asyncio.sleep(0.1)
            await caller.send(extra)
        else:
            await caller.send(whole_answer("first") + extra)

    plane, upstream = await start(script)
    said = []
    for _ in range(3):
        answer = await plane.ask()
        assert answer.status == 200
        said.append(answer.json["choices"][0]["message"]["content"])
        await asyncio.sleep(0.2)
    assert said == ["first", "mine", "mine"]
    assert upstream.connections == 2, "the connection that said too much is not used again"


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 5\r\n",
        b"content-length: 5\r\ncontent-length: 500\r\n",
        b"content-length: 5, 5\r\n",
        b"content-length: +5\r\n",
        b"content-length: 0x5\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"transfer-encoding : chunked\r\n",
        b"x: y\r\n content-length: 5\r\n",
        b"x: a\0b\r\ncontent-length: 5\r\n",
    ],
)
async def test_an_answer_that_could_be_read_in_two_ways_poisons_no_connection(start: Start, head: bytes) -> None:
    """Whatever is made of it, what lies behind it is never taken for the answer to the next request."""

    async def script(asked: Asked, caller: Caller) -> None:
        if len(upstream.asked) > 1:
            await caller.send(whole_answer("mine"))
        else:
            await caller.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n0\r\n\r\n" + whole_answer("smuggled"))

    plane, upstream = await start(script, ttft_timeout_seconds=0.5, idle_timeout_seconds=0.5)
    first = await plane.ask()
    assert first.status in (200, 502) and b"smuggled" not in first.body.partition(b"\r\n\r\n")[0][:200]
    await asyncio.sleep(0.05)
    second = await plane.ask()
    assert second.status == 200 and second.json["choices"][0]["message"]["content"] == "mine"
    assert upstream.connections == 2
    await plane.settled()


async def test_interim_answers_without_end_are_no_answer(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        try:
            while True:
                await caller.send(INTERIM * 50)
                await asyncio.sleep(0.01)
        except ConnectionError:
            pass

    plane, _ = await start(script, ttft_timeout_seconds=0.5)
    answer = await plane.ask(stream=True)
    assert answer.status == 502 and answer.error["code"] == "engine_lost"
    assert (await plane.record()).charge == 0


async def test_an_engine_that_closes_its_half_in_mid_stream_is_lost(start: Start) -> None:
    """A FIN without an end of the answer, while it would still read."""

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one "), word("two "), end=False)
        await asyncio.sleep(0.05)  # else it is seen with the data
        caller.half_close()
        await caller.hangs_up()

    plane, _ = await start(script)
    answer = await plane.ask(stream=True)
    assert answer.chunks[-1]["error"]["code"] == "engine_lost"
    record = await plane.record()
    assert (record.status, record.completion) == ("engine_lost", 2)


async def test_an_engine_that_answers_before_it_has_read_the_request(start: Start) -> None:
    """It refuses a long prompt by its head alone, and closes: the client gets that answer, not a broken connection."""
    plane, upstream = await start(lambda asked, caller: asyncio.sleep(0))
    await upstream.stop()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"error":{"message":"The prompt is too long."}}'
        writer.write(b"HTTP/1.1 413 X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.write_eof()
        while await reader.read(65536):
            pass
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", upstream.port)
    answer = await plane.ask(messages=[{"role": "user", "content": "long " * 200_000}])
    assert 400 <= answer.status < 500 and "too long" in answer.error["message"]
    assert (await plane.record()).charge == 0
    server.close()
    await upstream.start()


async def test_continue_is_sent_when_the_turn_of_its_request_comes(start: Start) -> None:
    """Of two requests on one connection the second waits for leave to send its body."""

    async def script(asked: Asked, caller: Caller) -> None:
        await asyncio.sleep(0.1)
        await caller.send(whole_answer("mine"))

    plane, _ = await start(script)
    head, _, body = plane.request().partition(b"\r\n\r\n")
    line = await plane.line()
    await line.send(plane.request() + head + b"\r\nexpect: 100-continue\r\n\r\n")
    assert (await line.answer()).status == 200
    async with asyncio.timeout(5):
        assert (await line.head())[0] == 100
    await line.send(body)
    assert (await line.answer()).status == 200
    line.close()
    assert len(await plane.settled()) == 2
