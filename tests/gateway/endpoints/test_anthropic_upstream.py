"""An upstream that speaks Anthropic's API: official clients of three APIs in front, its written contract behind."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anthropic
import pytest
import pytest_asyncio

from tests.gateway.clients import anthropic as anthropic_client
from tests.gateway.clients import openai as openai_client
from tests.support.data_plane import Start
from tests.support.fleet import Fleet, models
from tests.support.paths import ANTHROPIC_CONTRACTS
from tests.support.plane import Plane, model
from tests.support.upstream import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Asked,
    Caller,
    completion,
    event,
    finish,
    role,
    usage,
    usage_object,
    word,
)
from tests.support.wire import Answer, post
from tidemill.ledger.pricing import Price
from tidemill.store.prices import set_price

THEIRS = "claude-sonnet-4-5-20250929"
ASK: dict[str, Any] = {"model": "mock", "max_tokens": 200, "messages": [{"role": "user", "content": "one two three"}]}
CHAT: Any = {"model": "mock", "messages": ASK["messages"]}
EXPECTED: dict[str, dict[str, Any]] = json.loads((ANTHROPIC_CONTRACTS / "expected.json").read_bytes())
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, stack)


def contract(name: str) -> bytes:
    return (ANTHROPIC_CONTRACTS / name).read_bytes()


async def play(caller: Caller, stream: bytes, size: int = 0) -> None:
    """A stream in chunks of so many bytes, else an event a chunk."""
    events = [each + b"\n\n" for each in stream.split(b"\n\n") if each]
    await caller.stream(*([stream[at : at + size] for at in range(0, len(stream), size)] if size else events))


def upstream_of(stream: str = "text.sse", message: str = "message.json", size: int = 0) -> Any:
    """An upstream that answers as the contract says."""

    async def script(asked: Asked, caller: Caller) -> None:
        assert b"POST /v1/messages " in asked.head
        if asked.json.get("stream"):
            await play(caller, contract(stream), size)
        else:
            await caller.whole(contract(message))

    return script


async def raw(plane: Plane, key: str | None = None, headers: bytes = b"", **fields: Any) -> Answer:
    return await plane.send(post("/v1/messages", {**ASK, **fields}, key or plane.key, headers))


async def gone(plane: Plane) -> None:
    """Wait until the gateway has seen that its clients have left."""
    async with asyncio.timeout(10.0):
        while plane.server.connections:
            await asyncio.sleep(0.01)


async def counted_as(plane: Plane, name: str) -> None:
    """Each record has the contract's counts."""
    told = EXPECTED[name]
    for record in await plane.settled():
        assert (record.prompt, record.cached, record.completion) == (told["prompt"], told["cached"], told["completion"])
        assert (record.status, record.estimated) == ("ok", False)


# Messages in, Messages out


