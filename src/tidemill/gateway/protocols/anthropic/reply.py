"""Writing answers in the form of Anthropic's Messages API, whole and as a stream.

Sources: Anthropic API reference, "Messages" and "Streaming Messages": `message_start`, then for each content block
`content_block_start`, deltas and `content_block_stop`, then `message_delta` with the usage and `message_stop`.
"""

import re

import msgspec

from tidemill.engines.anthropic.terms import STOP_REASONS
from tidemill.engines.json_members import with_member
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream
from tidemill.errors import TidemillError
from tidemill.gateway.protocols.anthropic.errors import error_body, error_event, error_of
from tidemill.gateway.protocols.anthropic.request import MessagesRequest
from tidemill.gateway.protocols.content_parts import AnswerPart, FinishReason, PartKind, PartStream, parts_of
from tidemill.gateway.protocols.json_strings import EMPTY, NULL, is_string, plain, quoted, says_something
from tidemill.gateway.protocols.request import ModelRequest

_encode = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

PING = b'event: ping\ndata: {"type": "ping"}\n\n'
MESSAGE_START = b'"message_start"'
STOP_TYPE = b'"message_stop"'
"""Quotation marks within a text are escaped, so that this is nothing but a type."""
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n")
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

_BLOCKS = {
    PartKind.THINKING: b'{"type":"thinking","thinking":"","signature":""}',
    PartKind.TEXT: b'{"type":"text","text":""}',
}
_DELTAS = {
    PartKind.THINKING: b'"thinking_delta","thinking":',
    PartKind.TEXT: b'"text_delta","text":',
    PartKind.CALL: b'"input_json_delta","partial_json":',
}


def usage_object(counts: TokenCounts) -> dict[str, object]:
    """Anthropic's usage: `input_tokens` leave out what was read from the cache or written to it."""
    return {
        "input_tokens": counts.prompt - counts.cached - counts.cache_write,
        "cache_creation_input_tokens": counts.cache_write,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.completion,
        **({"output_tokens_details": {"thinking_tokens": counts.reasoning}} if counts.reasoning else {}),
    }


class AnthropicReply:
    """See `replies.Reply` and, for its streams, `parts.Writer`."""

    def __init__(self, request: ModelRequest, request_id: str) -> None:
        assert isinstance(request, MessagesRequest)
        self._request = request
        self._request_id = request_id
        self._suffix = request_id.removeprefix("req_")
        self._parts = PartStream(self)

    # replies.Reply

    def form(self, *, native: bool) -> "AnthropicReply | PassedReply":
        return PassedReply(self._request, self._request_id) if native else self

    def events(self, events: bytes, counts: TokenCounts) -> bytes:
        return self._parts.feed(events, counts)

    def end(self, counts: TokenCounts) -> bytes:
        if self._parts.failed:
            return b""
        rest = self._parts.end()
        delta = {
            "type": "message_delta",
            "delta": self._stop(self._parts.ending, called=self._parts.called),
            "usage": usage_object(counts),
        }
        return b"%bevent: message_delta\ndata: %b\n\n%b" % (rest, _encode(delta), MESSAGE_STOP)

    def stopped(self, error: TidemillError) -> bytes:
        return b"" if self._parts.failed else error_event(error, self._request_id)

    def whole(self, answer: bytes, counts: TokenCounts) -> bytes:
        parts, ending = parts_of(answer)
        called = any(part.kind is PartKind.CALL for part in parts)
        message = self._message(counts)
        message["content"] = [self._block(part) for part in parts]
        message.update(self._stop(ending, called=called))
        return _encode(message)

    def error(self, error: TidemillError) -> bytes:
        return error_body(error, self._request_id)

    # parts.Writer

    def start(self, counts: TokenCounts) -> bytes:
        message = _encode(self._message(counts))
        return b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n%b' % (message, PING)

    def alive(self) -> bytes:
        return PING

    def open(self, part: AnswerPart) -> bytes:
        block = _BLOCKS.get(part.kind) or _encode(self._tool_use(part, msgspec.Raw(b"{}")))
        return b'event: content_block_start\ndata: {"type":"content_block_start","index":%d,"content_block":%b}\n\n' % (
            part.index,
            block,
        )

    def piece(self, part: AnswerPart, text: msgspec.Raw, logprobs: msgspec.Raw) -> bytes:
        if part.kind is PartKind.THINKING and self._request.hides_thinking:
            return b""
        return (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":%b%b}}\n\n'
            % (part.index, _DELTAS[part.kind], bytes(text))
        )

    def close(self, part: AnswerPart) -> bytes:
        return b'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n' % part.index

    def failed(self, message: str, code: str) -> bytes:
        return error_event(error_of(message, code), self._request_id)

    # The objects

    def _message(self, counts: TokenCounts) -> dict[str, object]:
        return {
            "id": f"msg_{self._suffix}",
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**usage_object(counts), "service_tier": "standard"},
        }

    def _block(self, part: AnswerPart) -> dict[str, object]:
        match part.kind:
            case PartKind.THINKING:
                text = EMPTY if self._request.hides_thinking else part.text
                return {"type": "thinking", "thinking": text, "signature": ""}
            case PartKind.TEXT:
                return {"type": "text", "text": part.text}
            case PartKind.CALL:
                return self._tool_use(part, _input_of(part.text))

    def _tool_use(self, part: AnswerPart, arguments: msgspec.Raw) -> dict[str, object]:
        call_id = part.call_id if says_something(part.call_id) else quoted(f"toolu_{self._suffix}_{part.index}")
        name = part.name if is_string(part.name) else EMPTY
        return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}

    def _stop(self, ending: FinishReason, *, called: bool) -> dict[str, object]:
        reason = STOP_REASONS.get(ending.reason, "end_turn")
        if reason == "end_turn" and called:
            reason = "tool_use"
        # An engine names its own stop tokens, too; only the client's sequences are its business.
        stop = ending.stop_sequence if reason == "end_turn" else NULL
        if is_string(stop) and plain(stop) in self._request.stop_sequences:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": reason, "stop_sequence": None}


