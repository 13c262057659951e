"""What engines do to the gateway, to the byte: each ends in one record and in an answer that says what happened."""

import asyncio
import json
from contextlib import suppress

import pytest

from tests.support.data_plane import Start
from tests.support.upstream import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    UNFRAMED_HEAD,
    Asked,
    Caller,
    completion,
    finish,
    role,
    usage,
    usage_object,
    word,
)
from tidemill.http.client import EngineConnection

STREAM = (role(), word("one "), word("two"), finish(), usage(7, 3, 2), DONE)


async def good_stream(asked: Asked, caller: Caller) -> None:
    await caller.stream(*STREAM)


async def test_a_stream_passes_and_is_counted(start: Start) -> None:
    plane, upstream = await start(good_stream)
    answer = await plane.ask(stream=True, temperature=0.5)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text == "one two"
    assert not any("usage" in chunk for chunk in answer.chunks), "nobody asked for usage"
    asked = upstream.asked[0].json
    assert asked["model"] == "mock-upstream"
    assert asked["temperature"] == 0.5
    assert asked["max_tokens"] == 256
    assert asked["stream_options"] == {"include_usage": True}
    assert b"authorization: bearer upstream-key" in upstream.asked[0].head.lower()
    record = await plane.record()
    assert (record.status, record.prompt, record.cached, record.completion, record.estimated) == ("ok", 7, 2, 3, False)
    assert record.charge == 5 * 1000 + 2 * 250 + 3 * 2000
    assert record.opened.streamed
    assert record.first_token_us


async def test_usage_chunk_only_for_who_asks(start: Start) -> None:
    plane, _ = await start(good_stream)
    answer = await plane.ask(stream=True, stream_options={"include_usage": True})
    assert answer.chunks[-1]["usage"] == usage_object(7, 3, 2)
    assert answer.chunks[-1]["choices"] == []


