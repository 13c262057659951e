"""Requests that cannot be taken: each a 4xx in OpenAI's shape that says what to do. Never a 5xx, never a hold."""

import asyncio
import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.data_plane import Start
from tests.support.examples import examples
from tests.support.plane import CHAT, MAX_BODY_BYTES, Plane
from tests.support.upstream import Asked, Caller, completion, usage_object
from tests.support.wire import Line, get, post
from tidemill.gateway.auth import authenticator as authenticator
from tidemill.gateway.auth.snapshot import AccessSnapshot, key_digest, read_snapshot
from tidemill.store.engine import Store
from tidemill.store.keys import create_key, revoke_key

MESSAGES = [{"role": "user", "content": "hi"}]
PATHS = (CHAT, "/v1/completions", "/v1/embeddings")


async def polite(asked: Asked, caller: Caller) -> None:
    await caller.whole(completion(usage=usage_object(1, 1)))


async def refused(plane: Plane, data: bytes, status: int, *words: str, param: str | None = None) -> dict[str, Any]:
    answer = await plane.send(data)
    assert answer.status == status, answer.body
    error = answer.error
    for each in words:
        assert each in error["message"], error
    assert error["param"] == param
    assert error["type"] == ("authentication_error" if status == 401 else "invalid_request_error")
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": -1}, "max_tokens", ("-1", "from 1")),
        ({"max_tokens": 0}, "max_tokens", ("0", "from 1")),
        ({"max_tokens": "x"}, "max_tokens", ("integer",)),
        ({"max_tokens": True}, "max_tokens", ("integer",)),
        ({"max_tokens": 1.5}, "max_tokens", ("integer",)),
        ({"max_tokens": [1]}, "max_tokens", ("integer",)),
        ({"max_tokens": 2**40}, "max_tokens", ("from 1",)),
        ({"max_tokens": 10**400}, "max_tokens", ("max_tokens",)),
        ({"max_completion_tokens": 0}, "max_completion_tokens", ("from 1",)),
        ({"n": 0}, "n", ("from 1",)),
        ({"n": 129}, "n", ("128",)),
        ({"n": "2"}, "n", ("integer",)),
        ({"stream": "yes"}, "stream", ("true or false",)),
        ({"stream": 1}, "stream", ("true or false",)),
        ({"stream_options": {"include_usage": True}}, "stream_options", ('"stream": true',)),
        ({"stream": True, "stream_options": []}, "stream_options", ("object",)),
        ({"stream": True, "stream_options": {"include_usage": "x"}}, "include_usage", ("true or false",)),
        ({"messages": []}, "messages", ("at least one",)),
        ({"messages": "hi"}, "messages", ("list",)),
        ({"messages": None}, "messages", ("list",)),
        ({"messages": {}}, "messages", ("list",)),
        ({"model": 5}, "model", ("string",)),
        ({"model": ""}, "model", ("string",)),
        ({"model": None}, "model", ("string",)),
        ({"model": "x" * 5000}, "model", ("string",)),
    ],
)
async def test_a_field_that_is_wrong(start: Start, fields: dict[str, Any], param: str, words: tuple[str, ...]) -> None:
    plane, upstream = await start(polite)
    data = post(CHAT, {"model": "mock", "messages": MESSAGES, **fields}, plane.key)
    await refused(plane, data, 400, *words, param=param)
    assert not upstream.asked and not await plane.settled()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "mock", "messages": [}',
        b'{"model": "mock",}',
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"\xff\xfe{}",
        b'{"model": "\xff", "messages": [1]}',
        b'{"model": "\\ud800", "messages": [1]}',
        b'{"model": "mock", "messages": [1], "max_tokens": 1e999}',
        b'{"model": "mock", "messages": [1], "n": NaN}',
        b'{"\xff": 1}',
        b'{"model": "mock", "messages": [1], "stream": true, "stream_options": {"\\ud800": 1}}',
        b'{"model": "mock", "messages": [1], "stream": true, "stream_options": {"include_usage": 1e999}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "mock", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\0" * 100,
    ],
    ids=range(20),
)
@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_is_no_request(start: Start, body: bytes, path: str) -> None:
    plane, upstream = await start(polite)
    answer = await plane.send(post(path, body, plane.key))
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert not upstream.asked


