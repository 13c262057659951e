"""What is decided by the head alone: whose body is taken, and how many may come."""

import asyncio
from typing import Any

import pytest

from tests.support.data_plane import Start
from tests.support.plane import CHAT, Plane
from tests.support.upstream import Asked, Caller, completion, usage_object
from tests.support.wire import Line, get
from tidemill.gateway.auth.snapshot import EMPTY
from tidemill.http import server_connection as server_protocol


async def whole(asked: Asked, caller: Caller) -> None:
    await caller.whole(completion(usage=usage_object(9, 4)))


def forget(plane: Plane) -> None:
    """From here on the gateway knows no key, and may ask the store at once."""
    plane.authenticator.snapshot = EMPTY
    plane.authenticator._asked_at = float("-inf")


def head(key: str, more: bytes, path: str = CHAT) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {key}\r\n".encode() + more + b"\r\n"


LARGE = b"content-length: 1500000\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
WAITS = b"content-length: 100\r\nexpect: 100-continue\r\n"


@pytest.mark.parametrize("more", [LARGE, CHUNKED, WAITS])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/messages/count_tokens"])
async def test_a_wrong_key_is_told_before_any_body_was_sent(start: Start, more: bytes, path: str) -> None:
    plane, upstream = await start(whole)
    line = await plane.line()
    await line.send(head("sk-tm-wrong", more, path))
    status, headers = await line.head()  # no 100 before it
    assert (status, headers["connection"]) == (401, "close")
    line.close()
    assert not upstream.asked


async def test_what_a_stranger_sends_all_the_same_is_not_kept(start: Start) -> None:
    plane, _ = await start(whole)
    line = await plane.line()
    await line.send(head("sk-tm-wrong", CHUNKED))
    assert (await line.head())[0] == 401
    (connection,) = plane.server.connections
    for _ in range(20):
        await line.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    receiving = connection._parser.receiving
    assert receiving is not None and receiving.incoming is not None
    assert len(receiving.incoming._buffer) == 0
    line.close()


@pytest.mark.parametrize("framing", ["length", "chunks", "waits"])
async def test_a_key_that_is_new_to_the_gateway_is_asked_for_while_the_body_waits(start: Start, framing: str) -> None:
    """The key is in the store, and not in this process's snapshot yet."""
    plane, _ = await start(whole)
    key = plane.key
    forget(plane)
    request = plane.request(key=key, messages=[{"role": "user", "content": "x" * 600_000}])
    body = request.partition(b"\r\n\r\n")[2]
    line = await plane.line()
    if framing == "chunks":
        pieces = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
        await line.send(head(key, CHUNKED) + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in pieces))
        await line.send(b"0\r\n\r\n")
    elif framing == "waits":
        await line.send(head(key, b"expect: 100-continue\r\ncontent-length: %d\r\n" % len(body)))
        assert (await line.head())[0] == 100
        await line.send(body)
    else:
        await line.send(request)
    assert (await line.answer()).status == 200
    await line.send(plane.request(key=key))
    assert (await line.answer()).status == 200, "the connection goes on"
    line.close()


async def test_a_body_of_unknown_length_is_bounded_for_newcomers_too(start: Start) -> None:
    plane, _ = await start(whole)
    forget(plane)
    line = await plane.line()
    await line.send(head(plane.key, CHUNKED))
    answer = asyncio.create_task(line.answer())
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    for _ in range(40):
        if answer.done():
            break
        await line.send(piece)
        await asyncio.sleep(0.01)
    assert (await answer).status == 413
    line.close()


async def test_routes_that_need_no_key_need_none(start: Start) -> None:
    plane, _ = await start(whole)
    line = await plane.line()
    await line.send(b"GET /healthz HTTP/1.1\r\nhost: t\r\ncontent-length: 20000\r\n\r\n" + b"x" * 20_000)
    assert (await line.answer()).status == 200
    line.close()


async def test_more_connections_than_may_be(start: Start) -> None:
    plane, _ = await start(whole)
    plane.server.max_connections = 3
    lines = [await plane.line() for _ in range(3)]
    for line in lines:
        await line.send(get("/healthz"))
        assert (await line.answer()).status == 200
    extra = await plane.line()
    await extra.send(plane.request())
    answer = await extra.answer()
    assert answer.status == 503
    assert (answer.error["code"], answer.headers["retry-after"]) == ("too_many_connections", "1")
    assert await extra.reader.read() == b"", "and it is closed"
    extra.close()
    for line in lines:  # those that are in go on
        await line.send(plane.request())
        assert (await line.answer()).status == 200
        line.close()

    async def fits() -> bool:
        line = await plane.line()
        await line.send(get("/healthz"))
        status = (await line.answer()).status
        line.close()
        return status == 200

    async with asyncio.timeout(60):
        while not await fits():
            await asyncio.sleep(0.02)


async def test_a_flood_of_connections_is_broken_off(start: Start, monkeypatch: Any) -> None:
    monkeypatch.setattr(server_protocol, "MAX_CROWD", 2)
    plane, _ = await start(whole)
    plane.server.max_connections = 1
    lines: list[Line] = []
    for _ in range(3):
        lines.append(await plane.line())
        await asyncio.sleep(0.02)
    beyond = await plane.line()
    async with asyncio.timeout(5):
        with pytest.raises((ConnectionError, AssertionError, asyncio.IncompleteReadError)):
            await beyond.send(get("/healthz"))
            assert await beyond.reader.read(), "nothing is said"
    for line in (*lines, beyond):
        line.close()
