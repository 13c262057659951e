"""Putting streams together again."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.streams import event
from tidemill.engines.collect import Collector
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream

HEAD = {"id": "c1", "created": 5, "model": "m", "object": "chat.completion.chunk"}


def collect(*choices: dict[str, Any] | None) -> Any:
    collector = Collector()
    for choice in choices:
        collector.feed(event({**HEAD, "choices": [] if choice is None else [choice]}))
    return json.loads(collector.answer(TokenCounts(9, 4, 3)))


def delta(index: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": fields, "finish_reason": finish}


def test_a_plain_answer() -> None:
    answer = collect(
        delta(role="assistant", content=None), delta(content="Hel"), delta(content="lo"), delta(finish="stop")
    )
    assert answer == {
        "id": "c1",
        "created": 5,
        "model": "m",
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


@given(st.lists(st.text(max_size=5), max_size=8))
def test_pieces_add_up(texts: list[str]) -> None:
    answer = collect(
        *(delta(content=text, reasoning_content=text, refusal=text) for text in texts), delta(finish="stop")
    )
    message = answer["choices"][0]["message"]
    assert message["content"] == "".join(texts)
    if texts:
        assert message["reasoning_content"] == message["refusal"] == "".join(texts)


def test_choices_that_come_mixed_up() -> None:
    answer = collect(
        delta(1, content="b"), delta(0, content="a"), delta(1, content="B", finish="length"), delta(0, finish="stop")
    )
    said = [(each["index"], each["message"]["content"], each["finish_reason"]) for each in answer["choices"]]
    assert said == [(0, "a", "stop"), (1, "bB", "length")]


def call(index: int, **function: str) -> dict[str, Any]:
    return {"index": index, "function": function}


def test_tool_calls_are_merged_by_their_index() -> None:
    answer = collect(
        delta(role="assistant", content=None),
        delta(tool_calls=[{**call(0, name="weather", arguments=""), "id": "a", "type": "function"}]),
        delta(tool_calls=[call(0, arguments='{"city":')]),
        delta(tool_calls=[{**call(1, name="time", arguments="{}"), "id": "b", "type": "function"}]),
        delta(tool_calls=[call(0, arguments='"Oslo"}')]),
        delta(finish="tool_calls"),
    )
    message = answer["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}},
        {"id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]


def test_log_probabilities_are_appended() -> None:
    def with_logprobs(token: str) -> dict[str, Any]:
        return {**delta(content=token), "logprobs": {"content": [{"token": token, "logprob": -1.5}], "refusal": None}}

    answer = collect(with_logprobs("a"), with_logprobs("b"), {**delta(finish="stop"), "logprobs": None})
    assert [each["token"] for each in answer["choices"][0]["logprobs"]["content"]] == ["a", "b"]


def test_text_completions() -> None:
    collector = Collector()
    for text, finish in (("Hel", None), ("lo", None), ("", "stop")):
        choice = {"index": 0, "text": text, "finish_reason": finish}
        collector.feed(event({"id": "c", "object": "text_completion", "choices": [choice]}))
    answer = json.loads(collector.answer(TokenCounts()))
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "finish_reason": "stop", "text": "Hello", "logprobs": None}]


@pytest.mark.parametrize(
    "broken", [b"data: {\n\n", b"data: [1]\n\n", b"data: 5\n\n", b'data: {"choices":[5]}\n\n', b"data: \xff\n\n"]
)
def test_what_is_no_chunk(broken: bytes) -> None:
    with pytest.raises(BrokenStream):
        Collector().feed(broken)
