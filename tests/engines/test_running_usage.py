"""vLLM's and SGLang's streams: running counts read and taken out, priorities, and what tenants may not set."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.contract import contract
from tests.engines.streams import cut, event, feed, payloads, words
from tidemill.engines.capabilities import refusal
from tidemill.engines.protocol import Ask, Counters, TokenCounts
from tidemill.engines.registry import engine_of
from tidemill.engines.running_usage import FILLER_PRIORITY, RunningUsageEngine, RunningUsageTap
from tidemill.engines.sglang import SglangEngine
from tidemill.engines.vllm import VllmEngine

RECORDINGS = Path(__file__).parent / "recordings"
DONE = b"data: [DONE]\n\n"
HEAD = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def usage(prompt: int, completion: int, cached: int | None = None) -> dict[str, Any]:
    details = None if cached is None else {"cached_tokens": cached}
    total = prompt + completion
    return {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": completion} | {
        "prompt_tokens_details": details
    }


def chunk(text: str, completion: int, index: int = 0, prompt: int = 30, **after: Any) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return event({**HEAD, "choices": [choice], "usage": usage(prompt, completion), **after})


def last(completion: int, prompt: int = 30, cached: int = 16) -> bytes:
    return event({**HEAD, "choices": [], "usage": usage(prompt, completion, cached)})


def tap(
    *, wants_usage: bool = False, wants_running: bool = False, choices: int = 1, prompts: int = 1
) -> RunningUsageTap:
    return RunningUsageTap(wants_usage=wants_usage, wants_running=wants_running, choices=choices, prompts=prompts)


def ask(*, filler: bool = False, generates: bool = True, **fields: Any) -> Ask:
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}
    return Ask(
        path=b"/chat/completions",
        fields=raw,
        stream=False,
        wants_usage=False,
        choices=1,
        max_tokens_field="max_tokens",
        max_tokens=None,
        generates=generates,
        filler=filler,
    )


def sent(engine: RunningUsageEngine, given: Ask) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(engine.body(given, model="m", output_cap=7))
    return found


def test_counts_run_along_and_stay_with_us() -> None:
    running = tap()
    for n in range(1, 6):
        out = running.feed(chunk(f"w{n}", n))
        assert (running.exact, running.counts) == (True, TokenCounts(30, 0, n))
        assert "usage" not in payloads(out)[0]
    assert running.feed(last(5) + DONE) == b""
    assert running.done and running.counts == TokenCounts(30, 16, 5)


def test_a_client_gets_the_usage_that_it_asks_for() -> None:
    events = chunk("a", 1) + last(1)
    assert [("usage" in each) for each in payloads(tap(wants_usage=True).feed(events))] == [False, True]
    everywhere = tap(wants_usage=True, wants_running=True)
    assert everywhere.feed(events) == events


def test_something_after_the_usage_does_not_matter() -> None:
    running = tap()
    [found] = payloads(running.feed(chunk("a", 3, system_fingerprint="f", sglext={"x": 1})))
    assert running.counts == TokenCounts(30, 0, 3)
    assert "usage" not in found and found["sglext"] == {"x": 1} and found["choices"][0]["delta"]["content"] == "a"


def test_choices_are_added_up_and_share_their_prompt() -> None:
    running = tap(choices=2)
    running.feed(chunk("a", 2, index=0) + chunk("b", 5, index=1) + chunk("a", 3, index=0))
    assert running.counts == TokenCounts(30, 0, 8)


def test_several_prompts_count_each() -> None:
    running = tap(choices=4, prompts=2)
    for index, prompt in enumerate((10, 10, 25, 25)):
        running.feed(chunk("a", 1, index=index, prompt=prompt))
    assert running.counts == TokenCounts(35, 0, 4)


@given(data=st.data(), texts=st.lists(words, min_size=1, max_size=6))
def test_however_the_bytes_come(data: st.DataObject, texts: list[str]) -> None:
    stream = b"".join(chunk(text, n) for n, text in enumerate(texts, 1)) + last(len(texts)) + DONE
    running = tap()
    found = payloads(feed(running, data.draw(cut(stream))))
    assert [each["choices"][0]["delta"]["content"] for each in found] == texts
    assert all("usage" not in each for each in found)
    assert running.counts == TokenCounts(30, 16, len(texts)) and running.done


def test_an_error_in_the_stream_is_seen() -> None:
    running = tap()
    running.feed(chunk("a", 1) + event({"error": {"message": "out of memory", "code": 500}}))
    assert running.failed and running.counts.completion == 1


@pytest.mark.parametrize("engine", [VllmEngine(), SglangEngine()], ids=lambda each: each.kind)
def test_ours_are_asked_for_a_stream_with_running_counts(engine: RunningUsageEngine) -> None:
    found = sent(engine, ask(messages=[], max_completion_tokens=9000, priority=-5, stream_options={"x": 1}))
    assert found["stream"] is True and found["max_tokens"] == 7 and "max_completion_tokens" not in found
    assert found["stream_options"] == {"x": 1, "include_usage": True, "continuous_usage_stats": True}
    assert "priority" not in found, "a tenant must not jump the queue"
    assert engine.owned and engine.collects


@pytest.mark.parametrize("engine", [VllmEngine, SglangEngine])
def test_what_can_wait_is_sent_with_a_priority_where_the_engine_has_them(engine: type[RunningUsageEngine]) -> None:
    with_priorities, without = engine(priority_scheduling=True), engine()
    assert sent(with_priorities, ask(messages=[], filler=True))["priority"] == FILLER_PRIORITY
    assert "priority" not in sent(with_priorities, ask(messages=[]))
    assert "priority" not in sent(without, ask(messages=[], filler=True))


@pytest.mark.parametrize("engine", [VllmEngine(), SglangEngine()], ids=lambda each: each.kind)
def test_embeddings_are_not_streamed(engine: RunningUsageEngine) -> None:
    assert sent(engine, ask(input=["a"], generates=False)) == {"input": ["a"], "model": "m"}


@pytest.mark.parametrize("engine", [VllmEngine(), SglangEngine()], ids=lambda each: each.kind)
def test_what_we_take_out_and_put_in_are_fields_of_the_real_engine(engine: RunningUsageEngine) -> None:
    recorded = contract(engine.kind)["request_fields"]
    known = set(recorded["chat"]) | set(recorded["completion"])
    assert set(engine.not_for_tenants) <= known
    assert {"stream", "stream_options", "max_tokens", "max_completion_tokens", "priority", "n"} <= known


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_is_ignored_in_silence_is_refused(kind: str) -> None:
    found = refusal(engine_of(kind), (), ask(messages=[], web_search_options={}))
    assert found is not None and found.parameter == "web_search_options"
    assert refusal(engine_of(kind), (), ask(messages=[], temperature=0.5)) is None


@pytest.mark.parametrize("engine", [VllmEngine(), SglangEngine()], ids=lambda each: each.kind)
def test_counters_are_the_real_engines(engine: RunningUsageEngine) -> None:
    names = {name.removesuffix("_total") for name in contract(engine.kind)["metrics"]}
    assert {f"{engine.kind}:prompt_tokens", f"{engine.kind}:generation_tokens"} <= names
    page = (
        f'{engine.kind}:prompt_tokens_total{{engine="0",model_name="m"}} 10.0\n'
        f'{engine.kind}:prompt_tokens_total{{engine="1",model_name="m"}} 5.0\n'
        f'{engine.kind}:generation_tokens_total{{engine="0",model_name="m"}} 7.0\n'
    )
    assert engine.counters(page) == Counters(15, 7)
    assert engine.counters("<html>") is None


@pytest.mark.parametrize(
    ("name", "choices", "prompts", "counts"),
    [
        ("chat", 1, 1, TokenCounts(93, 0, 24)),
        ("two", 2, 1, TokenCounts(93, 0, 48)),
        ("prompts", 2, 2, TokenCounts(9, 0, 48)),
        ("cached", 1, 1, TokenCounts(437, 384, 24)),
    ],
)
@given(data=st.data())
def test_streams_of_a_real_vllm(
    name: str, choices: int, prompts: int, counts: TokenCounts, data: st.DataObject
) -> None:
    """Recorded from vLLM 0.32.0 on CPUs, started by `engines.vllm.command`, asked with `VllmEngine.body`: a tiny model
    with random weights, 24 tokens a choice.
    """
    stream = (RECORDINGS / f"vllm-{name}.sse").read_bytes()
    running = tap(wants_usage=True, choices=choices, prompts=prompts)
    found = payloads(feed(running, data.draw(cut(stream))))
    assert (running.counts, running.exact, running.done) == (counts, True, True)
    assert [each["choices"] for each in found if "usage" in each] == [[]]
    assert found[-1]["usage"]["completion_tokens"] == counts.completion