async def test_a_field_that_is_missing(start: Start) -> None:
    plane, _ = await start(polite)
    await refused(plane, post(CHAT, {"messages": MESSAGES}, plane.key), 400, "missing", "/v1/models", param="model")
    await refused(plane, post(CHAT, {"model": "mock"}, plane.key), 400, "missing", param="messages")
    await refused(plane, post("/v1/completions", {"model": "mock"}, plane.key), 400, "missing", param="prompt")
    await refused(plane, post("/v1/embeddings", {"model": "mock"}, plane.key), 400, "missing", param="input")


async def test_an_unknown_model_and_the_nearest_name(start: Start) -> None:
    plane, _ = await start(polite, name="smollm2-135m-instruct")
    data = post(CHAT, {"model": "smolm2-135m-instruct", "messages": MESSAGES}, plane.key)
    error = await refused(
        plane, data, 404, "smolm2-135m-instruct", "Did you mean 'smollm2-135m-instruct'?", param="model"
    )
    assert error["code"] == "model_not_found"
    data = post(CHAT, {"model": "gpt-4o", "messages": MESSAGES}, plane.key)
    await refused(plane, data, 404, "/v1/models", param="model")


@pytest.mark.parametrize(
    "authorization",
    [
        b"",
        b"authorization: Bearer sk-tm-wrong\r\n",
        b"authorization: Bearer\r\n",
        b"authorization: Bearer \r\n",
        b"authorization: Basic dXNlcjpwYXNz\r\n",
        b"authorization: sk-tm-wrong\r\n",
        b"authorization: Bearer \xff\xfe\r\n",
        b"authorization: Bearer " + b"x" * 20_000 + b"\r\n",
    ],
    ids=range(8),
)
async def test_a_bad_key(start: Start, authorization: bytes) -> None:
    plane, _ = await start(polite)
    for path in PATHS:
        data = post(path, {"model": "mock", "messages": MESSAGES}, headers=authorization)
        error = await refused(plane, data, 401)
        assert error["code"] == "invalid_api_key"
    answer = await plane.send(b"GET /v1/models HTTP/1.1\r\nhost: t\r\n" + authorization + b"\r\n")
    assert answer.status == 401


async def test_a_key_works_from_the_moment_it_is_made_until_it_is_revoked(start: Start) -> None:
    plane, _ = await start(polite)
    for _ in range(10):  # at any moment within the door's own renewals
        with plane.store.write() as connection:
            key, secret = create_key(connection, tenant_id=plane.tenant_id, name="new", now=datetime.now(UTC))
        await plane.authenticator.renew()  # what `announce` has the gateways do
        data = post(CHAT, {"model": "mock", "messages": MESSAGES}, secret)
        assert (await plane.send(data)).status == 200
        with plane.store.write() as connection:
            revoke_key(connection, key=key.key_id, now=datetime.now(UTC))
        await plane.authenticator.renew()
        await refused(plane, data, 401, "revoked")


