"""The tap of OpenAI-compatible engines: however a stream is cut, the same comes out and the same is counted."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.streams import cut, event, feed, payloads, words
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import MAX_COUNT, MAX_EVENT_BYTES, BrokenStream, SseTap, data_of, usage_of

DONE = b"data: [DONE]\n\n"


def chunk(text: str, **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], **more})


def usage(prompt: int, completion: int, cached: int | None = 0) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}


def last(prompt: int = 7, completion: int = 3, cached: int = 2) -> bytes:
    return event({"choices": [], "usage": usage(prompt, completion, cached)})


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, bool]:
    """A stream, and whether it reports its usage."""
    parts = [chunk(text) for text in draw(st.lists(words, max_size=6))]
    reports = draw(st.booleans())
    for at in draw(st.lists(st.integers(0, len(parts)), max_size=2)):
        parts.insert(at, draw(st.sampled_from([b": ping\n\n", b"event: message\n" + chunk("x"), b"\n\n"])))
    if reports:
        parts.append(last())
    stream = b"".join(parts) + DONE
    return stream.replace(b"\n", draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))), reports


@given(st.data(), streams(), st.booleans())
def test_any_cut_gives_the_same(data: st.DataObject, made: tuple[bytes, bool], wants_usage: bool) -> None:
    stream, reports = made
    whole, cut_up = SseTap(wants_usage=wants_usage), SseTap(wants_usage=wants_usage)
    expected = feed(whole, [stream])
    assert feed(cut_up, data.draw(cut(stream))) == expected
    for tap in (whole, cut_up):
        assert tap.done and not tap.failed
        assert tap.exact is reports
        assert tap.counts == (TokenCounts(7, 2, 3) if reports else TokenCounts())
    assert cut_up._events == whole._events
    assert DONE not in expected.replace(b"\\n", b"") or b"[DONE]" in stream[: -len(DONE)]


@given(st.lists(words, min_size=1, max_size=8))
def test_the_text_arrives(texts: list[str]) -> None:
    tap = SseTap(wants_usage=False)
    out = feed(tap, [b"".join(chunk(text) for text in texts) + last() + DONE])
    assert [each["choices"][0]["delta"]["content"] for each in payloads(out)] == texts


@given(st.lists(words, max_size=8))
def test_bytes_alone_pass_as_they_come(texts: list[str]) -> None:
    """No event waits longer than for its own last byte."""
    tap = SseTap(wants_usage=True)
    stream = [chunk(text) for text in texts]
    for each in stream:
        assert b"".join(tap.feed(each[at : at + 1]) for at in range(len(each) - 1)) == b""
        assert tap.feed(each[-1:]) == each


def test_the_usage_chunk_is_for_who_asked() -> None:
    assert payloads(feed(SseTap(wants_usage=True), [last() + DONE]))[0]["usage"]["completion_tokens"] == 3
    assert feed(SseTap(wants_usage=False), [last() + DONE]) == b""


def test_usage_that_comes_with_a_choice_stays_in_its_chunk() -> None:
    tap = SseTap(wants_usage=False)
    assert feed(tap, [chunk("x", usage=usage(5, 1)) + DONE]) == chunk("x", usage=usage(5, 1))
    assert tap.counts == TokenCounts(5, 0, 1)


def test_the_last_usage_counts() -> None:
    """vLLM's `continuous_usage_stats`: running counts in each chunk."""
    tap = SseTap(wants_usage=False)
    for n in range(1, 5):
        tap.feed(chunk("x", usage=usage(9, n)))
        assert (tap.exact, tap.produced) == (True, n)


@pytest.mark.parametrize(
    ("reported", "counts"),
    [
        (usage(-5, -1, -3), TokenCounts(0, 0, 0)),
        (usage(5, 2, 9), TokenCounts(5, 5, 2)),
        (usage(10**30, 10**30, 10**30), TokenCounts(MAX_COUNT, MAX_COUNT, MAX_COUNT)),
        (usage(5, 2, None), TokenCounts(5, 0, 2)),
        ({}, TokenCounts()),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {}}, TokenCounts(5, 0, 2)),
        ({"prompt_tokens": 5, "total_tokens": 5}, TokenCounts(5, 0, 0)),
    ],
)
def test_usage_objects(reported: dict[str, Any], counts: TokenCounts) -> None:
    tap = SseTap(wants_usage=False)
    tap.feed(event({"choices": [], "usage": reported}))
    assert (tap.counts, tap.exact) == (counts, True)
    assert usage_of(json.dumps({"usage": reported}).encode()) == counts


