"""Reading answers of Anthropic's Messages API: usage in passing, and the answer as a chat where the client speaks that.

Sources: Anthropic API reference, "Streaming messages": `message_start` with the prompt's usage, for each content block
`content_block_start`, deltas and `content_block_stop`, then `message_delta` with the stop reason and the cumulative
usage, and `message_stop`; `ping` and `error` anywhere. "Messages": the whole message. "Prompt caching": `input_tokens`
leave out what was read from the cache, and what was written to it.
"""

import re
from typing import Any

import msgspec

from tidemill.engines.anthropic.terms import FINISH_REASONS
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import (
    BYTES_PER_TOKEN,
    MAX_EVENT_BYTES,
    NO_COUNTS,
    BrokenStream,
    bounded,
    data_of,
    usage_object,
)

NULL = msgspec.Raw(b"null")
_DELTA = b"event: content_block_delta"
_PING = b"event: ping"
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class _Details(msgspec.Struct):
    thinking_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: _Details | None = None

    def with_later(self, later: "_Usage") -> "_Usage":
        """Usage is cumulative: what is not told again stays."""
        return _Usage(
            _larger(self.input_tokens, later.input_tokens),
            _larger(self.cache_creation_input_tokens, later.cache_creation_input_tokens),
            _larger(self.cache_read_input_tokens, later.cache_read_input_tokens),
            _larger(self.output_tokens, later.output_tokens),
            later.output_tokens_details or self.output_tokens_details,
        )

    def counts(self) -> TokenCounts:
        written, read = bounded(self.cache_creation_input_tokens or 0), bounded(self.cache_read_input_tokens or 0)
        prompt = bounded(bounded(self.input_tokens or 0) + written + read)
        read = min(read, prompt)
        completion = bounded(self.output_tokens or 0)
        details = self.output_tokens_details
        thinking = bounded((details.thinking_tokens or 0) if details is not None else 0)
        return TokenCounts(prompt, read, completion, min(thinking, completion), min(written, prompt - read))


def _larger(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)


class _Delta(msgspec.Struct):
    text: msgspec.Raw = NULL
    partial_json: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    stop_reason: str | None = None


class _Block(msgspec.Struct):
    type: str = ""
    text: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    id: msgspec.Raw = NULL
    name: msgspec.Raw = NULL
    input: msgspec.Raw = NULL


class _Message(msgspec.Struct):
    id: msgspec.Raw = NULL
    usage: _Usage | None = None
    content: list[_Block] = []
    stop_reason: str | None = None


class _Used(msgspec.Struct):
    usage: _Usage | None = None


class _Error(msgspec.Struct):
    type: str = "api_error"
    message: str = "The engine has failed."


class _Event(msgspec.Struct):
    type: str = ""
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: _Error | None = None


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_used = msgspec.json.Decoder(_Used).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_encode = msgspec.json.Encoder().encode


def usage_of(body: bytes) -> TokenCounts | None:
    """The usage that a whole message reports, or None. Raises BrokenStream when it is not JSON."""
    try:
        usage = _decode_used(body).usage
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BrokenStream(f"the answer is not JSON: {error}") from error
    return usage.counts() if usage is not None else None