@pytest.mark.parametrize("size", [0, 1, 7, 100, 10_000])
@pytest.mark.parametrize("name", ["text.sse", "thinking_and_tools.sse", "refusal.sse"])
async def test_a_stream_passes_byte_for_byte_and_is_billed(start: Start, name: str, size: int) -> None:
    plane, upstream = await start(upstream_of(name, size=size), engine="anthropic", name=THEIRS, upstream_model=THEIRS)
    answer = await raw(plane, model=THEIRS, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body == contract(name)
    await counted_as(plane, name)
    assert upstream.asked[0].json == {**ASK, "model": THEIRS, "stream": True}


async def test_a_whole_answer_passes_byte_for_byte_and_is_billed(start: Start) -> None:
    plane, _ = await start(upstream_of(), engine="anthropic", name=THEIRS, upstream_model=THEIRS)
    answer = await raw(plane, model=THEIRS)
    assert answer.body == contract("message.json")
    await counted_as(plane, "message.json")


async def test_the_model_has_the_name_that_it_was_asked_for_by(start: Start) -> None:
    plane, _ = await start(upstream_of("thinking_and_tools.sse", "tool_message.json", 50), engine="anthropic")
    theirs, ours = b'"model":"%b"' % THEIRS.encode(), b'"model":"mock"'
    assert (await raw(plane, stream=True)).body == contract("thinking_and_tools.sse").replace(theirs, ours, 1)
    theirs, ours = theirs.replace(b":", b": "), ours.replace(b":", b": ")
    assert contract("tool_message.json").count(theirs) == 2  # once among a tool's arguments
    assert (await raw(plane)).body == contract("tool_message.json").replace(theirs, ours, 1)
    assert len(await plane.settled()) == 2


async def test_a_request_passes_as_it_is_with_the_operators_key(start: Start) -> None:
    plane, upstream = await start(upstream_of(), engine="anthropic")
    body = (
        b'{"max_tokens": 200, "model" :"mock",  "messages":[{"role":"user","content":[{"type":"text","text":"\xc3\xa9",\
"cache_control":{"type":"ephemeral"}}]}], "tools":[{"type":"bash_20250124","name":"bash"}], "top_k" : 3}'
    )
    headers = (
        b"anthropic-version: 2023-01-01\r\nanthropic-beta: files-api-2025-04-14, effort-2025-11-24\r\nx-own: 1\r\n"
    )
    answer = await plane.send(post("/v1/messages", body, plane.key, headers))
    assert answer.status == 200
    (asked,) = upstream.asked
    assert asked.body == body.replace(b'"mock"', b'"mock-upstream"')
    head = asked.head.decode().lower().split("\r\n")
    assert "x-api-key: upstream-key" in head and "anthropic-version: 2023-06-01" in head
    assert "anthropic-beta: effort-2025-11-24" in head
    assert not any(line.startswith(("authorization", "x-a:")) for line in head)
    await counted_as(plane, "message.json")


async def test_anthropics_own_client(start: Start) -> None:
    plane, _ = await start(upstream_of("thinking_and_tools.sse"), engine="anthropic")
    client = anthropic_client(plane)
    async with client.messages.stream(**ASK) as stream:
        message = await stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, weather, now = message.content
    assert thinking.type == "thinking" and thinking.signature.startswith("EqQB")
    assert text.type == "text" and text.text == "Okay, let's check."
    assert weather.type == "tool_use" and weather.input == {"location": "San Francisco, CA"}
    assert now.type == "tool_use" and now.input == {}
    assert (message.model, message.stop_reason, message.usage.output_tokens) == ("mock", "tool_use", 89)
    whole = await client.messages.create(**ASK)
    assert whole.usage.cache_creation_input_tokens == 100 and whole.usage.input_tokens == 2095
    assert [(each.prompt, each.cached, each.completion) for each in await plane.settled()] == [
        (472, 0, 89),
        (3195, 1000, 503),
    ]


async def test_counting_is_the_upstreams(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        assert b"POST /v1/messages/count_tokens " in asked.head and b"x-api-key: upstream-key" in asked.head
        assert asked.json == {"model": "mock-upstream", "messages": ASK["messages"], "system": "s"}
        await caller.whole({"input_tokens": 2095})

    plane, _ = await start(script, engine="anthropic")
    counted = await anthropic_client(plane).messages.count_tokens(model="mock", messages=ASK["messages"], system="s")
    assert counted.input_tokens == 2095
    assert await plane.settled() == []


async def test_a_small_balance_limits_the_answer(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        if b"/count_tokens " in asked.head:
            await caller.whole({"input_tokens": 20})
        else:
            stream = contract("refusal.sse").replace(b'"input_tokens":30', b'"input_tokens":13')  # and 7 from the cache
            await play(caller, stream.replace(b'"output_tokens":4', b'"output_tokens":%d' % asked.json["max_tokens"]))

    plane, upstream = await start(script, engine="anthropic", credit="0.0002")
    answer = await raw(plane, stream=True)
    assert b"Your balance is used up" in answer.body and b"message_stop" not in answer.body
    cap = upstream.asked[-1].json["max_tokens"]
    assert 85 <= cap <= 90  # 20 tokens at 1000 nanos, the others at 2000
    record = await plane.record()
    assert (record.status, record.completion, record.uncollected) == ("balance_exhausted", cap, 0)


@pytest.mark.parametrize("chat", [False, True])
async def test_the_pages_of_a_document_are_counted_before_a_balance_pays_for_them(start: Start, chat: bool) -> None:
    """A page of few bytes may have thousands of tokens: its bytes are no bound."""

    async def script(asked: Asked, caller: Caller) -> None:
        assert b"/count_tokens " in asked.head, "the balance does not cover it"
        await caller.whole({"input_tokens": 200_000})

    plane, _ = await start(script, engine="anthropic", credit="0.1")  # 100,000 prompt tokens
    if chat:
        part: Any = {"type": "file", "file": {"file_data": "data:application/pdf;base64,aWE="}}
        answer = await plane.ask(messages=[{"role": "user", "content": [part]}])
    else:
        part = {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}}
        answer = await raw(plane, messages=[{"role": "user", "content": [part]}])
    assert answer.status == 402 and "200000 prompt" in answer.json["error"]["message"]
    assert await plane.settled() == []


async def test_a_client_that_leaves_is_billed_by_what_the_upstream_reports(start: Start) -> None:
    left = asyncio.Event()
    events = [each + b"\n\n" for each in contract("text.sse").split(b"\n\n") if each]

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*events[:5], end=False)
        await left.wait()
        for each in events[5:]:
            await caller.chunk(each)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script, engine="anthropic")
    line = await plane.line()
    await line.send(post("/v1/messages", {**ASK, "stream": True}, plane.key))
    await line.reader.readuntil(b"The tide is")
    line.close()
    await gone(plane)
    left.set()
    record = await plane.record()
    assert (record.status, record.estimated) == ("client_closed", False)
    assert (record.prompt, record.cached, record.completion) == (2145, 2000, 15)