@pytest.mark.parametrize(
    "bad", ["many", [], 5, {"prompt_tokens": "x"}, {"prompt_tokens": 1.5}, {"prompt_tokens": None}]
)
def test_usage_that_makes_no_sense_is_none(bad: Any) -> None:
    tap = SseTap(wants_usage=False)
    tap.feed(event({"choices": [], "usage": bad}))
    assert not tap.exact
    assert usage_of(json.dumps({"usage": bad}).encode()) is None


def test_a_whole_answer_that_is_not_json() -> None:
    assert usage_of(b"{}") is None
    for broken in (b"", b"<html>", b'{"usage":', b"\xff"):
        with pytest.raises(BrokenStream):
            usage_of(broken)


@pytest.mark.parametrize("error", [{"message": "x"}, "x", 5, [1], {"message": "x", "code": 500, "param": None}])
def test_an_error_event(error: Any) -> None:
    tap = SseTap(wants_usage=False)
    stream = chunk("x") + event({"error": error})
    assert feed(tap, [stream + DONE]) == stream
    assert tap.failed and tap.done


def test_an_error_of_null_is_none() -> None:
    tap = SseTap(wants_usage=False)
    tap.feed(chunk("x", error=None))
    assert not tap.failed


def test_comments_are_no_tokens() -> None:
    tap = SseTap(wants_usage=False)
    for _ in range(50):
        assert tap.feed(b": ping\n\n") == b": ping\n\n"
    assert not tap.begun
    assert tap.produced == 0
    assert tap.estimate(400) == TokenCounts(100, 0, 0)
    tap.feed(b": ping\n\n" + chunk("") + chunk("one") + b": ping\n\n" + chunk("two"))
    assert tap.begun and tap.produced == 2


def test_an_estimate_is_a_token_a_chunk_or_more_for_long_ones() -> None:
    tap = SseTap(wants_usage=False)
    for text in ("", *["word"] * 30):
        tap.feed(chunk(text))
    assert tap.estimate(40) == TokenCounts(10, 0, 30)
    tap = SseTap(wants_usage=False)
    for text in ("", "x" * 400, "x" * 400):
        tap.feed(chunk(text))
    assert 200 <= tap.estimate(40).completion <= 210


@pytest.mark.parametrize("tail", [b"\n", b"", b"\r\n", b"\r"])
def test_a_last_event_without_its_blank_line(tail: bytes) -> None:
    tap = SseTap(wants_usage=False)
    assert feed(tap, [chunk("x") + last() + b"data: [DONE]" + tail]) == chunk("x")
    assert tap.done and tap.counts.completion == 3
    tap = SseTap(wants_usage=False)
    assert feed(tap, [chunk("x").rstrip(b"\n") + tail]) == chunk("x")


@pytest.mark.parametrize("rest", [chunk("x")[:-10], b'{"choices":[]}', b"<html>\n<body>", b"data: x", b"\xff"])
def test_a_stream_that_ends_in_the_middle(rest: bytes) -> None:
    tap = SseTap(wants_usage=False)
    tap.feed(chunk("x") + rest)
    with pytest.raises(BrokenStream):
        tap.end()


def test_an_event_that_never_ends() -> None:
    tap = SseTap(wants_usage=False)
    with pytest.raises(BrokenStream):
        for _ in range(MAX_EVENT_BYTES // 65536 + 2):
            tap.feed(b"data: " + b"x" * 65536)


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"data: x", b"x"),
        (b"data:x", b"x"),
        (b"data:  x", b" x"),
        (b": comment", b""),
        (b"event: ping", b""),
        (b"event: m\ndata: x\nid: 5", b"x"),
        (b"data: a\ndata: b", b"a\nb"),
        (b"", b""),
    ],
)
def test_data_of(raw: bytes, data: bytes) -> None:
    assert data_of(raw) == data
