"""Rankings: what clients of Jina and Cohere send and get, what engines are asked, and what is billed."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.data_plane import Start
from tests.support.plane import Plane
from tests.support.upstream import Asked, Caller, Script
from tests.support.wire import Answer, post
from tidemill.engines.protocol import TokenCounts
from tidemill.gateway.protocols.rerank import (
    MAX_DOCUMENT_BYTES,
    MAX_DOCUMENTS,
    MAX_QUERY_BYTES,
    RerankReply,
    read_rerank,
)
from tidemill.ledger.components import Component
from tidemill.ledger.pricing import Price
from tidemill.ledger.usage import RequestStatus
from tidemill.meter.records import Settled
from tidemill.store.prices import set_price

DOCUMENTS = ["a cat", "interest rates", {"text": "a kitten", "id": 7}, "d\u00e9j\u00e0 vu"]
SCORES = {0: 0.9, 1: -3.5, 2: 0.95, 3: 0.1}
PER_TOKEN = Price.of(input=50_000_000)
"""0.05 a million: 50 nanos a token."""
PER_SEARCH = Price.of(search=2_000_000_000)
PER_DOCUMENT = Price.of(document=500_000_000, request=1_000_000)
"""0.50 a thousand, and 0.001 a thousand requests."""


def ranks(scores: dict[int, float] | None = None, **more: Any) -> Script:
    """An engine that gives these scores, in the order of the documents."""
    found = SCORES if scores is None else scores
    results = [{"index": index, "relevance_score": score} for index, score in found.items()]

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"model": "mock-upstream", "results": results, **more})

    return script


LLAMACPP = ranks(object="list", usage={"prompt_tokens": 60, "total_tokens": 60})
JINA = ranks(usage={"total_tokens": 60})
COHERE = ranks(id="x", meta={"api_version": {"version": "2"}, "billed_units": {"search_units": 3}})


async def priced(plane: Plane, price: Price) -> None:
    with plane.store.write() as connection:
        set_price(connection, model="mock", currency="USD", price=price, now=datetime.now(UTC))
    await plane.authenticator.renew()


async def rank(plane: Plane, path: str = "/v1/rerank", **more: Any) -> Answer:
    body = {"model": "mock", "query": "cats", "documents": DOCUMENTS, **more}
    return await plane.send(post(path, body, plane.key))


async def test_the_best_come_first_with_their_texts_as_jinas_clients_read_them(start: Start) -> None:
    plane, upstream = await start(LLAMACPP)
    answer = await rank(plane, top_n=3)
    assert answer.status == 200
    found = answer.json
    assert found["results"] == [
        {"index": 2, "relevance_score": 0.95, "document": {"text": "a kitten", "id": 7}},
        {"index": 0, "relevance_score": 0.9, "document": {"text": "a cat"}},
        {"index": 3, "relevance_score": 0.1, "document": {"text": "d\u00e9j\u00e0 vu"}},
    ]
    assert (found["model"], found["object"]) == ("mock", "list")
    assert found["usage"] == {"prompt_tokens": 60, "total_tokens": 60}
    (asked,) = upstream.asked
    assert asked.head.startswith(b"POST /v1/rerank HTTP/1.1\r\n")
    assert asked.json == {
        "model": "mock-upstream",
        "query": "cats",
        "documents": ["a cat", "interest rates", "a kitten", "d\u00e9j\u00e0 vu"],
        "top_n": 3,
    }


async def test_cohere_v2_gets_no_texts_and_its_search_units(start: Start) -> None:
    plane, _ = await start(LLAMACPP)
    found = (await rank(plane, "/v2/rerank")).json
    assert found["results"][0] == {"index": 2, "relevance_score": 0.95}
    assert len(found["results"]) == 4
    assert found["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    assert found["id"].startswith("req_")
    without = (await rank(plane, return_documents=False)).json
    assert "document" not in without["results"][0]
    asked_for = (await rank(plane, "/v2/rerank", return_documents=True)).json
    assert asked_for["results"][1]["document"] == {"text": "a cat"}


# What is billed


@pytest.mark.parametrize("engine", [LLAMACPP, JINA])
async def test_per_token_by_what_the_engine_reports(start: Start, engine: Script) -> None:
    plane, _ = await start(engine)
    await priced(plane, PER_TOKEN)
    assert (await rank(plane)).status == 200
    record = await plane.record()
    assert (record.prompt, record.completion, record.charge, record.estimated) == (60, 0, 60 * 50, False)
    assert record.more == {Component.SEARCH: (1, None), Component.DOCUMENT: (4, None)}
    assert record.uncollected == 0


async def test_per_search_one_for_each_hundred_documents(start: Start) -> None:
    plane, _ = await start(ranks({0: 1.0}, usage={"total_tokens": 900}))
    await priced(plane, PER_SEARCH)
    answer = await rank(plane, documents=["x"] * 201)
    assert answer.json["meta"]["billed_units"] == {"search_units": 3}
    record = await plane.record()
    assert record.more == {Component.SEARCH: (3, 6_000_000), Component.DOCUMENT: (201, None)}
    assert (record.charge, record.prompt, record.charge_input) == (6_000_000, 900, 0)


async def test_per_search_as_many_as_the_upstream_bills(start: Start) -> None:
    plane, _ = await start(COHERE)
    await priced(plane, PER_SEARCH)
    long = "word " * 40_000  # counts as some hundred documents
    answer = await rank(plane, documents=[long, "b", "c", "d"])
    assert answer.json["meta"]["billed_units"] == {"search_units": 3}
    record = await plane.record()
    assert record.more[Component.SEARCH] == (3, 6_000_000)
    assert (record.charge, record.uncollected) == (6_000_000, 0)
    assert record.estimated, "it has told no tokens"


async def test_an_upstream_that_bills_more_than_can_be_is_the_operators_loss(start: Start) -> None:
    plane, _ = await start(ranks(meta={"billed_units": {"search_units": 1000}}))
    await priced(plane, PER_SEARCH)
    await rank(plane)
    record = await plane.record()
    assert record.charge == record.hold < record.charge + record.uncollected == 1000 * 2_000_000


async def test_per_document_and_request(start: Start) -> None:
    plane, _ = await start(LLAMACPP)
    await priced(plane, PER_DOCUMENT)
    await rank(plane)
    record = await plane.record()
    assert record.more == {
        Component.SEARCH: (1, None),
        Component.DOCUMENT: (4, 4 * 500_000),
        Component.REQUEST: (1, 1000),
    }
    assert record.charge == 4 * 500_000 + 1000


async def test_an_engine_that_tells_nothing_is_billed_by_a_bounded_count(start: Start) -> None:
    plane, _ = await start(ranks())
    await priced(plane, PER_TOKEN)
    await rank(plane)
    record = await plane.record()
    assert record.estimated and record.completion == 0
    assert 0 < record.prompt < len(json.dumps(DOCUMENTS)) + 4 * len('"cats"')
    assert record.uncollected == 0


async def test_the_hold_covers_a_query_that_is_read_with_each_document(start: Start) -> None:
    query = "q" * 1000
    plane, _ = await start(ranks({0: 1.0}, usage={"total_tokens": 100 * 1000}))
    await priced(plane, PER_TOKEN)
    assert (await rank(plane, query=query, documents=["x"] * 100)).status == 200
    record = await plane.record()
    assert (record.prompt, record.uncollected) == (100_000, 0)


async def test_a_balance_that_does_not_cover_it_is_refused_before_the_engine_is_asked(start: Start) -> None:
    plane, upstream = await start(LLAMACPP, credit="0.001")
    await priced(plane, PER_SEARCH)
    answer = await rank(plane)
    assert (answer.status, answer.error["code"]) == (402, "insufficient_quota")
    assert not upstream.asked


async def test_an_engine_that_fails_costs_nothing(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"error": {"message": "this model ranks nothing", "type": "invalid_request_error"}}, 400)

    plane, _ = await start(script)
    await priced(plane, PER_DOCUMENT)
    answer = await rank(plane)
    assert answer.status == 400
    record = await plane.record()
    assert (record.status, record.charge, record.more) == (RequestStatus.ENGINE_ERROR, 0, {})


@pytest.mark.parametrize(
    "results",
    [
        [{"index": 4, "relevance_score": 1}],
        [{"index": -1, "relevance_score": 1}],
        [{"index": 0, "relevance_score": 1}, {"index": 0, "relevance_score": 2}],
        [{"index": 0, "relevance_score": None}],
        "none",
    ],
)
async def test_what_is_no_ranking_of_these_documents_is_not_passed_on_and_not_billed(
    start: Start, results: object
) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"results": results, "usage": {"total_tokens": 60}})

    plane, _ = await start(script)
    await priced(plane, PER_DOCUMENT)
    answer = await rank(plane)
    assert answer.status in (502, 503) and answer.error
    record: Settled = await plane.record()
    assert (record.status, record.charge, record.uncollected) == (RequestStatus.ENGINE_LOST, 0, 0)


# What is refused


@pytest.mark.parametrize(
    ("changes", "words", "param"),
    [
        ({"query": None}, "'query' must be a non-empty string", "query"),
        ({"query": ""}, "'query' must be a non-empty string", "query"),
        ({"query": {"text": "x"}}, "'query' must be a non-empty string", "query"),
        ({"query": "q" * MAX_QUERY_BYTES}, f"at most {MAX_QUERY_BYTES} are allowed", "query"),
        ({"documents": []}, "'documents' must be a non-empty list", "documents"),
        ({"documents": "a text"}, "'documents' must be a non-empty list", "documents"),
        ({"documents": ["x"] * (MAX_DOCUMENTS + 1)}, f"at most {MAX_DOCUMENTS} are allowed", "documents"),
        ({"documents": ["x", 7]}, "'documents[1]' must be a string or an object", "documents[1]"),
        ({"documents": [{"title": "x"}]}, "'documents[0]' must be a string or an object", "documents[0]"),
        ({"documents": ["x" * MAX_DOCUMENT_BYTES]}, f"at most {MAX_DOCUMENT_BYTES} are allowed", "documents[0]"),
        ({"top_n": 0}, "'top_n' is 0, but must be from 1", "top_n"),
        ({"top_n": "3"}, "'top_n' must be an integer", "top_n"),
        ({"return_documents": "yes"}, "'return_documents' must be true or false", "return_documents"),
        ({"model": 5}, "'model' must be a non-empty string", "model"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
async def test_a_request_that_cannot_be_taken(
    start: Start, changes: dict[str, Any], words: str, param: str, path: str
) -> None:
    plane, upstream = await start(LLAMACPP)
    answer = await rank(plane, path, **changes)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert words in answer.error["message"]
    assert not upstream.asked


async def test_what_is_missing_is_named(start: Start) -> None:
    plane, _ = await start(LLAMACPP)
    for field in ("model", "query", "documents"):
        body = {"model": "mock", "query": "cats", "documents": ["x"]}
        del body[field]
        answer = await plane.send(post("/v1/rerank", body, plane.key))
        assert (answer.status, answer.error["param"]) == (400, field)
        assert f"'{field}' is missing" in answer.error["message"]


async def test_a_model_that_ranks_nothing_says_so_and_its_engine_is_not_asked(start: Start) -> None:
    plane, upstream = await start(LLAMACPP, ranks=False)
    answer = await rank(plane)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "model_ranks_no_documents", "model")
    assert not upstream.asked


async def test_what_llamacpp_would_leave_out_is_refused_by_name(start: Start) -> None:
    plane, _ = await start(LLAMACPP, engine="llamacpp")
    answer = await rank(plane, max_tokens_per_doc=100)
    assert (answer.status, answer.error["param"]) == (400, "max_tokens_per_doc")


# Any texts


texts = st.text(max_size=20)


@given(st.lists(texts | st.builds(lambda text: {"text": text, "n": 1}, texts), min_size=1, max_size=6), st.data())
def test_each_document_goes_back_as_it_came(documents: list[Any], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(documents))))
    body = json.dumps({"model": "m", "query": "q", "documents": documents}).encode()
    request = read_rerank(body)
    assert json.loads(bytes(request.ask.fields["documents"])) == [
        each if isinstance(each, str) else each["text"] for each in documents
    ]
    engine = {"results": [{"index": index, "relevance_score": -place} for place, index in enumerate(order)]}
    found = json.loads(RerankReply(request, "req_1").whole(json.dumps(engine).encode(), TokenCounts()))
    assert [each["index"] for each in found["results"]] == order
    for each in found["results"]:
        sent = documents[each["index"]]
        assert each["document"] == ({"text": sent} if isinstance(sent, str) else sent)
