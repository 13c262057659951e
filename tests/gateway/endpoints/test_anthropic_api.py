"""Anthropic's own client against the data plane: what it gets, and that this is what is billed."""

import asyncio
import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, TextBlock, ThinkingBlock

from tests.gateway.clients import anthropic as client_of
from tests.support.data_plane import Start
from tests.support.paths import GATEWAY_CONTRACTS
from tests.support.plane import Plane
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
from tests.support.wire import get, post

ASK: dict[str, Any] = {"model": "mock", "max_tokens": 20, "messages": [{"role": "user", "content": "one two three"}]}
TOOL: Any = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


async def billed(plane: Plane, message: Message) -> None:
    """The message's usage is its record's, to the token."""
    record = await plane.record()
    used = message.usage
    cached = used.cache_read_input_tokens or 0
    assert (used.input_tokens + cached, cached, used.output_tokens) == (record.prompt, record.cached, record.completion)
    assert record.opened.request_id == message.id.replace("msg_", "req_")


async def test_a_whole_answer(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        assert asked.json["messages"] == [{"role": "system", "content": "be brief"}, *ASK["messages"]]
        assert b"POST /v1/chat/completions " in asked.head
        await caller.whole(completion("hello", usage_object(30, 5, 12)))

    plane, _ = await start(script)
    message = await client_of(plane).messages.create(**ASK, system="be brief")
    assert [(block.type, getattr(block, "text", None)) for block in message.content] == [("text", "hello")]
    assert (message.role, message.model, message.stop_reason) == ("assistant", "mock", "end_turn")
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (18, 12)
    assert message._request_id == message.id.replace("msg_", "req_")
    await billed(plane, message)


async def test_a_stream(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        assert asked.json["stream_options"] == {"include_usage": True}
        await caller.stream(role(), word("hel"), word("lo"), finish(), usage(30, 5, 12), DONE)

    plane, _ = await start(script)
    async with client_of(plane).messages.stream(**ASK) as stream:
        texts = [text async for text in stream.text_stream]
        message = await stream.get_final_message()
    assert texts == ["hel", "lo"]
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.request_id == message.id.replace("msg_", "req_")
    await billed(plane, message)


async def test_an_engine_that_reports_nothing_is_told_as_it_is_billed(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        if asked.json.get("stream"):
            await caller.stream(role(), *[word(f" {n}") for n in range(9)], finish(), DONE)
        else:
            await caller.whole(completion("a b c"))

    plane, _ = await start(script)
    client = client_of(plane)
    whole = await client.messages.create(**ASK)
    async with client.messages.stream(**ASK) as stream:
        streamed = await stream.get_final_message()
    records = await plane.settled()
    assert all(record.estimated for record in records)
    for message, record in zip([whole, streamed], records, strict=True):
        assert (message.usage.input_tokens, message.usage.output_tokens) == (record.prompt, record.completion)
        assert record.completion > 0


async def test_a_tool_call_and_its_answer(start: Start) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"ci', 'ty": "Par', 'is"}')]

    async def script(asked: Asked, caller: Caller) -> None:
        if asked.json["messages"][-1]["role"] == "tool":
            await caller.whole(completion("22 degrees", usage_object(40, 3)))
            return
        assert asked.json["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
        deltas = [{"choices": [{"index": 0, "delta": {"tool_calls": [each]}}]} for each in [call, *pieces]]
        await caller.stream(role(), *[event(each) for each in deltas], finish("tool_calls"), usage(30, 9), DONE)

    plane, upstream = await start(script)
    client = client_of(plane)
    choice: Any = {"type": "tool", "name": "get_weather"}
    async with client.messages.stream(**ASK, tools=[TOOL], tool_choice=choice) as stream:
        message = await stream.get_final_message()
    (block,) = message.content
    assert block.type == "tool_use" and (block.id, block.name, block.input) == (
        "call_1", "get_weather", {"city": "Paris"},
    )  # fmt: skip
    assert message.stop_reason == "tool_use"
    result: Any = {"type": "tool_result", "tool_use_id": block.id, "content": "22"}
    turns: Any = [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    again = await client.messages.create(**{**ASK, "messages": [*ASK["messages"], *turns]}, tools=[TOOL])
    assert again.content[0].type == "text" and again.content[0].text == "22 degrees"
    assert upstream.asked[-1].json["messages"][1]["tool_calls"][0]["function"] == {
        "name": "get_weather", "arguments": '{"city":"Paris"}',
    }  # fmt: skip
    assert len(await plane.settled()) == 2


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_reasoning_becomes_thinking(start: Start, field: str) -> None:
    details = {"completion_tokens_details": {"reasoning_tokens": 3}}

    async def script(asked: Asked, caller: Caller) -> None:
        if asked.json.get("stream"):
            last = {"choices": [], "usage": {**usage_object(30, 5), **details}}
            deltas = [event({"choices": [{"index": 0, "delta": {field: each}}]}) for each in ("h", "m")]
            await caller.stream(role(), *deltas, word("4"), finish(), event(last), DONE)
        else:
            answer = completion("4", {**usage_object(30, 5), **details})
            answer["choices"][0]["message"][field] = "hm"
            await caller.whole(answer)

    plane, _ = await start(script)
    client = client_of(plane)
    whole = await client.messages.create(**ASK, thinking={"type": "adaptive"})
    async with client.messages.stream(**ASK) as stream:
        streamed = await stream.get_final_message()
    for message in (whole, streamed):
        thinking, text = message.content
        assert isinstance(thinking, ThinkingBlock) and (thinking.thinking, thinking.signature) == ("hm", "")
        assert isinstance(text, TextBlock) and text.text == "4"
        details_told = message.usage.output_tokens_details
        assert details_told is not None and details_told.thinking_tokens == 3
    assert len(await plane.settled()) == 2


@pytest.mark.parametrize("contract", ["llamacpp_tool_call", "llamacpp_reasoning"])
async def test_recorded_streams_of_llamacpp_whole_and_streamed(start: Start, contract: str) -> None:
    recorded = (GATEWAY_CONTRACTS / f"{contract}.sse").read_bytes()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*[each + b"\n\n" for each in recorded.split(b"\n\n") if each])

    plane, _ = await start(script, engine="llamacpp", owned=True)
    client = client_of(plane)
    whole = await client.messages.create(**ASK)
    async with client.messages.stream(**ASK) as stream:
        first = await anext(aiter(stream))
        streamed = await stream.get_final_message()
    assert whole.content == [type(block).model_validate(block.to_dict()) for block in whole.content]
    assert [block.type for block in whole.content] == [block.type for block in streamed.content]
    assert whole.usage.model_dump() == streamed.usage.model_dump()
    assert first.type == "message_start" and first.message.usage.input_tokens == streamed.usage.input_tokens
    if contract == "llamacpp_reasoning":
        assert whole.usage.output_tokens_details is not None
        assert whole.usage.output_tokens_details.thinking_tokens == 11
    records = await plane.settled()
    assert {(record.prompt - record.cached, record.completion) for record in records} == {
        (whole.usage.input_tokens, whole.usage.output_tokens)
    }


async def test_errors_are_of_anthropics_classes_and_shape(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"error": {"message": "too hot", "type": "invalid_request_error"}}, status=400)

    plane, _ = await start(script, credit="0")
    client = client_of(plane)

    async def fails(kind: type[anthropic.APIStatusError], error_type: str, code: str, **changes: Any) -> None:
        chosen = changes.pop("client", client)
        with pytest.raises(kind) as failed:
            await chosen.messages.create(**{**ASK, **changes})
        body: Any = failed.value.body
        assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
        assert (body["error"]["type"], body["error"]["code"]) == (error_type, code)
        assert body["request_id"] == failed.value.request_id

    nobody = client_of(plane, "sk-no")
    await fails(anthropic.AuthenticationError, "authentication_error", "invalid_api_key", client=nobody)
    await fails(anthropic.NotFoundError, "not_found_error", "model_not_found", model="nothing")
    await fails(anthropic.BadRequestError, "invalid_request_error", "unsupported_parameter", container="c")
    await fails(anthropic.APIStatusError, "billing_error", "insufficient_quota")
    assert await plane.settled() == []


async def test_what_an_engine_refuses_is_refused_in_anthropics_shape(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"error": {"message": "'top_k' is unknown", "type": "invalid_request_error"}}, status=400)

    plane, _ = await start(script)
    with pytest.raises(anthropic.BadRequestError, match="'top_k' is unknown"):
        await client_of(plane).messages.create(**ASK, extra_body={"top_k": 3})
    record = await plane.record()
    assert (record.status, record.charge) == ("engine_error", 0)


async def test_an_engine_lost_in_mid_stream_raises_at_the_client(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for each in (role(), word("hel")):
            await caller.chunk(each)
        caller.reset()

    plane, _ = await start(script)
    with pytest.raises(anthropic.APIStatusError, match="closed the connection") as failed:
        async with client_of(plane).messages.stream(**ASK) as stream:
            async for _ in stream:
                pass
    assert "api_error" in str(failed.value.body)
    assert (await plane.record()).status == "engine_lost"


async def test_a_balance_used_up_in_mid_stream_raises_at_the_client(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        limit = asked.json["max_tokens"]
        await caller.stream(role(), *[word(" x")] * limit, finish("length"), usage(10, limit), DONE)

    plane, _ = await start(script, credit="0.0005")  # pays the prompt's bound and some tens of tokens
    with pytest.raises(anthropic.APIStatusError, match="balance is used up"):
        async with client_of(plane).messages.stream(**{**ASK, "max_tokens": 100_000}) as stream:
            async for _ in stream:
                pass
    assert (await plane.record()).status == "balance_exhausted"


async def test_the_bytes_may_come_one_by_one(start: Start) -> None:
    stream = b"".join([role(), word("hé"), word('"\n'), finish(), usage(3, 2), DONE])

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for byte in stream:
            await caller.chunk(bytes([byte]))
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script)
    async with client_of(plane).messages.stream(**ASK) as got:
        message = await got.get_final_message()
    assert message.content[0].type == "text" and message.content[0].text == 'hé"\n'
    await billed(plane, message)


async def test_counting_tokens_exactly_estimated_and_never_billed(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        assert b"POST /v1/chat/completions/input_tokens " in asked.head
        await caller.whole({"object": "response.input_tokens", "input_tokens": 17})

    plane, _ = await start(script, engine="llamacpp", owned=True)
    counted = await client_of(plane).messages.with_raw_response.count_tokens(model="mock", messages=ASK["messages"])
    assert (await counted.parse()).input_tokens == 17
    assert counted.headers["x-token-count"] == "exact"
    assert await plane.settled() == []


async def test_counting_by_estimate_says_so(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        raise AssertionError("the engine is asked")

    plane, upstream = await start(script)
    counted = await client_of(plane).messages.with_raw_response.count_tokens(model="mock", messages=ASK["messages"])
    assert counted.headers["x-token-count"] == "estimate"
    assert 5 < (await counted.parse()).input_tokens < 50
    assert not upstream.asked
    with pytest.raises(anthropic.NotFoundError):
        await client_of(plane).messages.count_tokens(model="nothing", messages=ASK["messages"])


async def test_the_models_in_anthropics_form(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None: ...

    plane, _ = await start(script)
    client = client_of(plane)
    (found,) = [each async for each in client.models.list()]
    assert (found.id, found.display_name, found.type) == ("mock", "mock", "model")
    assert await client.models.retrieve("mock") == found
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("nothing")
    plain = await plane.send(get("/v1/models", plane.key))
    assert plain.json["object"] == "list" and plain.json["data"][0]["object"] == "model"


async def test_both_kinds_of_keys_open_the_door(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole(completion("hello", usage_object(3, 1)))

    plane, _ = await start(script)
    by_header = b"x-api-key: %b\r\nanthropic-version: 2023-06-01\r\n" % plane.key.encode()
    first = await plane.send(post("/v1/messages", ASK, headers=by_header))
    second = await plane.send(post("/v1/messages", ASK, plane.key))
    chat = await plane.send(post("/v1/chat/completions", ASK, headers=by_header[: by_header.index(b"anthropic")]))
    assert (first.status, second.status, chat.status) == (200, 200, 200)
    assert first.json["type"] == second.json["type"] == "message" and chat.json["object"] == "chat.completion"
    assert first.headers["request-id"] == first.headers["x-request-id"]
    nobody = await plane.send(post("/v1/messages", ASK))
    assert (nobody.status, nobody.json["error"]["type"]) == (401, "authentication_error")
    nowhere = await plane.send(post("/v1/messages/batches", {}, plane.key))
    assert (nowhere.status, nowhere.json["error"]["type"]) == (404, "not_found_error")
    wrong = await plane.send(get("/v1/messages", plane.key))
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")


async def test_a_hundred_streams_at_once_leave_nothing_behind(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("a"), finish(), usage(3, 1), DONE)

    plane, _ = await start(script)
    body = json.dumps({**ASK, "stream": True}).encode()
    answers = await asyncio.gather(*(plane.send(post("/v1/messages", body, plane.key)) for _ in range(100)))
    assert {answer.body.count(b"event: message_stop") for answer in answers} == {1}
    assert len(await plane.settled()) == 100