async def test_an_upstream_that_dies_is_billed_for_what_has_passed(start: Start) -> None:
    events = [each + b"\n\n" for each in contract("text.sse").split(b"\n\n") if each]

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*events[:6], end=False)
        caller.close()

    plane, _ = await start(script, engine="anthropic")
    with pytest.raises(anthropic.APIStatusError) as failed:
        async with anthropic_client(plane).messages.stream(**ASK) as stream:
            await stream.get_final_message()
    body: Any = failed.value.body
    assert body["error"]["type"] == "api_error"
    record = await plane.record()
    assert (record.status, record.estimated) == ("engine_lost", True)
    assert (record.prompt, record.cached) == (2145, 2000) and 1 <= record.completion < 15


async def test_a_stream_that_ends_too_soon_is_no_answer(start: Start) -> None:
    stream = contract("text.sse")

    async def script(asked: Asked, caller: Caller) -> None:
        await play(caller, stream[: stream.index(b"event: message_delta")])

    plane, _ = await start(script, engine="anthropic")
    answer = await raw(plane, stream=True)
    assert b"event: error\n" in answer.body and b'"message_stop"' not in answer.body
    assert (await plane.record()).status == "engine_lost"


async def test_an_error_in_mid_stream_passes(start: Start) -> None:
    plane, _ = await start(upstream_of("overloaded.sse"), engine="anthropic", name=THEIRS, upstream_model=THEIRS)
    answer = await raw(plane, model=THEIRS, stream=True)
    assert answer.body == contract("overloaded.sse")
    record = await plane.record()
    assert (record.status, record.estimated, record.prompt) == ("engine_lost", True, 40)


@pytest.mark.parametrize(
    ("name", "status", "told", "kind", "code"),
    [
        ("overloaded.json", 529, 503, "overloaded_error", "overloaded_error"),
        ("rate_limited.json", 429, 429, "rate_limit_error", "rate_limit_error"),
        ("too_long.json", 400, 400, "invalid_request_error", "context_length_exceeded"),
        ("overloaded.json", 500, 502, "api_error", "engine_error"),
        ("overloaded.json", 401, 502, "api_error", "engine_error"),
        ("overloaded.json", 402, 502, "api_error", "engine_error"),
    ],
)
async def test_its_errors(start: Start, name: str, status: int, told: int, kind: str, code: str) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole(contract(name), status)

    plane, _ = await start(script, engine="anthropic")
    answer = await raw(plane)
    assert (answer.status, answer.json["error"]["type"], answer.json["error"]["code"]) == (told, kind, code)
    chat = await plane.ask()
    assert (chat.status, chat.error["code"]) == (told, code)
    assert [(each.status, each.charge) for each in await plane.settled()] == [("engine_error", 0)] * 2


async def test_an_overloaded_upstream_is_left_for_another(fleet: Fleet) -> None:
    async def overloaded(asked: Asked, caller: Caller) -> None:
        await caller.whole(contract("overloaded.json"), 529)

    busy, well = await fleet.engines(overloaded, upstream_of())
    plane = await fleet.plane(models("mock", busy.port, well.port, engine="anthropic"))
    for _ in range(6):
        assert (await raw(plane)).status == 200
    assert busy.asked and len(well.asked) == 6
    await counted_as(plane, "message.json")


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"container": "c"}, "container"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
    ],
)
async def test_what_is_billed_apart_is_refused_by_name(start: Start, fields: Any, parameter: str) -> None:
    plane, upstream = await start(upstream_of(), engine="anthropic")
    answer = await raw(plane, **fields)
    assert answer.status == 400 and answer.json["error"]["code"] == "unsupported_parameter"
    assert answer.json["error"]["param"] == parameter and upstream.asked == []


# Fallbacks between the two forms