class MessagesTap:
    """Passes a Messages stream on, byte for byte. See `engines.protocol.Tap`.

    What comes before `message_start` is held back until then: a ping is no beginning. The last event, `message_stop`,
    is passed on like the others; the reply keeps it until the record is written.
    """

    done = False
    failed = False
    exact = False
    counts = NO_COUNTS
    begun = False
    _rest = b""
    _early = b""
    _stopped = False
    _deltas = 0
    _delta_bytes = 0
    _smallest = MAX_EVENT_BYTES

    def __init__(self) -> None:
        self._usage = _Usage()

    def feed(self, data: bytes) -> bytes:
        """See `Tap.feed`. Raises BrokenStream."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        out: list[bytes] = []
        at = 0
        for end in _EVENT_END.finditer(data):
            if self.done:
                return b"".join(out)
            event = data[at : end.end()]
            try:
                passed = self._event(event)
            except BrokenStream:
                if not out:
                    raise
                break  # the client gets what came before, wherever the network cuts; the next call raises again
            at = end.end()
            if not self.begun:
                self._early += passed
            elif passed:
                if self._early:
                    out.append(self._early)
                    self._early = b""
                out.append(passed)
        if not self.done:
            self._rest = data[at:]
            if len(self._rest) + len(self._early) > MAX_EVENT_BYTES:
                raise BrokenStream(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return out[0] if len(out) == 1 else b"".join(out)

    def end(self) -> bytes:
        """See `Tap.end`. Raises BrokenStream, too, when the message has not ended."""
        rest = self._rest
        events = self.feed(b"\n\n") if rest.strip() else b""
        if self.begun and not (self.done or self._stopped):
            raise BrokenStream("it ends before its message does")
        return events

    @property
    def produced(self) -> int:
        """Completion tokens so far: the engine's count at the end, until then a token for each delta."""
        return self.counts.completion if self.exact else self._deltas

    @property
    def estimated_completion(self) -> int:
        """See `Tap.estimated_completion`. A delta may have more than one token: then its text counts."""
        text = (self._delta_bytes - self._deltas * self._smallest) // BYTES_PER_TOKEN if self._deltas else 0
        return max(self._deltas, text, self.counts.completion)

    def estimate(self, prompt_bytes: int) -> TokenCounts:
        """The prompt is exact from `message_start` on; of the answer, only what has come is known."""
        told = self.counts
        return TokenCounts(
            prompt=told.prompt or prompt_bytes // BYTES_PER_TOKEN,
            cached=told.cached,
            completion=self.estimated_completion,
            cache_write=told.cache_write,
        )

    def _event(self, event: bytes) -> bytes:
        """Look at an event; gives what the client gets of it."""
        if event.startswith(_DELTA):
            self._count_delta(event)
            return self.on_delta(event)
        if event.startswith(_PING):
            return self.on_ping(event)
        payload = data_of(event.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
        if not payload:
            return self.on_ping(event)
        try:
            found = _decode_event(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BrokenStream(f"an event is not a JSON object of the right form: {error}") from error
        match found.type:
            case "content_block_delta":  # of a server that does not name its events
                self._count_delta(event)
                return self.on_delta(event)
            case "ping":
                return self.on_ping(event)
            case "message_start":
                if found.message is not None and found.message.usage is not None:
                    self._use(found.message.usage)
            case "message_delta":
                if found.usage is not None:
                    self._use(found.usage)
                    self.exact = found.usage.output_tokens is not None
                self._stopped = True
            case "message_stop":
                self.done = True
            case "error":
                self.done = self.failed = True
        self.begun = True
        return self.on_event(found, event)

    def _count_delta(self, event: bytes) -> None:
        size = len(event)
        self._deltas += 1
        self._delta_bytes += size
        self._smallest = min(self._smallest, size)
        self.begun = True

    def _use(self, usage: _Usage) -> None:
        self._usage = self._usage.with_later(usage)
        self.counts = self._usage.counts()

    # What the client gets

    def on_delta(self, event: bytes) -> bytes:
        return event

    def on_ping(self, event: bytes) -> bytes:
        return event

    def on_event(self, found: _Event, event: bytes) -> bytes:
        return event


class ChatTap(MessagesTap):
    """Gives a Messages stream as the chunks of a chat."""

    def __init__(self, *, model: bytes, created: int, wants_usage: bool) -> None:
        """`model`: what the client called it, a JSON string; `created`: seconds since 1970."""
        super().__init__()
        self._head = b'"object":"chat.completion.chunk","created":%d,"model":%b' % (created, model)
        self._id = b'""'
        self._wants_usage = wants_usage
        self._calls = 0
        self._in_call = False
        self._arguments_came = False

    def on_ping(self, event: bytes) -> bytes:
        return b": ping\n\n" if self.begun else b""

    def on_delta(self, event: bytes) -> bytes:
        try:
            delta = _decode_event(data_of(event.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))).delta
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BrokenStream(f"a delta is not a JSON object of the right form: {error}") from error
        if delta is None:
            return b""
        if _says(delta.text):
            return self._chunk(b'{"content":%b}' % bytes(delta.text))
        if _says(delta.partial_json) and self._in_call:
            self._arguments_came = True
            return self._call_piece(bytes(delta.partial_json))
        if _says(delta.thinking):
            return self._chunk(b'{"reasoning_content":%b}' % bytes(delta.thinking))
        return b""

    def on_event(self, found: _Event, event: bytes) -> bytes:
        match found.type:
            case "message_start":
                if found.message is not None and _is_string(found.message.id):
                    self._id = bytes(found.message.id)
                return self._chunk(b'{"role":"assistant","content":""}')
            case "content_block_start":
                return self._start(found.content_block or _Block())
            case "content_block_stop":
                return self._stop()
            case "message_delta":
                reason = found.delta.stop_reason if found.delta is not None else None
                return self._chunk(b"{}", _encode(FINISH_REASONS.get(reason or "", "stop")))
            case "message_stop":
                return self._usage_chunk() if self._wants_usage else b""
            case "error":
                return b"data: %b\n\n" % _encode({"error": _error(found.error or _Error())})
        return b""

    def _start(self, block: _Block) -> bytes:
        if block.type == "tool_use":
            self._calls += 1
            self._in_call = True
            self._arguments_came = False
            function = {"name": block.name, "arguments": ""}
            call = {"index": self._calls - 1, "id": block.id, "type": "function", "function": function}
            return self._chunk(_encode({"tool_calls": [call]}))
        if _says(block.text):
            return self._chunk(b'{"content":%b}' % bytes(block.text))
        if _says(block.thinking):
            return self._chunk(b'{"reasoning_content":%b}' % bytes(block.thinking))
        return b""

    def _stop(self) -> bytes:
        """A call of a function without arguments has no piece of them; a chat has the empty object."""
        in_call, self._in_call = self._in_call, False
        return self._call_piece(b'"{}"') if in_call and not self._arguments_came else b""

    def _call_piece(self, arguments: bytes) -> bytes:
        return self._chunk(b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (self._calls - 1, arguments))

    def _chunk(self, delta: bytes, reason: bytes = b"null") -> bytes:
        return b'data: {"id":%b,%b,"choices":[{"index":0,"delta":%b,"finish_reason":%b}]}\n\n' % (
            self._id,
            self._head,
            delta,
            reason,
        )

    def _usage_chunk(self) -> bytes:
        return b'data: {"id":%b,%b,"choices":[],"usage":%b}\n\n' % (
            self._id,
            self._head,
            _encode(usage_object(self.counts)),
        )


def completion_of(body: bytes, *, model: msgspec.Raw, created: int) -> bytes:
    """A whole message as a chat completion. Raises BrokenStream."""
    try:
        message = _decode_message(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BrokenStream(f"the answer is not a message: {error}") from error
    said: dict[str, Any] = {"role": "assistant", "content": _joined([block.text for block in message.content])}
    thinking = _joined([block.thinking for block in message.content])
    if thinking is not None:
        said["reasoning_content"] = thinking
    calls = [_call(block) for block in message.content if block.type == "tool_use"]
    if calls:
        said["tool_calls"] = calls
    elif said["content"] is None:
        said["content"] = ""
    reason = FINISH_REASONS.get(message.stop_reason or "", "stop")
    return _encode(
        {
            "id": message.id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [{"index": 0, "message": said, "finish_reason": reason, "logprobs": None}],
            "usage": usage_object(message.usage.counts() if message.usage is not None else NO_COUNTS),
        }
    )


def _call(block: _Block) -> dict[str, Any]:
    arguments = "{}" if bytes(block.input) == b"null" else bytes(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _joined(texts: list[msgspec.Raw]) -> msgspec.Raw | None:
    """One JSON string of those that are some; None when none is."""
    found = [bytes(text)[1:-1] for text in texts if _is_string(text)]
    return msgspec.Raw(b'"' + b"".join(found) + b'"') if found else None


def _error(error: _Error) -> dict[str, Any]:
    return {"message": error.message, "type": "server_error", "param": None, "code": error.type}


def _is_string(value: msgspec.Raw) -> bool:
    return memoryview(value)[0] == 0x22


def _says(value: msgspec.Raw) -> bool:
    """It is a JSON string with something in it."""
    return _is_string(value) and memoryview(value).nbytes > 2
