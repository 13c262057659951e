"""Answers in the form of the Responses API: what is streamed, what ends the stream, and the whole answer agree."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.gateway.chunks import COUNTS, collected, draw_stream, event, events_of, on_streams, split, translated
from tests.support.paths import GATEWAY_CONTRACTS
from tidemill.engines.sse import BrokenStream
from tidemill.errors import Unavailable
from tidemill.gateway.protocols.responses import reply as responses_reply
from tidemill.gateway.protocols.responses.reply import ResponsesReply
from tidemill.gateway.protocols.responses.request import read_responses

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def reply(**more: Any) -> ResponsesReply:
    made = ResponsesReply(read_responses(json.dumps({"model": "m", "input": "hi", **more}).encode()), "req_1")
    made._created = 1
    return made


def last(body: bytes) -> dict[str, Any]:
    """The response that ends a stream."""
    return events_of(body)[-1][1]["response"]  # type: ignore[no-any-return]


def timeless(response: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in response.items() if name not in ("completed_at", "created_at")}


def accumulated(body: bytes) -> list[dict[str, Any]]:
    """The items that the pieces of a stream add up to."""
    items: dict[int, dict[str, Any]] = {}
    for name, payload in events_of(body):
        at = payload.get("output_index")
        if name == "response.output_item.added":
            assert at == len(items)
            items[at] = payload["item"]
        elif name == "response.content_part.added":
            items[at]["content"].append(payload["part"])
        elif name in ("response.output_text.delta", "response.reasoning_text.delta"):
            items[at]["content"][payload["content_index"]]["text"] += payload["delta"]
        elif name == "response.function_call_arguments.delta":
            items[at]["arguments"] += payload["delta"]
        elif name == "response.output_item.done":
            assert {**items[at], "status": payload["item"]["status"]} == payload["item"]
            items[at] = payload["item"]
        elif name.endswith("text.done"):
            assert payload["text"] == items[at]["content"][0]["text"]
        elif name.endswith("arguments.done"):
            assert payload["arguments"] == items[at]["arguments"]
    return list(items.values())


@on_streams
@given(st.data())
def test_the_pieces_the_end_and_the_whole_answer_say_the_same(data: Any) -> None:
    stream = draw_stream(data)
    body = translated(reply(), [stream])
    whole = json.loads(reply().whole(collected(stream), COUNTS))
    Response.model_validate(whole)
    assert accumulated(body) == last(body)["output"] == whole["output"]
    assert timeless(last(body)) == timeless(whole)
    assert whole["usage"]["input_tokens"] == 30 and whole["usage"]["input_tokens_details"]["cached_tokens"] == 4


@on_streams
@given(st.data())
def test_wherever_a_stream_is_cut_the_client_gets_the_same_bytes(data: Any) -> None:
    stream = draw_stream(data)
    whole, pieces = (translated(reply(), each) for each in ([stream], split(data, stream)))
    assert whole[: whole.rindex(b"event:")] == pieces[: pieces.rindex(b"event:")]
    assert timeless(last(whole)) == timeless(last(pieces))


@on_streams
@given(st.data())
def test_every_event_is_one_of_openais_and_numbered(data: Any) -> None:
    events = events_of(translated(reply(), [draw_stream(data)]))
    assert [name for name, _ in events[:2]] == ["response.created", "response.in_progress"]
    assert [payload["sequence_number"] for _, payload in events] == list(range(len(events)))
    for name, payload in events:
        assert _EVENT.validate_python(payload).type == name


@pytest.mark.parametrize(
    ("finish", "status", "details"),
    [
        ("stop", "completed", None),
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_how_it_ended(finish: str, status: str, details: Any) -> None:
    stream = event({"content": "hi"}) + event({}, finish)
    name, payload = events_of(translated(reply(), [stream]))[-1]
    response = payload["response"]
    assert (name, response["status"], response["incomplete_details"]) == (f"response.{status}", status, details)
    assert response["output"][0]["status"] == status


def test_a_recorded_tool_call_of_llamacpp() -> None:
    (item,) = last(translated(reply(), [(GATEWAY_CONTRACTS / "llamacpp_tool_call.sse").read_bytes()]))["output"]
    assert (item["type"], item["name"]) == ("function_call", "get_weather")
    assert json.loads(item["arguments"]) == {"city": "Rome"}


def test_a_recorded_failure_in_mid_stream() -> None:
    body = translated(reply(), [(GATEWAY_CONTRACTS / "llamacpp_broken_call.sse").read_bytes()])
    (error_name, error), (name, failed) = events_of(body)[-2:]
    assert (error_name, name) == ("error", "response.failed")
    assert "peg-native" in error["message"] and failed["response"]["error"]["message"] == error["message"]
    assert failed["response"]["status"] == "failed"


def test_a_stream_that_an_error_stops_says_so() -> None:
    writer = reply()
    begun = writer.events(event({"content": "hi"}), COUNTS)
    *_, (error_name, error), (name, payload) = events_of(begun + writer.stopped(Unavailable("No more.")))
    assert (error_name, error["code"], name) == ("error", "unavailable", "response.failed")
    assert payload["response"]["error"] == {"code": "unavailable", "message": "No more."}


def test_log_probabilities_go_along() -> None:
    logprob = {"token": "hi", "bytes": [104, 105], "logprob": -0.5, "top_logprobs": []}
    chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "logprobs": {"content": [logprob]}}]}
    stream = b"data: " + json.dumps(chunk).encode() + b"\n\n" + event({"content": "!"}) + event({}, "stop")
    body = translated(reply(), [stream])
    deltas = [payload["logprobs"] for name, payload in events_of(body) if name == "response.output_text.delta"]
    assert deltas == [[logprob], []]
    assert last(body)["output"][0]["content"][0]["logprobs"] == [logprob]
    whole = json.loads(reply().whole(collected(stream), COUNTS))
    assert whole["output"][0]["content"][0]["logprobs"] == [logprob]


def test_what_is_kept_of_a_stream_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_reply, "MAX_KEPT_BYTES", 100)
    writer = reply()
    with pytest.raises(BrokenStream, match="longer than 100 bytes"):
        for _ in range(30):
            writer.events(event({"content": "12345"}), COUNTS)


def test_a_response_says_again_what_was_asked() -> None:
    asked = {
        "instructions": "be brief",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low"},
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "tool_choice": "required",
    }
    answer = {"choices": [{"index": 0, "message": {"content": "{}"}, "finish_reason": "stop"}]}
    response = json.loads(reply(**asked).whole(json.dumps(answer).encode(), COUNTS))
    assert {name: response[name] for name in asked} == asked
    assert response["id"] == "resp_1" and response["store"] is False
    assert response["parallel_tool_calls"] is True and response["truncation"] == "disabled"
