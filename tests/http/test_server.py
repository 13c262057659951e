"""The HTTP server against what clients, proxies and attackers send, over real sockets."""

import asyncio
import random
import re
import resource
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.wire import Answer, Line, get, post
from tidemill.gateway.endpoints.app import RequestIds
from tidemill.http import request_parser
from tidemill.http import server_connection as http_module
from tidemill.http.server import ClientGone, Exchange, HttpServer

MAX_BODY = 1024 * 1024
MIB = 1024 * 1024


async def echo(exchange: Exchange) -> None:
    """Answers with what it was sent; `/slow` takes its time, `/stream` gives the body in pieces, `/flood` no end."""
    if exchange.refusal is not None:
        exchange.respond(exchange.refusal[0], exchange.refusal[1].encode(), close=True)
    elif exchange.path == b"/slow":
        await asyncio.sleep(0.1)
        exchange.respond(200, b"slow")
    elif exchange.path == b"/stream":
        exchange.start_stream(b"")
        for at in range(0, len(exchange.body), 3):
            exchange.send(exchange.body[at : at + 3])
            await asyncio.sleep(0)
        exchange.end()
    else:
        seen = b"%b %b auth=%b %d\n" % (
            exchange.method,
            exchange.path,
            exchange.headers.get(b"authorization", b"-"),
            len(exchange.body),
        )
        exchange.respond(200, seen + exchange.body)


Serve = Callable[..., Any]


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    servers = []

    async def serve(handler: Any = echo, write_timeout_s: float = 30.0) -> tuple[HttpServer, int]:
        loop = asyncio.get_running_loop()
        server = HttpServer(handler, RequestIds(), loop=loop, max_body_bytes=MAX_BODY, write_timeout_s=write_timeout_s)
        servers.append(server)
        await server.listen("127.0.0.1", 0)
        assert server._server is not None
        return server, server._server.sockets[0].getsockname()[1]

    yield serve
    for server in servers:
        await server.stop(0.0)
        await server.cut_off()


async def send(port: int, data: bytes, **options: Any) -> Answer:
    line = await Line.open(port)
    await line.send(data)
    answer = await line.answer(**options)
    line.close()
    return answer


async def test_a_request_and_its_answer(serve: Serve) -> None:
    _, port = await serve()
    answer = await send(port, post("/x?y=1", b"hello"))
    assert (answer.status, answer.body) == (200, b"POST /x auth=- 5\nhello")
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["server"] == "tidemill"
    assert answer.headers["date"].endswith("GMT")


