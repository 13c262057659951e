"""Embeddings with OpenAI's own client: from llama.cpp beside its chats, from an upstream, in batches, and refused."""

import io
import json
from collections.abc import Iterator
from decimal import Decimal
from math import sqrt
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.conftest import EMBEDDED
from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until

MODEL = "smollm2-135m-instruct"
TEXTS = ["A cat sleeps on the warm roof.", "A kitten naps on top of the house.", "Interest rates rose by two points."]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, mock: Mock) -> Iterator[Platform]:
    """The real model with embeddings, once more without, and the mock engine as an upstream."""
    with_vectors = EMBEDDED.replace("threads = 1", 'threads = 1\nembeddings = "mean"\ncontext = 512\nparallel = 2')
    without = EMBEDDED.replace(MODEL, "plain").replace("threads = 1", "threads = 1\ncontext = 512\nparallel = 1")
    with start_platform(tmp_path_factory.mktemp("vectors"), with_vectors + without + mock.config()) as platform:
        yield platform


def client_of(platform: Platform, tenant: str) -> OpenAI:
    return OpenAI(base_url=platform.url, api_key=platform.new_tenant(tenant), max_retries=0, timeout=60)


def without_vectors(platform: Platform, **asked: Any) -> Any:
    """What the same weights answer in an engine that gives no embeddings."""
    client = client_of(platform, "without")
    return client.chat.completions.create(model="plain", **asked).choices[0].message.content


def likeness(one: list[float], other: list[float]) -> float:
    """The cosine of the angle between two vectors."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def test_the_embedded_engine_gives_them_and_still_chats(platform: Platform) -> None:
    client = client_of(platform, "own")
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    vectors = [each.embedding for each in answer.data]
    assert [each.index for each in answer.data] == [0, 1, 2] and len({len(vector) for vector in vectors}) == 1
    assert all(likeness(vectors[0], other) < 0.99 for other in vectors[1:])
    single = client.embeddings.create(model=MODEL, input=TEXTS[0]).data[0].embedding
    assert likeness(single, vectors[0]) > 0.999
    plain = client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float").data[0].embedding
    assert likeness(single, plain) > 0.999, "the client asks for base64 by itself"
    question: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    asked: dict[str, Any] = {"messages": question, "max_tokens": 12, "temperature": 0}
    chat = client.chat.completions.create(model=MODEL, **asked)
    assert chat.choices[0].message.content == without_vectors(platform, **asked), "as it chats without"
    records = platform.usage("own")["records"]
    assert [each["completion_tokens"] for each in records] == [0, 0, 0, chat.usage.completion_tokens]
    assert records[0]["prompt_tokens"] == answer.usage.prompt_tokens > 20 and not records[0]["estimated"]
    assert Decimal(records[0]["charge"]) == Decimal(answer.usage.prompt_tokens) / 1_000_000


def test_a_text_that_is_too_long_is_the_clients_fault_and_free(platform: Platform) -> None:
    client = client_of(platform, "long")
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=MODEL, input="word " * 2000)
    assert refused.value.code == "context_length_exceeded"
    assert f"Input (2001 tokens) is longer than {MODEL!r} takes. Shorten" in refused.value.message
    usage = platform.cli("usage", "--tenant", "long")
    assert Decimal(usage["charge"]) == 0


def test_a_model_without_says_so_in_our_words(platform: Platform) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client_of(platform, "plain").embeddings.create(model="plain", input="hello")
    assert refused.value.code == "model_gives_no_embeddings" and refused.value.param == "model"
    assert "The model 'plain' does not support embeddings." in refused.value.message
    assert platform.usage("plain")["records"] == [], "no engine was asked"


def test_the_records_are_the_engines_own_counts(platform: Platform) -> None:
    lines = {each["replica"]: each for each in platform.cli("meter", "reconcile")["replicas"]}
    assert lines[f"{MODEL}/0"]["verdict"] == "equal"


@pytest.mark.parametrize("model", ["mock", MODEL])
def test_a_batch_of_them(platform: Platform, model: str) -> None:
    tenant = f"batch-{model}"
    client = client_of(platform, tenant)
    bodies: list[dict[str, Any]] = [{"model": model, "input": text} for text in TEXTS]
    bodies += [{"model": model, "input": TEXTS}, {"model": "plain", "input": "hello"}]
    lines = [
        json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/embeddings", "body": body})
        for number, body in enumerate(bodies)
    ]
    file = client.files.create(file=("in.jsonl", io.BytesIO("\n".join(lines).encode())), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    wait_until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)
    batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None and batch.error_file_id is not None
    entries = [json.loads(text) for text in client.files.content(batch.output_file_id).text.splitlines()]
    found = {each["custom_id"]: each["response"]["body"] for each in entries}
    assert sorted(found) == ["r0", "r1", "r2", "r3"] and len(found["r3"]["data"]) == 3
    assert likeness(found["r0"]["data"][0]["embedding"], found["r3"]["data"][0]["embedding"]) > 0.999
    (failed,) = [json.loads(text) for text in client.files.content(batch.error_file_id).text.splitlines()]
    assert failed["response"]["body"]["error"]["code"] == "model_gives_no_embeddings"
    prompt = sum(body["usage"]["prompt_tokens"] for body in found.values())
    assert batch.usage is not None and (batch.usage.input_tokens, batch.usage.output_tokens) == (prompt, 0)
    price = Decimal("4.00" if model == "mock" else "1.00") / 2
    assert Decimal(platform.cli("batch", "show", batch.id)["charge"]) == price * prompt / 1_000_000
