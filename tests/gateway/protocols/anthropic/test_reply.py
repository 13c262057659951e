"""Answers in Anthropic's form: for any stream, cut anywhere, what is streamed is what the whole answer says."""

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.gateway.chunks import COUNTS, collected, draw_stream, event, events_of, on_streams, split, translated
from tests.support.paths import GATEWAY_CONTRACTS
from tidemill.engines.openai import OpenAIEngine
from tidemill.engines.sse import BrokenStream
from tidemill.errors import Unavailable
from tidemill.gateway.protocols.anthropic.reply import AnthropicReply
from tidemill.gateway.protocols.anthropic.request import read_messages

_EVENT = TypeAdapter(RawMessageStreamEvent)


def reply(**more: Any) -> AnthropicReply:
    body = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], **more}
    request = read_messages(json.dumps(body).encode())
    request.prepare_for(OpenAIEngine(), {})
    return AnthropicReply(request, "req_1")


def message_of(body: bytes) -> dict[str, Any]:
    """The message that Anthropic's own client makes of a stream."""
    snapshot = None
    buffers: dict[int, bytes] = {}
    for name, payload in events_of(body):
        assert name == payload["type"]
        if name != "ping":
            snapshot = accumulate_event(
                event=_EVENT.validate_python(payload), current_snapshot=snapshot, json_bufs=buffers
            )
    assert snapshot is not None
    return snapshot.to_dict()


def bare(message: dict[str, Any]) -> dict[str, Any]:
    """Without what the client's types add and what only one way has."""
    blocks = [
        {k: v for k, v in block.items() if k not in ("citations", "parsed_output") and v is not None}
        for block in message["content"]
    ]
    return {"content": blocks, "stop": message["stop_reason"], "usage": message["usage"]["output_tokens"]}


@on_streams
@given(st.data())
def test_a_stream_says_what_the_whole_answer_says(data: Any) -> None:
    stream = draw_stream(data)
    streamed = message_of(translated(reply(), [stream]))
    whole = json.loads(reply().whole(collected(stream), COUNTS))
    Message.model_validate(whole)
    assert bare(streamed) == bare(whole)
    assert streamed["usage"]["input_tokens"] == whole["usage"]["input_tokens"] == 26
    assert streamed["usage"]["cache_read_input_tokens"] == whole["usage"]["cache_read_input_tokens"] == 4


@on_streams
@given(st.data())
def test_wherever_a_stream_is_cut_the_client_gets_the_same_bytes(data: Any) -> None:
    stream = draw_stream(data)
    assert translated(reply(), split(data, stream)) == translated(reply(), [stream])


@on_streams
@given(st.data())
def test_blocks_are_opened_filled_and_closed_one_after_the_other(data: Any) -> None:
    names = events_of(translated(reply(), [draw_stream(data)]))
    assert [name for name, _ in names[:2]] == ["message_start", "ping"]
    assert [name for name, _ in names[-2:]] == ["message_delta", "message_stop"]
    open_index, opened = None, -1
    for name, payload in names[2:-2]:
        if name == "content_block_start":
            assert open_index is None and payload["index"] == opened + 1
            open_index = opened = payload["index"]
        elif name == "content_block_stop":
            assert payload["index"] == open_index
            open_index = None
        elif name == "content_block_delta":
            assert payload["index"] == open_index
    assert open_index is None