class PassedReply:
    """What an upstream that speaks Messages has said, byte for byte, but for the model's name.

    See `Reply`. A stream's last event is kept until the end is told, when its record is written.
    """

    def __init__(self, request: MessagesRequest, request_id: str) -> None:
        self._model = _encode(request.model)
        self._request_id = request_id
        self._named = False
        self._last = b""

    def form(self, *, native: bool) -> "PassedReply":
        return self

    def events(self, events: bytes, counts: TokenCounts) -> bytes:
        if not self._named and MESSAGE_START in events:
            self._named = True
            events = self._with_name(events)
        at = events.rfind(STOP_TYPE)
        if at < 0:
            return events
        start = max((found.end() for found in _EVENT_END.finditer(events, 0, at)), default=0)
        self._last = events[start:]
        return events[:start]

    def end(self, counts: TokenCounts) -> bytes:
        return self._last

    def stopped(self, error: TidemillError) -> bytes:
        return error_event(error, self._request_id)

    def whole(self, answer: bytes, counts: TokenCounts) -> bytes:
        return self._renamed(answer, "model")

    def error(self, error: TidemillError) -> bytes:
        return error_body(error, self._request_id)

    def _with_name(self, events: bytes) -> bytes:
        """The first event with the model's name as the client knows it."""
        at = events.find(MESSAGE_START)
        start = events.find(b"{", events.rfind(b"\n", 0, at) + 1)
        end = events.find(b"\n", at)
        return events[:start] + self._renamed(events[start:end], "message", "model") + events[end:]

    def _renamed(self, answer: bytes, *path: str) -> bytes:
        try:
            return with_member(answer, path, self._model)
        except msgspec.DecodeError as error:
            raise BrokenStream(f"the answer is not a message: {error}") from error


def _input_of(arguments: msgspec.Raw) -> msgspec.Raw:
    """A tool call's arguments as an object.

    What is no object is wrapped as Anthropic's documentation says.
    """
    text = plain(arguments)
    if not text.strip():
        return msgspec.Raw(b"{}")
    try:
        _decode_object(text)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return msgspec.Raw(_encode({"INVALID_JSON": text}))
    return msgspec.Raw(text.encode())