async def test_a_connection_serves_many_requests_under_different_ids(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    ids = set()
    for n in range(20):
        await line.send(post(f"/{n}", b"x" * n))
        answer = await line.answer()
        assert answer.body.startswith(b"POST /%d auth=- %d\n" % (n, n))
        ids.add(answer.headers["x-request-id"])
    assert len(ids) == 20
    line.close()


@pytest.mark.parametrize("size", [0, 1, 1000, 40_000, 300_000, MAX_BODY])
async def test_bodies_of_all_sizes_leave_the_connection_usable(serve: Serve, size: int) -> None:
    _, port = await serve()
    line = await Line.open(port)
    for _ in range(3):
        await line.send(post("/x", b"z" * size))
        answer = await line.answer()
        assert answer.status == 200 and answer.body.endswith(b"z" * size)
    line.close()


async def test_every_byte_alone(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    for byte in post("/x", b"hello") + get("/y"):
        await line.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await line.answer()).body == b"POST /x auth=- 5\nhello"
    assert (await line.answer()).body == b"GET /y auth=- 0\n"
    line.close()


async def test_pipelined_requests_are_answered_in_their_order(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    await line.send(b"".join(get("/slow") if n % 3 == 0 else post(f"/{n}", b"b" * n * 100) for n in range(12)))
    for n in range(12):
        answer = await line.answer()
        assert answer.body.startswith(b"slow" if n % 3 == 0 else b"POST /%d auth" % n)
    line.close()


async def test_too_many_requests_ahead(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    await line.send(get("/slow") * 200)
    seen = [await line.answer() for _ in range(request_parser.MAX_PIPELINED + 2)]
    assert [answer.status for answer in seen[:-1]] == [200] * (request_parser.MAX_PIPELINED + 1)
    assert seen[-1].status == 400 and b"pipelined" in seen[-1].body
    line.close()


CHUNKED = b"POST /x HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_chunked_bodies(serve: Serve) -> None:
    _, port = await serve()
    body = b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\nx-trailer: 1\r\n\r\n"
    assert (await send(port, CHUNKED + body)).body == b"POST /x auth=- 11\nhello world"


async def test_a_trailer_changes_nothing(serve: Serve) -> None:
    """RFC 9110, 6.5.1: authorization and routing in a trailer must not be believed."""
    _, port = await serve()
    body = b"1\r\na\r\n0\r\nauthorization: Bearer stolen\r\nhost: evil\r\n\r\n"
    assert (await send(port, CHUNKED + body)).body == b"POST /x auth=- 1\na"


async def test_many_tiny_chunks_take_no_more_memory_than_they_are(serve: Serve) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, port = await serve()
    line = await Line.open(port)
    await line.send(CHUNKED)
    tiny = b"2\r\nab\r\n" * 4096
    for _ in range(MAX_BODY // 8192 - 1):
        await line.send(tiny)
    await line.send(b"0\r\n\r\n")
    assert (await line.answer()).status == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024
    line.close()


async def test_expect_100_continue(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    await line.send(b"POST /x HTTP/1.1\r\nhost: t\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
    assert (await line.head())[0] == 100
    await line.send(b"hello")
    assert (await line.answer()).body.endswith(b"hello")
    line.close()


async def test_no_100_continue_for_a_body_that_is_too_large(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    await line.send(b"POST /x HTTP/1.1\r\nhost: t\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n")
    assert (await line.head())[0] == 413
    line.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_gets_its_answer_and_not_a_reset(serve: Serve, chunked: bool) -> None:
    """A client that sends all of it before it reads must still find the answer."""
    _, port = await serve()
    line = await Line.open(port)
    size = 24 * MIB
    piece = b"x" * 65536
    head = CHUNKED if chunked else b"POST /x HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % size
    await line.send(head)
    for _ in range(size // len(piece)):
        await line.send(b"10000\r\n%b\r\n" % piece if chunked else piece)
    answer = await line.answer()
    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert b"1 MiB" in answer.body
    line.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: t\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 1_000_000,
        b"GET /" + b"a" * 1_000_000,
        CHUNKED + b"0\r\n" + b"x: y\r\n" * 10_000 + b"\r\n",
    ],
)
async def test_a_head_that_is_too_large(serve: Serve, head: bytes) -> None:
    _, port = await serve()
    line = await Line.open(port)
    for at in range(0, len(head), 1000):
        await line.send(head[at : at + 1000])
        await asyncio.sleep(0)
    assert (await line.answer()).status == 431
    line.close()


@pytest.mark.parametrize(
    "smuggled",
    [
        b"CONNECT evil:80 HTTP/1.1\r\nhost: t\r\n\r\n",
        b"POST /x HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST /x HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
        b"POST /x HTTP/1.1\r\ncontent-length: 3, 3\r\n\r\nabc",
        b"POST /x HTTP/1.1\r\ncontent-length: +3\r\n\r\nabc",
        b"POST /x HTTP/1.1\r\ncontent-length: 0x3\r\n\r\nabc",
        b"POST /x HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /x HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /x HTTP/1.1\r\ntransfer-encoding: identity\r\n\r\nabc",
        b"POST /x HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nhost: t\r\n x: folded\r\n\r\n",
        b"POST /x HTTP/1.1\nhost: t\n\n",
        CHUNKED + b"-1\r\nabc\r\n",
        CHUNKED + b"0x3\r\nabc\r\n",
        CHUNKED + b"3\nabc\n0\n\n",
        CHUNKED + b"fffffffffffffffff\r\n",
        b"GET /x\0y HTTP/1.1\r\n\r\n",
        b"GET /x HTTP/1.1\r\nhost: a\0b\r\n\r\n",
        b"GEX /x HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"hello\r\n\r\n",
    ],
)
async def test_what_could_be_read_in_two_ways_is_refused(serve: Serve, smuggled: bytes) -> None:
    """One answer, then the connection closes: a request smuggled behind it is never looked at."""
    _, port = await serve()
    line = await Line.open(port)
    await line.send(smuggled + get("/smuggled"))
    answer = await line.answer()
    assert answer.status == 400, answer
    assert answer.headers["connection"] == "close"
    line.writer.write_eof()
    assert await line.ended() == b""


async def test_http_1_0(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    await line.send(b"POST /stream HTTP/1.0\r\ncontent-length: 7\r\n\r\nabcdefg")
    answer = await line.answer()
    assert answer.body == b"abcdefg"
    assert "transfer-encoding" not in answer.headers
    assert answer.headers["connection"] == "close"
    answer = await send(port, b"GET /x HTTP/1.0\r\n\r\n")
    assert answer.headers["connection"] == "close"


async def test_connection_close_is_obeyed(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    await line.send(b"GET /x HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")
    assert (await line.answer()).headers["connection"] == "close"
    assert await line.ended() == b""


async def test_head_has_no_body(serve: Serve) -> None:
    _, port = await serve()
    line = await Line.open(port)
    await line.send(b"HEAD /x HTTP/1.1\r\nhost: t\r\n\r\n")
    answer = await line.answer(head_only=True)
    assert answer.headers["content-length"] == "17"
    await line.send(get("/y"))
    assert (await line.answer()).body.startswith(b"GET /y")
    line.close()


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.2"])
async def test_an_offer_to_change_protocols_is_ignored(serve: Serve, protocol: bytes) -> None:
    """Java's HTTP client offers h2c with each first request."""
    _, port = await serve()
    upgrade = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %b\r\nhttp2-settings: AAMAAABk\r\n" % protocol
    line = await Line.open(port)
    await line.send(post("/x", b"hello", headers=upgrade) + get("/y"))
    assert (await line.answer()).body == b"POST /x auth=- 5\nhello"
    assert (await line.answer()).body == b"GET /y auth=- 0\n"
    for byte in post("/z", b"hello", headers=upgrade):
        await line.send(bytes([byte]))
    assert (await line.answer()).body == b"POST /z auth=- 5\nhello"
    line.close()


async def test_a_half_closed_client_has_left(serve: Serve) -> None:
    gone = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        exchange.on_gone = gone.set
        await gone.wait()

    _, port = await serve(handler)
    line = await Line.open(port)
    await line.send(get("/x"))
    await asyncio.sleep(0.05)
    line.writer.write_eof()
    await asyncio.wait_for(gone.wait(), 5)
    assert await line.ended() == b""


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_who_leaves_is_noticed_at_once(serve: Serve, how: str) -> None:
    gone = asyncio.Event()
    seen: list[type] = []

    async def handler(exchange: Exchange) -> None:
        exchange.on_gone = gone.set
        exchange.start_stream(b"")
        exchange.send(b"first")
        await gone.wait()
        assert exchange.gone
        attempts: list[Callable[[], None]] = [exchange.end, lambda: exchange.send(b"more")]
        attempts.append(lambda: exchange.respond(200, b""))
        for attempt in attempts:
            try:
                attempt()
            except ClientGone as error:
                seen.append(type(error))

    server, port = await serve(handler)
    line = await Line.open(port)
    await line.send(get("/x"))
    await line.head()
    getattr(line, how)()
    await asyncio.wait_for(gone.wait(), 2)
    await asyncio.sleep(0.01)
    assert seen == [ClientGone]
    assert not server.connections and not server.working


async def test_a_reader_that_does_not_read_makes_the_writer_wait(serve: Serve) -> None:
    """Back-pressure: of an endless stream only the kernel's buffers and 64 KiB are ever in the air."""
    written = 0
    ended = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        nonlocal written
        exchange.start_stream(b"")
        try:
            while True:
                exchange.send(b"x" * 10_000)
                written += 10_000
                if exchange.must_drain:
                    await exchange.drain()
                else:
                    await asyncio.sleep(0)
        except ClientGone:
            ended.set()

    _, port = await serve(handler, write_timeout_s=1.5)
    line = await Line.open(port, receive_buffer=4096)
    await line.send(get("/x"))
    await asyncio.sleep(0.4)
    before = written
    await asyncio.sleep(0.4)
    assert written == before, "it goes on writing"
    assert written < 8 * MIB
    await line.reader.read(1000)
    await asyncio.wait_for(ended.wait(), 10)  # the write timeout
    line.close()


async def test_a_slow_reader_gets_everything(serve: Serve) -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.start_stream(b"")
        for n in range(2000):
            exchange.send(b"%08d" % n * 500)
            if exchange.must_drain:
                await exchange.drain()
        exchange.end()

    _, port = await serve(handler)
    line = await Line.open(port, receive_buffer=4096)
    await line.send(get("/x"))
    await asyncio.sleep(0.2)
    answer = await line.answer(within_s=20)
    assert answer.body == b"".join(b"%08d" % n * 500 for n in range(2000))
    line.close()


@pytest.mark.slow
async def test_slowloris(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that comes a byte at a time has a deadline from its first byte, however busy it looks."""
    monkeypatch.setattr(http_module, "HEAD_TIMEOUT_S", 1.0)
    monkeypatch.setattr(http_module, "BODY_TIMEOUT_S", 1.0)
    monkeypatch.setattr(http_module, "KEEP_ALIVE_S", 2.0)
    server, port = await serve()

    async def drip(head: bytes) -> float:
        line = await Line.open(port)
        started = asyncio.get_running_loop().time()
        await line.send(head)
        ended = asyncio.create_task(line.ended())
        while not ended.done():
            if head:
                line.writer.write(b"\n" if head == b"\r\n" else b"a")
            await asyncio.sleep(0.1)
        return asyncio.get_running_loop().time() - started

    silent_body = b"POST / HTTP/1.1\r\ncontent-length: 100\r\n\r\nabc"

    async def silence(start: bytes) -> float:
        line = await Line.open(port)
        started = asyncio.get_running_loop().time()
        await line.send(start)
        await line.ended()
        return asyncio.get_running_loop().time() - started

    took = await asyncio.gather(
        drip(b"GET / HTTP/1.1\r\nx: "), silence(silent_body), silence(b""), silence(b"G"), drip(b"\r\n")
    )
    assert all(seconds < 4.5 for seconds in took), took
    assert not server.connections


@pytest.mark.slow
async def test_a_slow_body_may_take_its_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "BODY_TIMEOUT_S", 1.5)
    _, port = await serve()
    line = await Line.open(port)
    await line.send(post("/x", b"")[:-2].replace(b"length: 0", b"length: 10") + b"\r\n")
    for _ in range(10):
        await asyncio.sleep(0.3)
        await line.send(b"a")
    assert (await line.answer()).body.endswith(b"a" * 10)
    line.close()


async def test_stopping_lets_the_open_request_finish_and_takes_no_new_one(serve: Serve) -> None:
    server, port = await serve()
    idle, busy = await Line.open(port), await Line.open(port)
    await idle.send(get("/x"))
    await idle.answer()
    await busy.send(get("/slow"))
    await asyncio.sleep(0.03)
    stopping = asyncio.create_task(server.stop(5.0))
    assert (await busy.answer()).body == b"slow"
    assert await busy.ended() == b"" and await idle.ended() == b""
    assert await stopping
    with pytest.raises(OSError):
        await Line.open(port)


def parts_of(data: bytes, chance: random.Random) -> list[bytes]:
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(6)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@pytest.mark.parametrize("seed", range(10))
async def test_any_split_of_any_pipeline_gives_the_same_answers(serve: Serve, seed: int) -> None:
    _, port = await serve()
    chance = random.Random(seed)
    bodies = [chance.randbytes(chance.choice([0, 1, 10, 100, 5000])) for _ in range(10)]
    requests = b""
    for body in bodies:
        if chance.random() < 0.5:
            pieces = [piece for piece in parts_of(body, chance) if piece]
            requests += CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
        else:
            requests += post("/x", body)
    line = await Line.open(port)
    for piece in parts_of(requests, chance):
        await line.send(piece)
        await asyncio.sleep(0.002)
    for body in bodies:
        assert (await line.answer()).body == b"POST /x auth=- %d\n%b" % (len(body), body)
    line.close()


pieces = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [
                b"GET / HTTP/1.1\r\n",
                b"POST /x HTTP/1.1\r\n",
                b"HTTP/1.1",
                b"host: t\r\n",
                b"content-length: 5\r\n",
                b"content-length: 0\r\n",
                b"transfer-encoding: chunked\r\n",
                b"connection: close\r\n",
                b"connection: upgrade\r\nupgrade: h2c\r\n",
                b"expect: 100-continue\r\n",
                b"\r\n",
                b"\r\n\r\n",
                b"5\r\nhello\r\n",
                b"0\r\n\r\n",
                b"hello",
            ]
        ),
    ),
    max_size=14,
)


@examples(1.5)
@given(pieces)
async def test_whatever_is_sent_the_server_stays_up(serve: Serve, sent: list[bytes]) -> None:
    """No exception, no hanging connection, only 200s and 4xx, and the next client is served."""
    failures: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    server, port = await serve()
    line = await Line.open(port)
    for piece in sent:
        line.writer.write(piece)
        await asyncio.sleep(0)
    line.writer.write_eof()
    said = await line.ended()
    for status in re.findall(rb"HTTP/1\.1 (\d+) [A-Z][\w ]+\r\n(?:date|\r)", said):
        assert status in (b"200", b"100", b"400", b"413", b"431"), said
    assert (await send(port, get("/alive"))).status == 200
    await asyncio.sleep(0)
    assert not failures, failures
    await server.stop(1.0)
    assert not server.working
