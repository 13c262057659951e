"""The official client on the real model, in every way it asks: what it saw adds up to the ledger, to the token.

The last two tests close the books over all the others.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.platform import Platform

MODEL = "smollm2-135m-instruct"
ASK: list[Any] = [{"role": "user", "content": "Count to twenty."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Seen:
    """The usage that the client saw."""

    def __init__(self) -> None:
        self.requests = self.prompt = self.cached = self.completion = 0

    def add(self, usage: Any) -> Any:
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        self.requests += 1
        self.prompt += usage.prompt_tokens
        self.cached += usage.prompt_tokens_details.cached_tokens
        self.completion += usage.completion_tokens
        return usage


@pytest.fixture(scope="module")
def seen() -> Seen:
    return Seen()


@pytest.fixture(scope="module")
def key(embedded: Platform) -> str:
    return embedded.new_tenant("client")


@pytest.fixture(scope="module")
def client(embedded: Platform, key: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=embedded.url, api_key=key, max_retries=0, timeout=60) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tidemill"


def test_a_whole_answer(client: OpenAI, seen: Seen) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=12)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    usage = seen.add(answer.usage)
    assert answer.choices[0].finish_reason == ("length" if usage.completion_tokens == 12 else "stop")


def test_a_stream_with_its_usage(client: OpenAI, seen: Seen) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("length", "stop")
    assert all(chunk.usage is None for chunk in chunks[:-1])
    seen.add(chunks[-1].usage)


def test_a_stream_that_does_not_ask_for_usage_gets_none_and_is_metered_all_the_same(embedded: Platform) -> None:
    key = embedded.new_tenant("blind")
    with OpenAI(base_url=embedded.url, api_key=key) as client:
        chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=9, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert not any("timings" in chunk.model_dump() for chunk in chunks)
    record = embedded.record("blind")
    produced = sum(bool(chunk.choices[0].delta.content) for chunk in chunks)
    assert produced <= record["completion_tokens"] <= 9
    assert (record["status"], record["estimated"]) == ("ok", False)


@pytest.mark.parametrize("stream", [True, False])
def test_several_choices(client: OpenAI, seen: Seen, stream: bool) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=6, n=2, temperature=1.5, **options
    )
    if stream:
        chunks = list(answer)
        assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        usage = chunks[-1].usage
    else:
        assert [choice.index for choice in answer.choices] == [0, 1]
        usage = answer.usage
    assert seen.add(usage).completion_tokens <= 12


def test_stop_seed_and_temperature(client: OpenAI, seen: Seen) -> None:
    answers = [
        client.chat.completions.create(
            model=MODEL, messages=ASK, max_tokens=30, seed=7, temperature=0, stop=["3", "\n"]
        )
        for _ in range(2)
    ]
    for answer in answers:
        seen.add(answer.usage)
        assert "3" not in (answer.choices[0].message.content or "")
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities(client: OpenAI, seen: Seen, stream: bool) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer: Any = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=5, logprobs=True, top_logprobs=2, temperature=0, **options
    )
    if stream:
        chunks = list(answer)
        tokens = [
            each for chunk in chunks for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content
        ]
        usage = chunks[-1].usage
    else:
        tokens, usage = answer.choices[0].logprobs.content, answer.usage
    assert len(tokens) == seen.add(usage).completion_tokens
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


def test_json_schema(client: OpenAI, seen: Seen) -> None:
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"n": {"type": "integer", "enum": [1, 2]}},
        "required": ["n"],
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    seen.add(answer.usage)
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2)


@pytest.mark.parametrize("stream", [True, False])
def test_tools_are_not_dropped_in_silence(client: OpenAI, stream: bool) -> None:
    """The small model's template knows none, and llama.cpp would leave them out (calls: tests/engines)."""
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER], max_tokens=6, stream=stream)