@pytest.mark.parametrize("stream", [False, True])
async def test_a_messages_client_falls_back_to_a_chat_engine_and_the_other_way(fleet: Fleet, stream: bool) -> None:
    async def busy(asked: Asked, caller: Caller) -> None:
        await caller.whole(contract("overloaded.json"), 529)

    async def chat(asked: Asked, caller: Caller) -> None:
        assert asked.json["messages"][0] == {"role": "system", "content": "s"}
        if asked.json.get("stream"):
            await caller.stream(role(), word("hello"), finish(), usage(30, 5), DONE)
        else:
            await caller.whole(completion("hello", usage_object(30, 5)))

    ill, openai, well = await fleet.engines(busy, chat, upstream_of("refusal.sse"))
    plane = await fleet.plane(
        model(ill.port, "mock", engine="anthropic", fallbacks=("chat",)),
        model(openai.port, "chat"),
        model(ill.port, "sick", fallbacks=("claude",)),
        model(well.port, "claude", engine="anthropic"),
    )
    answer = await raw(plane, stream=stream, system="s")
    assert answer.status == 200 and b'"hello"' in answer.body and b'"type":"message"' in answer.body
    answer = await raw(plane, model="sick", stream=stream, system="s")
    assert answer.status == 200 and well.asked[0].json["system"] == "s"
    if stream:
        assert answer.body == contract("refusal.sse").replace(THEIRS.encode(), b"sick")
    # What only Messages can carry has no chat to fall back to.
    cited: Any = {"type": "document", "source": {"type": "url", "url": "https://x/y.pdf"}}
    answer = await raw(plane, messages=[{"role": "user", "content": [cited]}])
    assert answer.status == 503 and len(openai.asked) == 1
    await plane.settled()


# Chats and responses


@pytest.mark.parametrize("size", [0, 1, 33])
async def test_openais_own_client_streams_a_chat(start: Start, size: int) -> None:
    plane, upstream = await start(upstream_of("thinking_and_tools.sse", size=size), engine="anthropic")
    stream = await openai_client(plane).chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}, tools=[TOOL], max_completion_tokens=77
    )
    calls: dict[int, Any] = {}
    text, thinking, reason, used = "", "", None, None
    async for chunk in stream:
        assert chunk.model == "mock" and chunk.object == "chat.completion.chunk" and chunk.created > 1_700_000_000
        used = chunk.usage or used
        for choice in chunk.choices:
            text += choice.delta.content or ""
            thinking += getattr(choice.delta, "reasoning_content", None) or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                name, arguments = calls.get(call.index, ("", ""))
                assert call.function is not None
                calls[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
    told = EXPECTED["thinking_and_tools.sse"]
    assert (text, thinking, reason) == (told["text"], told["thinking"], "tool_calls")
    assert [[name, json.loads(arguments)] for name, arguments in calls.values()] == told["calls"]
    assert used is not None and (used.prompt_tokens, used.completion_tokens) == (472, 89)
    await counted_as(plane, "thinking_and_tools.sse")
    sent = upstream.asked[0].json
    assert (sent["model"], sent["max_tokens"], sent["stream"]) == ("mock-upstream", 77, True)
    assert sent["tools"] == [{"name": "get_weather", "input_schema": {"type": "object"}}]


async def test_openais_own_client_asks_for_a_whole_chat(start: Start) -> None:
    plane, upstream = await start(upstream_of(), engine="anthropic")
    answer = await openai_client(plane).chat.completions.create(**CHAT)
    assert answer.choices[0].message.content == "Hi! My name is Claude."
    assert (answer.model, answer.choices[0].finish_reason) == ("mock", "stop")
    assert answer.usage is not None and answer.usage.prompt_tokens == 3195
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1000
    assert upstream.asked[0].json["max_tokens"] == 256  # the model's limit where the client has none
    await counted_as(plane, "message.json")


async def test_openais_own_client_asks_for_a_response(start: Start) -> None:
    plane, _ = await start(upstream_of(), engine="anthropic")
    client = openai_client(plane)
    whole = await client.responses.create(model="mock", input="hi", instructions="be brief")
    assert whole.output_text == "Hi! My name is Claude."
    texts = ""
    async for each in await client.responses.create(model="mock", input="hi", stream=True):
        if each.type == "response.output_text.delta":
            texts += each.delta
    assert texts == EXPECTED["text.sse"]["text"]
    assert {record.status for record in await plane.settled()} == {"ok"}


async def test_an_error_in_the_middle_of_a_chat(start: Start) -> None:
    plane, _ = await start(upstream_of("overloaded.sse"), engine="anthropic")
    answer = await plane.ask(stream=True)
    *_, error, done = answer.events
    assert json.loads(error)["error"]["code"] == "overloaded_error" and done == "[DONE]"
    record = await plane.record()
    assert (record.status, record.prompt, record.estimated) == ("engine_lost", 40, True)


async def test_a_client_that_leaves_a_chat_is_billed_by_what_the_upstream_reports(start: Start) -> None:
    left = asyncio.Event()
    events = [each + b"\n\n" for each in contract("text.sse").split(b"\n\n") if each]

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for each in events[:5]:
            await caller.chunk(each)
        await left.wait()
        for each in events[5:]:
            await caller.chunk(each)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script, engine="anthropic")
    line = await plane.line()
    await line.send(plane.request(stream=True))
    await line.reader.readuntil(b"The tide is")
    line.reset()
    await gone(plane)
    left.set()
    record = await plane.record()
    assert (record.status, record.estimated, record.prompt, record.completion) == ("client_closed", False, 2145, 15)


