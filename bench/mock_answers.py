"""What the mock engine answers: a request body in, the ready-made bytes of its answer out.

All work on text happens once per distinct request, here; `mock_engine` only writes the pieces.
The shape is vLLM's: a role chunk, one chunk a token, a finish chunk, a usage chunk when
`stream_options.include_usage` asks for it, `data: [DONE]`.
"""

import time
from typing import Any

import msgspec

ID_PLACEHOLDER = b"@mock-answer-id@"  # stands where `mock_engine` puts 16 hexadecimal digits
PLAN_CACHE_ENTRIES = 512
PLAN_CACHE_BODY_BYTES = 16_384  # a longer body is decoded each time rather than kept


class Behaviour(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How to answer. None means: as the command line (or the last `POST /mock`) says.

    A request chooses with a field `mock` in its body or the same JSON in the header `x-mock`.
    """

    chunks: int | None = None  # tokens to produce; without it, max_tokens of the request, else --chunks
    ttft_ms: float | None = None
    interval_ms: float | None = None  # between tokens; 0 writes as fast as the reader takes
    cached: int | None = None  # prompt tokens to report as cache hits (at most the prompt)
    prompt_tokens: int | None = None  # reported instead of the true count; /metrics tells it too
    completion_tokens: int | None = None  # reported in `usage`; /metrics keeps telling what was sent
    token: str | None = None  # the text of each token
    status: int | None = None  # an error of this HTTP status instead of an answer
    retry_after: int | None = None  # seconds, a header on that error
    hang: bool | None = None  # never answer
    hang_after: int | None = None  # send so many tokens, then nothing more
    die_after: int | None = None  # send so many tokens, then cut the connection; -1: before the first byte
    error_after: int | None = None  # send so many tokens, then an error event as vLLM does, and end
    no_usage: bool | None = None  # never report usage
    no_finish: bool | None = None  # no finish chunk
    no_done: bool | None = None  # no [DONE]
    split_bytes: bool | None = None  # write byte by byte
    crlf: bool | None = None  # SSE lines end in \r\n
    close: bool | None = None  # no framing: the end of the connection ends the body


class StreamOptions(msgspec.Struct):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(msgspec.Struct):
    """The fields of a request that change the answer; all others are accepted and ignored."""

    model: str = "mock"
    messages: list[dict[str, Any]] | None = None
    prompt: Any = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    mock: Behaviour | None = None


Piece = tuple[bytes, ...]  # ready-made bytes, cut where the answer's id belongs: `ident.join(piece)`


class Plan(msgspec.Struct, frozen=True):
    """An answer worked out."""

    behaviour: Behaviour
    stream: bool
    choices: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # tokens of each choice that will really be produced
    stops_after: int  # tokens after which something else than the usual end may happen
    finish_reason: str
    status: int
    opening: Piece  # the role chunk, or the whole JSON of an answer that isn't streamed
    token: Piece  # one token of every choice
    closing: Piece  # finish and usage chunk
    done: bytes
    error: bytes  # the body of an error answer
    error_event: bytes  # the same in the middle of a stream
    usage_each_chunk: bool


_decode_body = msgspec.json.Decoder(Body).decode
_decode_behaviour = msgspec.json.Decoder(Behaviour).decode
_encode = msgspec.json.Encoder().encode
_ID = ID_PLACEHOLDER.decode()


def merged(defaults: Behaviour, wish: Behaviour | None) -> Behaviour:
    """`defaults` with every field replaced that `wish` sets."""
    if wish is None:
        return defaults
    chosen = {k: v for k in wish.__struct_fields__ if (v := getattr(wish, k)) is not None}
    return msgspec.structs.replace(defaults, **chosen)


def decode_behaviour(text: bytes) -> Behaviour:
    """Raises `msgspec.ValidationError` with the field's name."""
    return _decode_behaviour(text)


class EmbeddingsBody(msgspec.Struct):
    """The fields of a request for embeddings that change the answer."""

    input: str | list[str]
    model: str = "mock"


_decode_embeddings = msgspec.json.Decoder(EmbeddingsBody).decode


def embeddings(body: bytes) -> tuple[bytes, int]:
    """A vector for each input, made of its words and length, and the tokens of all. Raises msgspec.DecodeError."""
    wish = _decode_embeddings(body)
    texts = [wish.input] if isinstance(wish.input, str) else wish.input
    tokens = sum(count_words(text) for text in texts)
    data = [
        {"object": "embedding", "index": index, "embedding": [float(count_words(text)), len(text) / 100]}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": wish.model, "usage": usage}), tokens


def count_words(value: Any) -> int:
    """The mock's tokenizer: a token is a whitespace-separated word, or an integer in a list."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, int):
        return 1
    if isinstance(value, list):
        return sum(count_words(v) for v in value)
    if isinstance(value, dict):  # a message or a content part
        return count_words(value.get("content")) + count_words(value.get("text"))
    return 0


def usage_json(prompt: int, completion: int, cached: int) -> bytes:
    return (
        b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,'
        b'"prompt_tokens_details":{"cached_tokens":%d}}' % (prompt, prompt + completion, completion, cached)
    )


def error_json(message: str, status: int) -> bytes:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": status}})


class Planner:
    """Makes plans, and remembers those of the last distinct requests."""

    def __init__(self, defaults: Behaviour) -> None:
        self.defaults = defaults
        self._cache: dict[tuple[bool, bytes, bytes], Plan] = {}

    def set_defaults(self, wish: Behaviour) -> None:
        self.defaults = merged(self.defaults, wish)
        self._cache.clear()

    def plan(self, chat: bool, body: bytes, header: bytes) -> Plan:
        """Raises `msgspec.DecodeError` (or its child ValidationError) when the body is no request."""
        key = (chat, body, header)
        known = self._cache.get(key)
        if known is not None:
            return known
        made = self._make(chat, _decode_body(body), header)
        if len(body) <= PLAN_CACHE_BODY_BYTES:
            if len(self._cache) >= PLAN_CACHE_ENTRIES:
                self._cache.clear()
            self._cache[key] = made
        return made

    def _make(self, chat: bool, request: Body, header: bytes) -> Plan:
        wish = merged(Behaviour(), request.mock)
        if header:
            wish = merged(wish, _decode_behaviour(header))
        how = merged(self.defaults, wish)
        limit = request.max_completion_tokens or request.max_tokens
        tokens = wish.chunks if wish.chunks is not None else limit or how.chunks or 0
        counted = max(1, count_words(request.messages) + count_words(request.prompt))
        prompt = how.prompt_tokens if how.prompt_tokens is not None else counted
        cached = min(how.cached or 0, prompt)
        choices = request.n or 1
        finish = "length" if limit is not None and tokens >= limit else "stop"
        reported = how.completion_tokens if how.completion_tokens is not None else tokens * choices
        usage = usage_json(prompt, reported, cached)
        stream = bool(request.stream)
        options = request.stream_options or StreamOptions()
        stops = [n for n in (how.die_after, how.hang_after, how.error_after) if n is not None]
        shape = _Shape(chat, request.model, choices, how)
        closing = b"" if how.no_finish else shape.finish(finish)
        if options.include_usage and not how.no_usage:
            closing += shape.usage(usage)
        error = error_json("the mock engine failed as it was told to", how.status or 500)
        return Plan(
            behaviour=how,
            stream=stream,
            choices=choices,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=tokens,
            stops_after=min([tokens, *(max(0, n) for n in stops)]),
            finish_reason=finish,
            status=how.status or 200,
            opening=_cut(shape.opening() if stream else shape.whole(tokens, finish, usage)),
            token=_cut(shape.token()),
            closing=_cut(closing),
            done=b"" if how.no_done else shape.event(b"[DONE]"),
            error=error,
            error_event=shape.event(error),
            usage_each_chunk=options.include_usage and options.continuous_usage_stats and not how.no_usage,
        )


class _Shape:
    """The JSON of one API (chat or plain completions), with a placeholder for the id."""

    def __init__(self, chat: bool, model: str, choices: int, how: Behaviour) -> None:
        self.chat = chat
        self.choices = choices
        self.how = how
        self.text = how.token if how.token is not None else " tide"
        self.line_end = b"\r\n" if how.crlf else b"\n"
        prefix = "chatcmpl-" if chat else "cmpl-"
        kind = "chat.completion" if chat else "text_completion"
        self._common = {"created": int(time.time()), "model": model}
        self._whole_head = {"id": prefix + _ID, "object": kind, **self._common}
        self._chunk_head = {"id": prefix + _ID, "object": kind + ".chunk" * chat, **self._common}

    def event(self, data: bytes) -> bytes:
        return b"data: " + data + self.line_end * 2

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return self.event(_encode({**self._chunk_head, "choices": [choice]}))

    def _delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        if self.chat:
            return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    def opening(self) -> bytes:
        if not self.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        each = ({"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(self.choices))
        return b"".join(map(self._chunk, each))

    def token(self) -> bytes:
        return b"".join(self._chunk(self._delta(i, self.text, None)) for i in range(self.choices))

    def finish(self, reason: str) -> bytes:
        return b"".join(self._chunk(self._delta(i, "", reason)) for i in range(self.choices))

    def usage(self, usage: bytes) -> bytes:
        return self.event(_encode({**self._chunk_head, "choices": [], "usage": msgspec.Raw(usage)}))

    def whole(self, tokens: int, finish: str, usage: bytes) -> bytes:
        text = self.text * tokens
        choices = []
        for i in range(self.choices):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": i, **said, "logprobs": None, "finish_reason": finish})
        answer = {**self._whole_head, "choices": choices}
        if not self.how.no_usage:
            answer["usage"] = msgspec.Raw(usage)
        return _encode(answer)


def _cut(data: bytes) -> Piece:
    return tuple(data.split(ID_PLACEHOLDER))


def with_usage(events: bytes, usage: bytes, line_end: bytes) -> bytes:
    """The same events, the last one carrying `usage` (vLLM's `continuous_usage_stats`)."""
    tail = b"}" + line_end * 2
    return events.removesuffix(tail) + b',"usage":' + usage + tail