def test_a_recorded_tool_call_of_llamacpp() -> None:
    stream = (GATEWAY_CONTRACTS / "llamacpp_tool_call.sse").read_bytes()
    message = message_of(translated(reply(), [stream]))
    (block,) = message["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "get_weather", {"city": "Rome"})
    assert block["id"] == "5Lghke9GvxhdYesqm6IYlvKjTaeqvLQw"
    assert message["stop_reason"] == "tool_use"


def test_a_recorded_reasoning_of_llamacpp() -> None:
    stream = (GATEWAY_CONTRACTS / "llamacpp_reasoning.sse").read_bytes()
    (block,) = message_of(translated(reply(), [stream]))["content"]
    assert block["type"] == "thinking" and len(block["thinking"]) > 10


def test_a_recorded_failure_in_mid_stream_ends_with_an_error_and_nothing_after_it() -> None:
    stream = (GATEWAY_CONTRACTS / "llamacpp_broken_call.sse").read_bytes()
    *_, (name, payload) = events_of(translated(reply(), [stream]))
    assert name == "error" and payload["type"] == "error"
    assert payload["error"]["type"] == "api_error" and "peg-native" in payload["error"]["message"]
    assert payload["request_id"] == "req_1"


def test_thinking_can_be_left_out_of_sight() -> None:
    stream = (GATEWAY_CONTRACTS / "llamacpp_reasoning.sse").read_bytes()
    hidden = {"thinking": {"type": "adaptive", "display": "omitted"}}
    (block,) = message_of(translated(reply(**hidden), [stream]))["content"]
    assert (block["type"], block["thinking"]) == ("thinking", "")
    (block,) = json.loads(reply(**hidden).whole(collected(stream), COUNTS))["content"]
    assert (block["type"], block["thinking"]) == ("thinking", "")


@pytest.mark.parametrize(
    ("finish", "more", "stop"),
    [
        ("stop", {}, ("end_turn", None)),
        ("length", {}, ("max_tokens", None)),
        ("content_filter", {}, ("refusal", None)),
        ("stop", {"stop_reason": "END"}, ("stop_sequence", "END")),
        ("stop", {"matched_stop": "END"}, ("stop_sequence", "END")),
        ("stop", {"stop_reason": 151645}, ("end_turn", None)),
        ("stop", {"matched_stop": "</s>"}, ("end_turn", None)),
        ("a reason of tomorrow", {}, ("end_turn", None)),
    ],
)
def test_why_it_stopped(finish: str, more: dict[str, Any], stop: tuple[str, str | None]) -> None:
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish, **more}]}
    stream = event({"content": "hi"}) + b"data: " + json.dumps(last).encode() + b"\n\n"
    message = message_of(translated(reply(stop_sequences=["END"]), [stream]))
    assert (message["stop_reason"], message["stop_sequence"]) == stop
    answer = {"choices": [{"index": 0, "message": {"content": "hi"}, "finish_reason": finish, **more}]}
    whole = json.loads(reply(stop_sequences=["END"]).whole(json.dumps(answer).encode(), COUNTS))
    assert (whole["stop_reason"], whole["stop_sequence"]) == stop


def test_an_engine_that_says_stop_after_a_tool_call_means_the_call() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    message = message_of(translated(reply(), [event({"tool_calls": [call]}) + event({}, "stop")]))
    assert message["stop_reason"] == "tool_use"


def test_arguments_that_are_no_object_are_wrapped() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city": "Par'}}
    answer = {"choices": [{"index": 0, "message": {"content": None, "tool_calls": [call]}, "finish_reason": "length"}]}
    message = json.loads(reply().whole(json.dumps(answer).encode(), COUNTS))
    assert message["content"][0]["input"] == {"INVALID_JSON": '{"city": "Par'}
    assert message["stop_reason"] == "max_tokens"


def test_calls_without_an_index_or_an_id_are_told_apart() -> None:
    calls = [{"id": "a", "function": {"name": "f", "arguments": "{}"}}, {"id": "b", "function": {"name": "g"}}]
    stream = b"".join(event({"tool_calls": [each]}) for each in calls)
    stream += event({"tool_calls": [{"function": {"arguments": '{"x":1}'}}]}) + event({}, "tool_calls")
    content = message_of(translated(reply(), [stream]))["content"]
    assert [(each["id"], each["name"], each["input"]) for each in content] == [("a", "f", {}), ("b", "g", {"x": 1})]
    nameless = event({"tool_calls": [{"index": 0, "function": {"arguments": ""}}]})
    named = event({"tool_calls": [{"index": 0, "function": {"name": "h", "arguments": "{}"}}]})
    (block,) = message_of(translated(reply(), [nameless + named]))["content"]
    assert block["name"] == "h" and block["id"].startswith("toolu_")


def test_a_call_that_is_gone_back_to_is_a_broken_stream() -> None:
    first, second = ({"index": at, "id": str(at), "function": {"name": "f", "arguments": "{"}} for at in (0, 1))
    late = {"index": 0, "function": {"arguments": "}"}}
    with pytest.raises(BrokenStream):
        translated(reply(), [b"".join(event({"tool_calls": [each]}) for each in (first, second, late))])


@pytest.mark.parametrize("chunk", [b"data: nonsense\n\n", b'data: {"choices": 5}\n\n', b"data: []\n\n"])
def test_what_is_no_chunk_is_a_broken_stream(chunk: bytes) -> None:
    with pytest.raises(BrokenStream):
        translated(reply(), [chunk])


def test_content_in_parts_is_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "é"}]
    (block,) = message_of(translated(reply(), [event({"content": parts})]))["content"]
    assert block["text"] == "aé"


def test_a_stream_that_an_error_stops_says_so() -> None:
    writer = reply()
    begun = writer.events(event({"content": "hi"}), COUNTS)
    (name, payload) = events_of(begun + writer.stopped(Unavailable("No more.")))[-1]
    assert (name, payload["error"]["type"]) == ("error", "overloaded_error")


def test_an_answer_with_nothing_in_it() -> None:
    message = message_of(translated(reply(), [event({"role": "assistant", "content": ""}) + event({}, "stop")]))
    assert (message["content"], message["stop_reason"]) == ([], "end_turn")
