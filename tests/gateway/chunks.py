"""Chat streams as engines write them, made by Hypothesis: thinking, text and tool calls, cut anywhere."""

import json
from typing import Any

from hypothesis import strategies as st

from tests.support.examples import examples
from tidemill.engines.collect import Collector
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import SseTap

on_streams = examples(0.6)

COUNTS = TokenCounts(30, 4, 12)

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
inputs = st.dictionaries(words, st.one_of(st.integers(), words, st.booleans(), st.none()), max_size=3)


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c1", "choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


def cut(data: Any, text: str) -> list[str]:
    """`text` in pieces, drawn."""
    at = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True) if a < b]


def draw_stream(data: Any) -> bytes:
    """A whole stream in the order that engines keep: thinking, then text, then tool calls, then why it ended."""
    thinking_name = data.draw(st.sampled_from(["reasoning_content", "reasoning"]))
    thinking = data.draw(st.lists(words, max_size=4))
    text = data.draw(st.lists(words, max_size=6))
    calls = data.draw(st.lists(st.tuples(names, inputs), max_size=3))
    events = [event({"role": "assistant", "content": data.draw(st.sampled_from([None, ""]))})]
    events += [event({thinking_name: each}) for each in thinking]
    events += [event({"content": each}) for each in text]
    for index, (name, arguments) in enumerate(calls):
        first = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        events.append(event({"tool_calls": [first]}))
        for piece in cut(data, json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))):
            events.append(event({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}))
    if data.draw(st.booleans()):
        events.insert(data.draw(st.integers(0, len(events))), b": the engine is at work\n\n")
    reason = "tool_calls" if calls else data.draw(st.sampled_from(["stop", "length", "content_filter"]))
    events.append(event({}, reason))
    return b"".join(events) + b"data: [DONE]\n\n"


def split(data: Any, stream: bytes) -> list[bytes]:
    """The stream's bytes, cut anywhere."""
    at = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    return [stream[a:b] for a, b in zip([0, *at], [*at, len(stream)], strict=True)]


def translated(reply: Any, pieces: list[bytes]) -> bytes:
    """What a client gets of a stream that comes in these pieces, the way `serve` passes them on."""
    tap = SseTap(wants_usage=False)
    out = []
    for piece in pieces:
        if events := tap.feed(piece):
            out.append(reply.events(events, COUNTS))
    return b"".join([*out, reply.end(COUNTS)])


def collected(stream: bytes) -> bytes:
    """The whole answer that says the same."""
    collector = Collector()
    collector.feed(SseTap(wants_usage=False).feed(stream))
    return collector.answer(COUNTS)


def events_of(body: bytes) -> list[tuple[str, Any]]:
    """Names and payloads of an event stream whose events have names; comments are left out."""
    found = []
    for block in body.decode().split("\n\n"):
        if block and not block.startswith(":"):
            name, payload = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(payload.removeprefix("data: "))))
    return found
