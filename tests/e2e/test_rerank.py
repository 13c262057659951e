"""A ranking on the embedded engine, from the request to the invoice: priced per search and per token."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.conftest import EMBEDDED
from tests.support.platform import Platform, start_platform

MODEL = "smollm2-135m-instruct"
DOCUMENTS = ["A cat sleeps on the warm roof.", "Interest rates rose by two points.", "A kitten naps."]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """The real model as a ranker: its scores are worth nothing, and its counts are exact."""
    config = EMBEDDED.replace("threads = 1", "threads = 1\nreranking = true\ncontext = 512\nparallel = 2")
    priced = config.replace(f"[prices.{MODEL}]", f'[prices.{MODEL}]\nsearch = "2.00"\nbatch_search = "0.50"')
    assert priced != config != EMBEDDED
    with start_platform(tmp_path_factory.mktemp("ranking"), priced) as platform:
        yield platform


def rank(platform: Platform, key: str, path: str, **body: Any) -> httpx.Response:
    root = platform.url.removesuffix("/v1")
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(root + path, json={"model": MODEL, "query": "cats", **body}, headers=headers, timeout=60)


def test_it_ranks_bills_and_still_chats(platform: Platform) -> None:
    key = platform.new_tenant("ranker")
    whole = rank(platform, key, "/v1/rerank", documents=DOCUMENTS).raise_for_status().json()
    assert sorted(each["index"] for each in whole["results"]) == [0, 1, 2]
    scores = [each["relevance_score"] for each in whole["results"]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    assert {each["document"]["text"] for each in whole["results"]} == set(DOCUMENTS)
    best = rank(platform, key, "/v2/rerank", documents=DOCUMENTS, top_n=1).raise_for_status().json()
    assert best["results"] == [{name: whole["results"][0][name] for name in ("index", "relevance_score")}]

    usage = platform.usage("ranker")
    assert [each["prompt_tokens"] for each in usage["records"]] == [whole["usage"]["total_tokens"]] * 2
    assert not any(each["estimated"] for each in usage["records"])
    tokens = Decimal(2 * whole["usage"]["total_tokens"]) / 1_000_000  # at 1.00
    assert Decimal(usage["charge"]) == tokens + Decimal("0.004")
    assert usage["components"] == {
        "search": {"quantity": 2, "charge": "0.004"},
        "document": {"quantity": 6, "charge": "0.00"},
    }
    invoice = platform.cli("invoice", "--tenant", "ranker")
    kinds = {line["kind"]: line for line in invoice["lines"]}
    assert list(kinds) == ["input", "search"]
    search = kinds["search"]
    assert (search["quantity"], search["unit"], search["price"], search["price_per"], search["amount"]) == (
        *(2, "searches", "2.00", 1000),
        "0.004",
    )
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    answer = httpx.post(
        f"{platform.url}/chat/completions", json=chat, headers={"authorization": f"Bearer {key}"}, timeout=60
    )
    assert answer.status_code == 200


def test_documents_that_are_too_long_are_the_clients_fault_and_free(platform: Platform) -> None:
    key = platform.new_tenant("long")
    refused = rank(platform, key, "/v1/rerank", documents=["word " * 2000])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert Decimal(platform.cli("usage", "--tenant", "long")["charge"]) == 0


def test_an_embedding_of_a_ranker_is_refused(platform: Platform) -> None:
    key = platform.new_tenant("vectors")
    refused = httpx.post(
        f"{platform.url}/embeddings",
        json={"model": MODEL, "input": "x"},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    assert refused.json()["error"]["code"] == "model_gives_no_embeddings"


def test_the_records_are_the_engines_own_counts(platform: Platform) -> None:
    lines = {each["replica"]: each for each in platform.cli("meter", "reconcile")["replicas"]}
    assert lines[f"{MODEL}/0"]["verdict"] == "equal"