@pytest.mark.parametrize(
    ("fields", "parameter"), [({"n": 2}, "n"), ({"seed": 1}, "seed"), ({"temperature": 1.2}, "temperature")]
)
async def test_what_a_chat_cannot_ask_for_is_refused_by_name(start: Start, fields: Any, parameter: str) -> None:
    plane, upstream = await start(upstream_of(), engine="anthropic")
    answer = await plane.ask(**fields)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "unsupported_parameter", parameter)
    assert upstream.asked == []


async def test_what_it_does_not_have_at_all(start: Start) -> None:
    plane, upstream = await start(upstream_of(), engine="anthropic", embeds=False)
    text = await plane.send(post("/v1/completions", {"model": "mock", "prompt": "hi"}, plane.key))
    assert (text.status, text.error["code"]) == (400, "unsupported_parameter") and "/v1/messages" in text.error[
        "message"
    ]
    vectors = await plane.send(post("/v1/embeddings", {"model": "mock", "input": "hi"}, plane.key))
    assert vectors.status == 400 and upstream.asked == []


# Another platform of this kind as the upstream


@pytest.mark.parametrize("stream", [False, True])
async def test_a_platform_before_a_platform_counts_the_same(fleet: Fleet, stream: bool) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}

    async def engine(asked: Asked, caller: Caller) -> None:
        assert asked.json["tools"][0]["function"]["name"] == "get_weather"
        if asked.json.get("stream"):
            delta = {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}
            await caller.stream(role(), word("so"), event(delta), finish("tool_calls"), usage(30, 5, 12), DONE)
        else:
            answer = completion("so", usage_object(30, 5, 12))
            answer["choices"][0]["message"]["tool_calls"] = [call]
            answer["choices"][0]["finish_reason"] = "tool_calls"
            await caller.whole(answer)

    (own,) = await fleet.engines(engine)
    behind = await fleet.plane(model(own.port, "theirs"))
    front = await fleet.plane(
        model(behind.port, engine="anthropic", upstream_model="theirs", api_key=behind.key, context=100_000)
    )
    chat = await front.ask(stream=stream, tools=[TOOL])
    chunks = [json.loads(each) for each in chat.events if each.startswith("{")] if stream else [chat.json]
    choices = [each for chunk in chunks for each in chunk["choices"]]
    assert choices[-1]["finish_reason"] == "tool_calls" and b'"get_weather"' in chat.body
    messages = await raw(front, stream=stream, tools=[{"name": "get_weather", "input_schema": {"type": "object"}}])
    assert b'"name":"get_weather"' in messages.body and b'"model":"mock"' in messages.body
    told = [(each.prompt, each.cached, each.completion, each.status) for each in await front.settled()]
    assert told == [(each.prompt, each.cached, each.completion, each.status) for each in await behind.settled()]
    assert told == [(30, 12, 5, "ok")] * 2


async def test_what_is_written_to_a_cache_and_read_from_it_has_prices_of_its_own(start: Start) -> None:
    plane, _ = await start(upstream_of(), engine="anthropic")
    rates = {"input": 1_000_000_000, "cached_input": 100_000_000, "cache_write": 1_250_000_000, "output": 5_000_000_000}
    with plane.store.write() as connection:
        set_price(connection, model="mock", currency="USD", price=Price.of(**rates), now=datetime.now(UTC))
    await plane.authenticator.renew()
    assert (await raw(plane, stream=True)).status == 200
    record = await plane.record()
    # 25 tokens as they are, 2000 from the cache, 120 into it, 15 of the answer; nanos a token.
    assert record.charge == 25 * 1000 + 2000 * 100 + 120 * 1250 + 15 * 5000