async def test_a_whole_answer(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        assert "stream_options" not in asked.json
        await caller.whole(completion(usage=usage_object(9, 4)))

    plane, _ = await start(script)
    answer = await plane.ask(max_tokens=12)
    assert answer.json["choices"][0]["message"]["content"] == "hi"
    record = await plane.record()
    assert (record.status, record.prompt, record.completion, record.opened.streamed) == ("ok", 9, 4, False)


async def test_a_connection_is_used_again(start: Start) -> None:
    plane, upstream = await start(good_stream)
    for _ in range(5):
        assert (await plane.ask(stream=True)).status == 200
    assert upstream.connections == 1


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_kept_connection_that_the_engine_closed_is_replaced_unseen(start: Start, how: str) -> None:
    """Also when the engine closes at the very moment at which the next request is sent."""

    async def script(asked: Asked, caller: Caller) -> None:
        if len(upstream.asked) == 2:  # read the request, say nothing: as if it had never arrived
            getattr(caller, how)()
            return
        await caller.whole(completion(usage=usage_object(1, 1)))

    plane, upstream = await start(script)
    for _ in range(3):
        assert (await plane.ask()).status == 200
    assert upstream.connections == 2
    assert [each.status for each in await plane.settled()] == ["ok"] * 3


async def test_a_fresh_connection_that_closes_is_not_tried_again(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        caller.close()

    plane, upstream = await start(script)
    answer = await plane.ask()
    assert answer.status == 502
    assert answer.error["code"] == "engine_lost"
    assert len(upstream.asked) == 1
    record = await plane.record()
    assert (record.status, record.charge, record.estimated) == ("engine_lost", 0, False)


async def test_an_engine_that_hangs_up_at_once(start: Start) -> None:
    """It accepts and resets before anything is sent, again and again."""
    plane, upstream = await start(good_stream)
    await upstream.stop()

    class Slam(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            transport.abort()  # type: ignore[attr-defined]

    server = await asyncio.get_running_loop().create_server(Slam, "127.0.0.1", upstream.port)
    for stream in (True, False) * 5:
        answer = await plane.ask(stream=stream)
        assert answer.status in (502, 503) and answer.error["code"] in ("engine_lost", "unavailable")
    server.close()
    assert all(each.charge == 0 for each in await plane.settled())
    await upstream.start()


async def test_a_connection_that_is_lost_before_it_is_used(start: Start) -> None:
    plane, _ = await start(good_stream)
    pool = plane.routes.by_name["mock"].replicas[0].pool
    connect = pool.connect

    async def connect_and_lose() -> EngineConnection:
        connection = await connect()
        connection.connection_lost(ConnectionResetError())
        return connection

    pool.connect = connect_and_lose  # type: ignore[method-assign]
    answer = await plane.ask()
    assert answer.status == 502 and answer.error["code"] == "engine_lost"
    assert (await plane.record()).charge == 0


async def test_an_engine_that_is_not_there(start: Start) -> None:
    plane, upstream = await start(good_stream)
    await upstream.stop()
    answer = await plane.ask(stream=True)
    assert answer.status == 503
    assert answer.headers["retry-after"] == "1"
    assert "try again" in answer.error["message"].lower()
    assert (await plane.record()).charge == 0
    await upstream.start()


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"]
)
async def test_interim_answers_are_passed_over(start: Start, interim: bytes) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(interim)
        await asyncio.sleep(0.02)
        await caller.send(interim)
        await caller.stream(*STREAM)

    plane, upstream = await start(script)
    for _ in range(2):
        assert (await plane.ask(stream=True)).text == "one two"
    assert upstream.connections == 1


async def test_an_engine_that_changes_protocols(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        await caller.hangs_up()

    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    plane, _ = await start(script)
    assert (await plane.ask()).status == 502
    assert (await plane.record()).charge == 0
    assert not complaints


async def test_a_body_that_ends_with_the_connection(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(UNFRAMED_HEAD + b"".join(STREAM))
        caller.close()

    plane, upstream = await start(script)
    for _ in range(2):
        assert (await plane.ask(stream=True)).text == "one two"
    assert upstream.connections == 2
    assert [(each.status, each.completion) for each in await plane.settled()] == [("ok", 3)] * 2


async def test_a_whole_answer_that_ends_with_the_connection(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(b"HTTP/1.1 200 OK\r\n\r\n" + json.dumps(completion(usage=usage_object(2, 3))).encode())
        caller.close()

    plane, _ = await start(script)
    assert (await plane.ask()).json["usage"]["completion_tokens"] == 3
    assert (await plane.record()).completion == 3


@pytest.mark.parametrize(
    "junk",
    [
        b"I am not HTTP\r\n\r\n",
        b"HTTP/1.1 2OO OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(1000)) + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{",
    ],
)
async def test_broken_http(start: Start, junk: bytes) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(junk)
        caller.close()

    plane, _ = await start(script)
    answer = await plane.ask()
    assert answer.status == 502
    assert answer.error["code"] == "engine_lost"
    record = await plane.record()
    assert (record.status, record.charge) == ("engine_lost", 0)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_an_engine_that_dies_in_mid_stream(start: Start, how: str) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one "), word("two "), end=False)
        await asyncio.sleep(0.05)
        getattr(caller, how)()

    plane, _ = await start(script)
    answer = await plane.ask(stream=True)
    assert answer.status == 200
    assert answer.chunks[-1]["error"]["code"] == "engine_lost"
    record = await plane.record()
    assert (record.status, record.estimated, record.completion) == ("engine_lost", True, 2)
    assert record.charge


async def test_an_engine_that_falls_silent_in_mid_stream(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one "), end=False)
        await caller.hangs_up()

    plane, _ = await start(script, idle_timeout_seconds=0.2)
    answer = await plane.ask(stream=True)
    assert answer.chunks[-1]["error"]["code"] == "engine_lost"
    assert (await plane.record()).status == "engine_lost"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_never_answers(start: Start, stream: bool) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.hangs_up()

    plane, _ = await start(script, ttft_timeout_seconds=0.2)
    answer = await plane.ask(stream=stream)
    assert answer.status == 502
    record = await plane.record()
    assert (record.status, record.charge) == ("engine_lost", 0)


async def test_a_slow_reader_is_no_silent_engine(start: Start) -> None:
    """The engine waits for the client, not the other way round; it must not be given up for that."""
    big = [word("x" * 1000) for _ in range(8000)]  # 8 MB

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), *big, usage(1, 8000), DONE)

    plane, _ = await start(script, idle_timeout_seconds=0.3)
    line = await plane.line(receive_buffer=4096)
    await line.send(plane.request(stream=True))
    await asyncio.sleep(1.0)
    answer = await line.answer(within_s=30)
    assert len(answer.text) == 8_000_000
    line.close()
    assert (await plane.record()).status == "ok"


async def test_every_byte_alone(start: Start) -> None:
    """Boundaries inside characters, inside SSE lines, inside chunk heads."""
    text = ["Grüße, ", "東京 ", "🌊🌊", " \u2028 end"]
    events = [role(), *(word(each) for each in text), finish(), usage(5, 6), DONE]
    body = STREAM_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in events) + LAST_CHUNK

    async def script(asked: Asked, caller: Caller) -> None:
        for at in range(len(body)):
            await caller.send(body[at : at + 1])
            await asyncio.sleep(0)

    plane, _ = await start(script)
    assert (await plane.ask(stream=True)).text == "".join(text)
    record = await plane.record()
    assert (record.status, record.completion, record.estimated) == ("ok", 6, False)


async def test_raw_utf8_cut_in_the_middle_of_a_character(start: Start) -> None:
    raw = 'data: {"choices":[{"index":0,"delta":{"content":"東京🌊"}}]}\n\n'.encode()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for at in range(0, len(raw), 5):
            await caller.chunk(raw[at : at + 5])
            await asyncio.sleep(0.001)
        await caller.chunk(usage(1, 1) + DONE)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script)
    assert (await plane.ask(stream=True)).text == "東京🌊"


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
async def test_other_line_ends(start: Start, line_end: bytes) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*(each.replace(b"\n", line_end) for each in STREAM))

    plane, _ = await start(script)
    answer = await plane.ask(stream=True)
    assert answer.text == "one two"
    assert b"\r" not in answer.body
    assert (await plane.record()).completion == 3


async def test_a_stream_without_done(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*STREAM[:-1])

    plane, _ = await start(script)
    assert (await plane.ask(stream=True)).text == "one two"
    record = await plane.record()
    assert (record.status, record.completion, record.estimated) == ("ok", 3, False)


async def test_a_stream_without_usage_is_estimated(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), *(word(" word") for _ in range(20)), finish(), DONE)

    plane, _ = await start(script)
    assert (await plane.ask(stream=True)).text == " word" * 20
    record = await plane.record()
    assert (record.status, record.estimated) == ("ok", True)
    assert 20 <= record.completion <= 22
    assert record.prompt > 0


