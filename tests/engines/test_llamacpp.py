"""llama.cpp's tap: running counts read and taken out, several choices summed, exactly as the engine writes them."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.streams import cut, event, feed, payloads, words
from tidemill.engines.llamacpp import LlamaCppEngine, LlamaCppTap
from tidemill.engines.protocol import Ask, Counters, TokenCounts
from tidemill.engines.sse import BrokenStream

DONE = b"data: [DONE]\n\n"
ENVELOPE = {
    "created": 1,
    "id": "chatcmpl-x",
    "model": "m",
    "system_fingerprint": "b1",
    "object": "chat.completion.chunk",
}


def timings(prompt: int, predicted: int, cached: int = 0) -> dict[str, Any]:
    return {
        "cache_n": cached,
        "prompt_n": prompt - cached,
        "prompt_ms": 12.5,
        "prompt_per_token_ms": 0.5,
        "predicted_n": predicted,
        "predicted_ms": 99.5,
        "predicted_per_second": 1000.25,
    }


def chunk(text: str, predicted: int, index: int = 0, prompt: int = 30, cached: int = 4) -> bytes:
    choice = {"finish_reason": None, "index": index, "delta": {"content": text}}
    return event({"choices": [choice], **ENVELOPE, "timings": timings(prompt, predicted, cached)})


def last(predicted: int, prompt: int = 30, cached: int = 4) -> bytes:
    usage = {
        "completion_tokens": predicted,
        "prompt_tokens": prompt,
        "total_tokens": prompt + predicted,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return event({"choices": [], **ENVELOPE, "usage": usage, "timings": timings(prompt, predicted, cached)})


def tap(*, wants_usage: bool = False, choices: int = 1, prompts: int = 1) -> LlamaCppTap:
    return LlamaCppTap(wants_usage=wants_usage, choices=choices, prompts=prompts)


def test_counts_run_along() -> None:
    running = tap()
    assert not running.begun
    for n in range(1, 6):
        running.feed(chunk("x", n))
        assert (running.counts, running.exact, running.begun) == (TokenCounts(30, 4, n), True, True)


@given(st.data(), st.lists(words, min_size=1, max_size=6), st.booleans())
def test_any_cut_gives_the_same(data: st.DataObject, texts: list[str], wants_usage: bool) -> None:
    stream = b"".join(chunk(text, n + 1) for n, text in enumerate(texts)) + last(len(texts)) + DONE
    reader = tap(wants_usage=wants_usage)
    seen = payloads(feed(reader, data.draw(cut(stream))))
    assert reader.done and reader.counts == TokenCounts(30, 4, len(texts))
    assert not any("timings" in each for each in seen)
    said = [each["choices"][0]["delta"]["content"] for each in seen if each["choices"]]
    assert said == texts
    assert [each["usage"]["completion_tokens"] for each in seen if "usage" in each] == [len(texts)] * wants_usage


@pytest.mark.parametrize("wants_usage", [True, False])
def test_of_several_choices_one_usage_chunk_remains_with_the_sum(wants_usage: bool) -> None:
    stream = [
        chunk("a", 1, 0),
        chunk("b", 1, 1, cached=30),
        chunk("c", 2, 1, cached=30),
        last(1),
        last(2, cached=30),
        DONE,
    ]
    reader = tap(wants_usage=wants_usage, choices=2)
    seen = payloads(feed(reader, stream))
    assert reader.counts == TokenCounts(30, 30, 3)
    reports = [each["usage"] for each in seen if "usage" in each]
    expected = {
        "prompt_tokens": 30,
        "completion_tokens": 3,
        "total_tokens": 33,
        "prompt_tokens_details": {"cached_tokens": 30},
    }
    assert reports == [expected] * wants_usage


def test_a_count_that_several_choices_share_never_falls() -> None:
    reader = tap(choices=2)
    last_seen = 0
    for each in (chunk("a", 1, 0), chunk("a", 2, 0), chunk("b", 1, 1), chunk("b", 2, 1), last(2), last(2)):
        reader.feed(each)
        assert reader.counts.completion >= last_seen
        last_seen = reader.counts.completion
    assert last_seen == 4


def test_an_error_event() -> None:
    reader = tap()
    reader.feed(chunk("x", 1))
    reader.feed(event({"error": {"code": 500, "message": "Compute error.", "type": "server_error"}}) + DONE)
    assert reader.failed and reader.done and reader.counts.completion == 1


def test_a_stream_that_is_cut_off() -> None:
    reader = tap()
    with pytest.raises(BrokenStream):
        feed(reader, [chunk("x", 1), chunk("y", 2)[:40]])
    assert reader.counts.completion == 1


def ask(**fields: Any) -> Ask:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return Ask(
        path=b"/chat/completions",
        fields=raw,
        stream=False,
        wants_usage=False,
        choices=1,
        max_tokens_field="max_tokens",
        max_tokens=None,
    )


def test_what_the_engine_is_asked() -> None:
    fields = {"model": "public", "messages": [1], "temperature": 0.5, "max_completion_tokens": 9, "stream": False}
    body = msgspec.json.decode(LlamaCppEngine().body(ask(**fields), model="inner", output_cap=7))
    assert body == {
        "model": "inner",
        "messages": [1],
        "temperature": 0.5,
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "timings_per_token": True,
    }


def test_no_field_gets_around_the_limit() -> None:
    """llama.cpp takes `n_predict` before `max_tokens`, and `n_cmpl` before `n`; `verbose` spoils the timings."""
    sly = {
        "n_predict": 1000,
        "n_cmpl": 8,
        "verbose": True,
        "id_slot": 3,
        "return_progress": True,
        "timings_per_token": False,
    }
    body = msgspec.json.decode(LlamaCppEngine().body(ask(messages=[1], **sly), model="m", output_cap=7))
    assert set(body) == {"messages", "model", "max_tokens", "stream", "stream_options", "timings_per_token"}
    assert body["timings_per_token"] is True


def test_counters() -> None:
    page = (
        "# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.\n"
        "# TYPE llamacpp:prompt_tokens_total counter\n"
        "llamacpp:prompt_tokens_total 120\nllamacpp:prompt_tokens_cached_total 30\nllamacpp:tokens_predicted_total 55\n"
    )
    assert LlamaCppEngine().counters(page) == Counters(150, 55)
    assert LlamaCppEngine().counters("") is None
