"""Reranking: POST /v1/rerank of Jina and Cohere, and /v2/rerank of Cohere.

Both ask alike, and an answer has what either looks for: `usage` of Jina, `meta` of Cohere. Engines are sent texts only,
and which documents go back is decided here, so that each engine does the same. Sources: Jina's "Reranker API", Cohere's
"Rerank" v1 and v2, and "How does Cohere's pricing work?" for the search unit.
"""

from collections.abc import Callable

import msgspec

from tidemill.engines.protocol import Ask, TokenCounts
from tidemill.engines.sse import BrokenStream
from tidemill.gateway.errors import BadRequest
from tidemill.gateway.protocols.json_fields import (
    Fields,
    boolean,
    given,
    integer,
    is_filled_list,
    kind,
    read_object,
    string,
)
from tidemill.gateway.protocols.reply import OpenAIReply
from tidemill.gateway.protocols.request import ModelRequest

MAX_DOCUMENTS = 2048
MAX_QUERY_BYTES = 32 * 1024
"""As JSON. It is read anew with each document."""
MAX_DOCUMENT_BYTES = 1024 * 1024
"""Of one document, as JSON."""
DOCUMENTS_PER_SEARCH = 100
CHUNK_TOKENS = 500
"""Cohere's search unit: a query with up to a hundred documents, of which a longer one counts as several."""
PAIR_TOKENS = 8
"""What an engine sets around and between query and document."""

_encode = msgspec.json.Encoder().encode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _Document(msgspec.Struct):
    text: str


_decode_document = msgspec.json.Decoder(_Document).decode


class RankRequest(ModelRequest, kw_only=True):
    """A query, and the documents to be ranked by it."""

    documents: list[msgspec.Raw]
    """As the client has sent them: strings, or objects with a `text`."""
    top_n: int
    """How many results it wants."""
    returns_documents: bool
    version: str
    """Of Cohere's API: `1` or `2`."""


def read_rerank(body: bytes) -> ModelRequest:
    """Parse the body of POST /v1/rerank. Raises BadRequest."""
    return read_object(body, _reader(len(body), "1"))


def read_rerank_v2(body: bytes) -> ModelRequest:
    """Parse the body of POST /v2/rerank. Raises BadRequest.

    Documents are returned only on request.
    """
    return read_object(body, _reader(len(body), "2"))


def _reader(body_bytes: int, version: str) -> Callable[[Fields], RankRequest]:
    def read(fields: Fields) -> RankRequest:
        return _read(fields, body_bytes, version)

    return read


def _read(fields: Fields, body_bytes: int, version: str) -> RankRequest:
    model = string(fields, "model")
    query = _query(fields)
    documents = _documents(fields)
    count, query_bytes = len(documents), memoryview(query).nbytes
    top_n = integer(fields, "top_n", low=1, high=2**31 - 1) or count
    returns = boolean(fields, "return_documents") if given(fields, "return_documents") else version == "1"
    asked = {name: value for name, value in fields.items() if name != "return_documents"}
    asked["documents"] = msgspec.Raw(_encode([_text_of(document, at) for at, document in enumerate(documents)]))
    # A longer document is cut into chunks, each with the query; a token has at least a byte.
    chunks = count + (memoryview(asked["documents"]).nbytes + count * query_bytes) // CHUNK_TOKENS
    ask = Ask(
        path=b"/rerank",
        fields=asked,
        stream=False,
        wants_usage=False,
        choices=1,
        max_tokens_field="",
        max_tokens=None,
        prompts=count,
        generates=False,
        documents=count,
        searches=-(-count // DOCUMENTS_PER_SEARCH),
        searches_bound=-(-chunks // DOCUMENTS_PER_SEARCH),
    )
    return RankRequest(
        model,
        ask,
        body_bytes + count * (query_bytes + PAIR_TOKENS),
        documents=documents,
        top_n=min(top_n, count),
        returns_documents=returns,
        version=version,
    )


def _query(fields: Fields) -> msgspec.Raw:
    query = fields.get("query")
    if query is None or kind(query) != ord('"') or bytes(query) == b'""':
        what = "is missing" if query is None else "must be a non-empty string"
        raise BadRequest(f"'query' {what}.", hint="Send the text to rank the documents by.", param="query")
    size = memoryview(query).nbytes
    if size > MAX_QUERY_BYTES:
        raise BadRequest(f"'query' has {size} bytes; at most {MAX_QUERY_BYTES} are allowed.", param="query")
    return query


def _documents(fields: Fields) -> list[msgspec.Raw]:
    value = fields.get("documents")
    if value is None or not is_filled_list(value):
        what = "is missing" if value is None else "must be a non-empty list"
        raise BadRequest(f"'documents' {what}.", hint="Send a list of strings.", param="documents")
    documents = _decode_list(value)
    if len(documents) > MAX_DOCUMENTS:
        raise BadRequest(
            f"'documents' has {len(documents)} entries; at most {MAX_DOCUMENTS} are allowed.", param="documents"
        )
    return documents


def _text_of(document: msgspec.Raw, at: int) -> msgspec.Raw:
    """The text of a document, undecoded. Raises BadRequest."""
    name = f"documents[{at}]"
    size = memoryview(document).nbytes
    if size > MAX_DOCUMENT_BYTES:
        raise BadRequest(f"'{name}' has {size} bytes; at most {MAX_DOCUMENT_BYTES} are allowed.", param=name)
    first = kind(document)
    if first == ord('"'):
        return document
    if first == ord("{"):
        try:
            return msgspec.Raw(_encode(_decode_document(document).text))
        except msgspec.ValidationError:
            pass
    raise BadRequest(f"'{name}' must be a string or an object with a 'text'.", param=name)


class _Result(msgspec.Struct):
    index: int
    relevance_score: float


class _Ranking(msgspec.Struct):
    results: list[_Result]


_decode_ranking = msgspec.json.Decoder(_Ranking).decode


class RerankReply(OpenAIReply):
    """Writes rankings. Errors are OpenAI's."""

    def __init__(self, request: ModelRequest, request_id: str) -> None:
        assert isinstance(request, RankRequest)
        self._request = request
        self._request_id = request_id

    def whole(self, answer: bytes, counts: TokenCounts) -> bytes:
        """The top results, the best first. Raises BrokenStream if the answer is not a valid ranking."""
        request = self._request
        try:
            results = _decode_ranking(answer).results
        except msgspec.DecodeError as error:
            raise BrokenStream(f"the answer is not a ranking: {error}") from error
        if any(not 0 <= each.index < len(request.documents) for each in results):
            raise BrokenStream("the answer ranks a document that was not sent")
        if len({each.index for each in results}) < len(results):
            raise BrokenStream("the answer ranks a document twice")
        results.sort(key=lambda each: -each.relevance_score)
        searches = counts.searches or request.ask.searches
        return _encode(
            {
                "id": self._request_id,
                "object": "list",
                "model": request.model,
                "usage": {"prompt_tokens": counts.prompt, "total_tokens": counts.prompt + counts.completion},
                "results": [self._result(each) for each in results[: request.top_n]],
                "meta": {"api_version": {"version": request.version}, "billed_units": {"search_units": searches}},
            }
        )

    def _result(self, result: _Result) -> dict[str, object]:
        found: dict[str, object] = {"index": result.index, "relevance_score": result.relevance_score}
        if self._request.returns_documents:
            document = self._request.documents[result.index]
            found["document"] = {"text": document} if kind(document) == ord('"') else document
        return found