async def test_comments_are_not_billed(start: Start) -> None:
    """Some upstreams send a comment a second while a request waits."""

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*[b": PROCESSING\n\n"] * 50, role(), word("one "), word("two"), finish(), DONE)

    plane, _ = await start(script)
    await plane.ask(stream=True)
    record = await plane.record()
    assert record.estimated
    assert record.completion <= 4


async def test_comments_are_not_an_answer(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*[b": PROCESSING\n\n"] * 5, end=False)
        caller.close()

    plane, _ = await start(script)
    await plane.ask(stream=True)
    record = await plane.record()
    assert (record.status, record.charge, record.first_token_us) == ("engine_lost", 0, 0)


async def test_usage_on_the_last_content_chunk(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one "), finish(usage=usage_object(5, 2)), DONE)

    plane, _ = await start(script)
    answer = await plane.ask(stream=True)
    assert answer.chunks[-1]["choices"][0]["finish_reason"] == "stop"
    record = await plane.record()
    assert (record.prompt, record.completion, record.estimated) == (5, 2, False)


async def test_usage_of_null_until_the_end(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(
            role(), word("one ", usage=None), word("two", usage=None), finish(usage=None), usage(5, 2), DONE
        )

    plane, _ = await start(script)
    assert (await plane.ask(stream=True)).text == "one two"
    assert (await plane.record()).completion == 2


async def test_an_error_event_in_mid_stream(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        error = b'data: {"error":{"message":"out of memory","type":"server_error","param":null,"code":500}}\n\n'
        await caller.stream(role(), word("one "), error, DONE)

    plane, _ = await start(script)
    answer = await plane.ask(stream=True)
    assert answer.chunks[-1]["error"]["message"] == "out of memory"
    assert (await plane.record()).status == "engine_lost"


@pytest.mark.parametrize(
    ("status", "seen", "code"),
    [
        (429, 429, None),
        (503, 503, None),
        (500, 502, "engine_error"),
        (401, 502, "engine_error"),
        (403, 502, "engine_error"),
    ]
    + [(400, 400, None), (404, 404, None), (422, 422, None), (204, 502, None), (301, 502, None)],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_refuses(start: Start, status: int, seen: int, code: str | None, stream: bool) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        body = {"error": {"message": "Secret stack trace", "type": "whatever", "param": None, "code": status}}
        await caller.whole(b"" if status == 204 else json.dumps(body).encode(), status)

    plane, upstream = await start(script)
    for _ in range(2):
        answer = await plane.ask(stream=stream)
        assert answer.status == seen
        if code:
            assert answer.error["code"] == code
        if status >= 500 and status != 503:
            assert "Secret" not in answer.error["message"], "what a broken engine says of itself is not for tenants"
        if seen in (429, 503):
            assert answer.headers["retry-after"]
    assert upstream.connections == 1
    assert {(each.status, each.charge) for each in await plane.settled()} == {("engine_error", 0)}


async def test_an_upstream_of_another_account_that_refuses_the_key(start: Start) -> None:
    """Our key at the upstream is none of the tenant's business: neither a 401 nor its text."""

    async def script(asked: Asked, caller: Caller) -> None:
        body = {"error": {"message": "Incorrect API key provided: upstream-key", "code": "invalid_api_key"}}
        await caller.whole(json.dumps(body).encode(), 401)

    plane, _ = await start(script)
    answer = await plane.ask()
    assert answer.status == 502
    assert "upstream-key" not in answer.error["message"]


@pytest.mark.parametrize("endless", [b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 ", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_a_head_that_never_ends(start: Start, endless: bytes) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(endless)
        with suppress(ConnectionError):
            while True:
                await caller.send(endless * 100 if endless.endswith(b"\n\r\n") else b"x" * 4096)
                await asyncio.sleep(0)

    plane, _ = await start(script)
    assert (await plane.ask()).status == 502
    assert (await plane.record()).charge == 0


async def test_a_huge_answer_of_an_error_page(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole(b"x" * 3_000_000, 500)

    plane, _ = await start(script)
    assert (await plane.ask()).status == 502
    assert (await plane.record()).charge == 0


@pytest.mark.parametrize("bad", [-5, 2**40, 10**30])
async def test_absurd_usage_is_not_believed(start: Start, bad: int) -> None:
    """It must neither pay the tenant nor take more than the hold."""

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one "), finish(), usage(5, bad, bad), DONE)

    plane, _ = await start(script)
    assert (await plane.ask(stream=True)).status == 200
    record = await plane.record()
    assert 0 <= record.charge <= record.hold


async def test_the_limit_goes_into_the_clients_own_field(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole(completion(usage=usage_object(1, 1)))

    plane, upstream = await start(script)
    await plane.ask(max_completion_tokens=11)
    assert upstream.asked[-1].json["max_completion_tokens"] == 11
    assert "max_tokens" not in upstream.asked[-1].json
    await plane.ask(max_completion_tokens=11, max_tokens=100_000)
    assert upstream.asked[-1].json["max_completion_tokens"] == 11
    assert upstream.asked[-1].json.get("max_tokens", 0) <= 11, "two limits, and the hold covers only one"
    await plane.ask(max_tokens=12, n_predict=100_000, n_cmpl=50)
    assert "n_predict" not in upstream.asked[-1].json, "llama.cpp takes it before max_tokens"
    assert "n_cmpl" not in upstream.asked[-1].json, "llama.cpp takes it before n"


# llama.cpp, whose stream is put together for a client that wants the whole


def counted(text: str, predicted: int) -> bytes:
    """A chunk as llama.cpp sends it, its running counts last."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"choices": [choice], "id": "c1", "object": "chat.completion.chunk"}
    timings = {"cache_n": 2, "prompt_n": 7, "predicted_n": predicted}
    return b"data: " + json.dumps({**chunk, "timings": timings}, separators=(",", ":")).encode() + b"\n\n"


OUR_OWN = {"engine": "llamacpp", "owned": True}


async def test_a_stream_put_together(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        assert asked.json["stream"] is True
        await caller.stream(counted("one ", 1), counted("two", 2), finish(), DONE)

    plane, _ = await start(script, **OUR_OWN)
    answer = await plane.ask()
    assert answer.json["choices"][0]["message"] == {"role": "assistant", "content": "one two"}
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (9, 2, 11)
    record = await plane.record()
    assert (record.status, record.prompt, record.cached, record.completion) == ("ok", 9, 2, 2)
    assert not record.estimated


ERROR = b'data: {"error":{"code":500,"message":"Compute error.","type":"server_error"}}\n\n'


@pytest.mark.parametrize("end", ["close", "reset", "error", "garbage"])
async def test_a_stream_that_cannot_be_put_together_costs_nothing(start: Start, end: str) -> None:
    """The client gets an error and not a word, so it pays for none."""

    async def script(asked: Asked, caller: Caller) -> None:
        last = {"error": (ERROR, DONE), "garbage": (b"data: {\n\n", DONE)}.get(end, ())
        await caller.stream(counted("one ", 1), counted("two ", 2), *last, end=bool(last))
        if not last:
            await asyncio.sleep(0.05)
            getattr(caller, end)()

    plane, _ = await start(script, **OUR_OWN)
    answer = await plane.ask()
    assert answer.status == 502 and answer.error["code"] == "engine_lost"
    record = await plane.record()
    assert (record.status, record.completion, record.charge) == ("engine_lost", 0, 0)


@pytest.mark.parametrize("end", ["close", "error"])
async def test_a_stream_of_our_own_engine_that_breaks_off_is_billed_as_far_as_it_came(start: Start, end: str) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(counted("one ", 1), counted("two ", 2), end=False)
        await asyncio.sleep(0.05)
        if end == "error":
            await caller.chunk(ERROR + DONE)
            await caller.send(LAST_CHUNK)
        else:
            caller.close()

    plane, _ = await start(script, **OUR_OWN)
    answer = await plane.ask(stream=True)
    assert "error" in answer.chunks[-1]
    record = await plane.record()
    assert (record.status, record.prompt, record.completion) == ("engine_lost", 9, 2)
    assert not record.estimated
