"""What is refused at the door of a platform that really runs, and what the real engine refuses. Never a 5xx."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.mock import Mock
from tests.support.platform import Platform
from tests.support.wire import Line, post

MODEL = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(running: Platform) -> Any:
    headers = {"authorization": f"Bearer {running.new_tenant('refused')}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=60) as client:
        yield client


def error_of(answer: httpx.Response, *statuses: int) -> Any:
    assert answer.status_code in statuses, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10 and error["message"][-1] in ".?!"
    return error


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/chat/completions", json={"model": MODEL, "messages": HI, "max_tokens": 4, **fields})


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_longer_than_the_context(client: httpx.Client, stream: bool) -> None:
    error = error_of(chat(client, messages=[{"role": "user", "content": "word " * 6000}], stream=stream), 400)
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"] and "Shorten" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}
            ]
        },
        {"messages": [3]},
        {"messages": [{"foo": 1}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"temperature": "hot"},
        {"stop": 5},
        {"response_format": {"type": "banana"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "banana"}}}},
        {"grammar": "root ::= ("},
        {"logit_bias": "x"},
        {"tools": "x"},
        {"tools": [1]},
        {"tool_choice": "banana", "tools": []},
        {"n": 9},
        {"logprobs": "yes"},
        {"top_logprobs": -1, "logprobs": True},
        {"seed": "x"},
        {"seed": -(2**70)},
        {"chat_template_kwargs": 5},
        {"samplers": 5},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_what_the_engine_does_not_take_is_no_failure_of_ours(client: httpx.Client, fields: dict[str, Any]) -> None:
    """It may be served where llama.cpp is lenient; if it is refused, then with a 4xx in the API's shape."""
    for stream in (False, True):
        answer = chat(client, stream=stream, **fields)
        if answer.status_code != 200:
            error_of(answer, *range(400, 500))


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"\xc3(", b"\\ud83d", b"\\udca9\\ud83d", b"\xed\xa0\x80", b"a\x00b", b"a\nb"]
)
@pytest.mark.parametrize(
    "where", [b'"messages":[{"role":"user","content":"%b"}]', b'"messages":[{"role":"user","content":"x"}],"stop":"%b"']
)
def test_raw_bytes_that_are_no_text(client: httpx.Client, text: bytes, where: bytes) -> None:
    body = b'{"model":"%b","max_tokens":2,%b}' % (MODEL.encode(), where % text)
    error_of(client.post("/chat/completions", content=body), 400)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_of_100_mb(running: Platform, client: httpx.Client, chunked: bool) -> None:
    piece = b"x" * 1_000_000
    content: Any = (piece for _ in range(100)) if chunked else piece * 100
    error = error_of(client.post("/chat/completions", content=content), 413)
    assert "32 MiB" in error["message"]


def test_a_key_until_it_is_revoked(running: Platform) -> None:
    key = running.new_tenant("fickle")
    made = running.cli("key", "create", "--tenant", "fickle")
    for each in (key, made["key"]):
        assert httpx.get(f"{running.url}/models", headers={"authorization": f"Bearer {each}"}).status_code == 200
    running.cli("key", "revoke", made["id"])
    answer = httpx.get(f"{running.url}/models", headers={"authorization": f"Bearer {made['key']}"})
    assert "revoked" in error_of(answer, 401)["message"]
    assert httpx.get(f"{running.url}/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


async def test_two_hundred_at_once_on_a_balance_for_ten(running: Platform, mock: Mock) -> None:
    """Exactly: at most what the balance pays for, the rest 402, and nothing is left hanging."""
    fields: Any = {"model": "mock", "messages": HI, "max_tokens": 100, "mock": {"prompt_tokens": 50, "ttft_ms": 50}}
    size = len(json.dumps(fields))
    hold = (size + 256) * 4_000 + 100 * 16_000 + 2  # nanos, at the mock's prices
    key = running.new_tenant("ten", f"{hold * 10 / 1e9:.9f}")

    async def one() -> int:
        line = await Line.open(running.port)
        await line.send(post(CHAT, fields, key))
        answer = await line.answer(within_s=30)
        if answer.status != 200:
            assert answer.error["code"] == "insufficient_quota"
        line.close()
        return answer.status

    statuses = await asyncio.gather(*(one() for _ in range(200)))
    served = statuses.count(200)
    assert 1 <= served <= 24 and statuses.count(402) == 200 - served
    usage = running.usage("ten")
    assert usage["requests"] == served
    assert usage["charge"] == f"{served * (50 * 4_000 + 100 * 16_000) / 1e9:.9f}".rstrip("0")
    assert float(usage["balance"]) >= 0
    running.cli("credit", "grant", "--tenant", "ten", "--amount", f"{hold / 1e9:.9f}")
    assert await one() == 200, "the rest and what was added are free again"


def test_a_long_stream_that_eats_the_last_of_the_balance(running: Platform) -> None:
    key = running.new_tenant("last-drop", "0.0002")
    body = {"model": MODEL, "messages": HI, "stream": True, "ignore_eos": True, "max_tokens": 2000}
    with httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        events = client.post(f"{running.url}/chat/completions", json=body).text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert error["code"] == "insufficient_quota"
        record = running.record("last-drop")
        assert (record["status"], record["estimated"], record["uncollected"]) == ("balance_exhausted", False, "0.00")
        assert 50 < record["completion_tokens"] < 120
        usage = running.usage("last-drop")
        assert 0 <= float(usage["balance"]) < 0.00005
        error_of(client.post(f"{running.url}/chat/completions", json={**body, "stream": False}), 402)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = [
    "messages",
    "prompt",
    "stop",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "logprobs",
    "top_logprobs",
    "tools",
]
NAMES += ["tool_choice", "response_format", "logit_bias", "user", "stream", "stream_options", "frequency_penalty"]
NAMES += ["presence_penalty", "min_p", "samplers", "grammar", "json_schema", "chat_template_kwargs", "reasoning_format"]
NAMES += [
    "n_predict",
    "n_cmpl",
    "cache_prompt",
    "id_slot",
    "lora",
    "mirostat",
    "dry_multiplier",
    "repeat_last_n",
    "n_keep",
]


@pytest.mark.slow
def test_no_request_breaks_the_real_engine(running: Platform, client: httpx.Client) -> None:
    """Any JSON in any field: 200 or 4xx, the same engine process stays up, and each record is exact."""
    engine = running.pids("engine")
    pieces = st.dictionaries(st.sampled_from(NAMES), json_values, min_size=1, max_size=3)

    @examples(1.2)
    @given(pieces)
    def throw(fields: dict[str, Any]) -> None:
        body = {"model": MODEL, "messages": HI, **fields, "max_tokens": 2}
        answer = client.post("/chat/completions", content=json.dumps(body).encode())
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (body, answer.text)

    throw()
    assert running.pids("engine") == engine
    assert not any(
        record["estimated"] or record["uncollected"] != "0.00" for record in running.usage("refused")["records"]
    )