async def test_a_renewal_that_began_before_is_not_enough(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """`key create` must not return while a gateway joins a look that was taken a moment earlier."""
    plane, _ = await start(polite)
    looked, go_on = threading.Event(), threading.Event()

    def look_slowly(store: Store, known: int) -> AccessSnapshot | None:
        seen = read_snapshot(store, known)
        looked.set()
        go_on.wait(5)
        return seen

    monkeypatch.setattr(authenticator, "read_snapshot", look_slowly)
    first = asyncio.create_task(plane.authenticator.renew())
    await asyncio.to_thread(looked.wait, 5)
    with plane.store.write() as connection:
        _, secret = create_key(connection, tenant_id=plane.tenant_id, name="new", now=datetime.now(UTC))
    second = asyncio.create_task(plane.authenticator.renew())
    await asyncio.sleep(0.01)
    go_on.set()
    await asyncio.gather(first, second)
    assert key_digest(secret.encode()) in plane.authenticator.snapshot.keys


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(start: Start, chunked: bool) -> None:
    """Every byte is sent before the answer is read, as most clients do."""
    plane, _ = await start(polite)
    line = await plane.line()
    piece = b"x" * 65536
    size = MAX_BODY_BYTES * 10
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % size
    key = b"authorization: Bearer " + plane.key.encode()  # without one, 401 comes before the body is looked at
    await line.send(b"POST %b HTTP/1.1\r\nhost: t\r\n%b\r\n%b\r\n\r\n" % (CHAT.encode(), key, framing))
    for _ in range(size // len(piece)):
        await line.send(b"10000\r\n%b\r\n" % piece if chunked else piece)
    answer = await line.answer()
    assert answer.status == 413
    assert answer.error["code"] == "request_too_large"
    assert "2 MiB" in answer.error["message"]
    line.close()


async def test_a_large_prompt_passes_and_the_connection_stays(start: Start) -> None:
    plane, upstream = await start(polite)
    data = post(CHAT, {"model": "mock", "messages": [{"role": "user", "content": "word " * 200_000}]}, plane.key)
    line = await plane.line()
    for _ in range(3):
        await line.send(data)
        assert (await line.answer()).status == 200
    assert len(upstream.asked[0].body) > 1_000_000
    line.close()


async def test_other_paths_and_methods(start: Start) -> None:
    plane, _ = await start(polite)
    await refused(plane, get("/v1/chat/completion", plane.key), 404, "/v1/chat/completion", "GET /")
    await refused(plane, get(CHAT, plane.key), 405, "GET")
    answer = await plane.send(get(CHAT))
    assert answer.headers["allow"] == "POST"
    answer = await plane.send(post("/v1/models", b""))
    assert answer.status == 405 and answer.headers["allow"] == "GET"
    await refused(plane, get("/v1/models/nope", plane.key), 404, "nope", param="model")
    assert (await plane.send(get("/v1/models/mock", plane.key))).json["id"] == "mock"
    assert (await plane.send(get("/v1/models", plane.key))).json["data"][0]["id"] == "mock"
    assert (await plane.send(get("/healthz"))).status == 200
    assert (await plane.send(get("/readyz"))).json["models"] == {"mock": "ready"}
    for odd in (b"GET /%ff%00%2e HTTP/1.1\r\nhost: t\r\n\r\n", "GET /\u6771 HTTP/1.1\r\nhost: t\r\n\r\n".encode()):
        assert (await plane.send(odd)).status in (400, 404)


async def test_holds_cover_every_prompt_of_a_request(start: Start) -> None:
    """Several prompts may each fill the context."""

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"object": "list", "data": [], "usage": {"prompt_tokens": 4000, "total_tokens": 4000}})

    plane, _ = await start(script, context=100)
    inputs = ["word " * 99] * 40
    answer = await plane.send(post("/v1/embeddings", {"model": "mock", "input": inputs}, plane.key))
    assert answer.status == 200
    record = await plane.record()
    assert (record.prompt, record.uncollected) == (4000, 0)


async def test_a_model_without_embeddings_says_so_and_its_engine_is_not_asked(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        raise AssertionError("the engine is asked")

    plane, _ = await start(script, embeds=False)
    answer = await plane.send(post("/v1/embeddings", {"model": "mock", "input": "x"}, plane.key))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "model_gives_no_embeddings", "model")
    assert answer.error["message"].startswith("The model 'mock' does not support embeddings.")


async def test_an_input_that_llamacpp_finds_too_long_is_told_without_its_advice_to_operators(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        message = (
            "input (701 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
        )
        await caller.whole({"error": {"code": 500, "message": message, "type": "server_error"}}, 500)

    plane, _ = await start(script)
    answer = await plane.send(post("/v1/embeddings", {"model": "mock", "input": "x"}, plane.key))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert answer.error["message"].startswith("Input (701 tokens) is longer than 'mock' takes. Shorten")
    assert "batch size" not in answer.error["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "model",
    "messages",
    "prompt",
    "input",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "n",
]
FIELDS += ["best_of", "stop", "tools", "response_format", "logprobs", "seed"]
requests = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6)
bodies = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda value: json.dumps(value).encode()),
    requests.map(
        lambda value: json.dumps({"model": "mock", "messages": [1], "prompt": "x", "input": "x", **value}).encode()
    ),
    st.tuples(requests, st.integers(0, 80), st.binary(min_size=1, max_size=3)).map(
        lambda part: (
            (text := json.dumps({"model": "mock", "messages": [1], **part[0]}).encode())[: part[1]]
            + part[2]
            + text[part[1] :]
        )
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
async def test_no_body_breaks_the_gateway(start: Start, path: str) -> None:
    """Arbitrary bytes and JSON: no 5xx, no record without an answer, no hold left."""
    plane, upstream = await start(polite)
    line = await plane.line()
    loop = asyncio.get_running_loop()

    @examples(2.5)
    @given(bodies)
    def throw(body: bytes) -> None:
        answer = asyncio.run_coroutine_threadsafe(one(line, body), loop).result(20)
        assert answer.status == 200 or 400 <= answer.status < 500, (body, answer)
        if answer.status != 200:
            assert answer.error

    async def one(line: Line, body: bytes) -> Any:
        await line.send(post(path, body, plane.key))
        return await line.answer()

    await asyncio.to_thread(throw)
    records = await plane.settled()
    assert len(records) == len(upstream.asked)
    line.close()