def test_the_whole_answer_is_the_engines_own(embedded: Platform, seen: Seen, client: OpenAI) -> None:
    """What the gateway puts together from the stream is what the engine says when it is asked for the whole."""
    for more in (
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_object"}, "max_tokens": 20},
        {"stop": ["5"]},
    ):
        body: Any = {"model": MODEL, "messages": ASK, "max_tokens": 16, "temperature": 0, "cache_prompt": False, **more}
        raw = client.post("/chat/completions", body=body, cast_to=httpx.Response)
        ours = raw.json()
        own = httpx.post(f"{embedded.engine_url}/v1/chat/completions", json=body, timeout=60).json()
        usage = own["usage"]
        PAST_THE_GATEWAY.append((usage["prompt_tokens"], usage["completion_tokens"]))
        seen.add(openai.types.CompletionUsage.model_validate(ours["usage"]))
        for answer in (ours, own):
            for choice in answer["choices"]:
                choice.setdefault("logprobs", None)
                for call in choice["message"].get("tool_calls", ()):
                    call.pop("id")
        assert ours["choices"] == own["choices"]
        assert {name: ours["usage"][name] for name in usage} == usage
        assert ours["object"] == own["object"] and ours["model"] == own["model"]


PAST_THE_GATEWAY: list[tuple[int, int]] = []


def test_completions(client: OpenAI, seen: Seen) -> None:
    answer = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=5)
    assert answer.object == "text_completion" and answer.choices[0].text
    seen.add(answer.usage)
    stream = client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    seen.add([chunk.usage for chunk in stream if chunk.usage][-1])


@pytest.mark.parametrize("choices", [1, 2])
def test_completions_of_several_prompts(client: OpenAI, seen: Seen, choices: int) -> None:
    """The prompts differ in length, so a count that is shared out wrongly would show in the engine's own."""
    prompts = ["One, two,", "The tide rises and the tide falls, and the mill turns with", "A"]
    answer = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, n=choices)
    assert [choice.index for choice in answer.choices] == list(range(3 * choices))
    seen.add(answer.usage)


async def test_many_at_once_asynchronously(embedded: Platform, key: str, seen: Seen) -> None:
    async with AsyncOpenAI(base_url=embedded.url, api_key=key, max_retries=0, timeout=60) as client:

        async def whole(n: int) -> Any:
            answer = await client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=3 + n % 5)
            return answer.usage

        async def stream(n: int) -> Any:
            usage = None
            async with client.chat.completions.stream(
                model=MODEL, messages=ASK, max_tokens=3 + n % 5, stream_options={"include_usage": True}
            ) as events:
                async for event in events:
                    if event.type == "chunk":
                        usage = event.chunk.usage or usage
            return usage

        for usage in await asyncio.gather(*(whole(n) if n % 2 else stream(n) for n in range(30))):
            seen.add(usage)


def test_errors_are_those_that_the_client_knows(client: OpenAI, embedded: Platform) -> None:
    with pytest.raises(openai.AuthenticationError, match="does not exist"):
        OpenAI(base_url=embedded.url, api_key="sk-tm-no").models.list()
    with pytest.raises(openai.NotFoundError, match="Did you mean 'smollm2-135m-instruct'"):
        client.chat.completions.create(model="smollm2-135m", messages=ASK)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=-1)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.APIStatusError) as quota:
        poor = embedded.new_tenant("poor", None)
        OpenAI(base_url=embedded.url, api_key=poor, max_retries=0).chat.completions.create(model=MODEL, messages=ASK)
    assert (quota.value.status_code, quota.value.code) == (402, "insufficient_quota")


def test_what_the_client_saw_is_what_the_ledger_says(embedded: Platform, seen: Seen) -> None:
    usage = embedded.cli("usage", "--tenant", "client", "--records")
    counts = tuple(usage[name] for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens"))
    assert counts == (seen.requests, seen.prompt, seen.cached, seen.completion)
    assert {(record["status"], record["estimated"], record["uncollected"]) for record in usage["records"]} == {
        ("ok", False, "0.00")
    }


def test_the_engine_counted_the_same(embedded: Platform) -> None:
    (line,) = embedded.cli("meter", "reconcile")["replicas"]
    own = [sum(each) for each in zip(*PAST_THE_GATEWAY, strict=True)] or [0, 0]
    difference = line["difference"]
    assert [difference["prompt_tokens"], difference["completion_tokens"]] == own, line
