"""An answer of Anthropic's Messages API as a chat: the chunks of a stream, and the whole."""

from typing import Any

import msgspec

from tidemill.engines.anthropic.answer_forms import AnswerBlock, MessagesEvent, StreamError, WholeMessage
from tidemill.engines.anthropic.stream import MessagesTap, event_of
from tidemill.engines.anthropic.terms import FINISH_REASONS
from tidemill.engines.sse import NO_COUNTS, BrokenStream, usage_object

_decode_message = msgspec.json.Decoder(WholeMessage).decode
_encode = msgspec.json.Encoder().encode


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
        found = event_of(event)
        if found is None or found.delta is None:
            return b""
        delta = found.delta
        if _says(delta.text):
            return self._chunk(b'{"content":%b}' % bytes(delta.text))
        if _says(delta.partial_json) and self._in_call:
            self._arguments_came = True
            return self._call_piece(bytes(delta.partial_json))
        if _says(delta.thinking):
            return self._chunk(b'{"reasoning_content":%b}' % bytes(delta.thinking))
        return b""

    def on_event(self, found: MessagesEvent, event: bytes) -> bytes:
        match found.type:
            case "message_start":
                if found.message is not None and _is_string(found.message.id):
                    self._id = bytes(found.message.id)
                return self._chunk(b'{"role":"assistant","content":""}')
            case "content_block_start":
                return self._start(found.content_block or AnswerBlock())
            case "content_block_stop":
                return self._stop()
            case "message_delta":
                reason = found.delta.stop_reason if found.delta is not None else None
                return self._chunk(b"{}", _encode(FINISH_REASONS.get(reason or "", "stop")))
            case "message_stop":
                return self._usage_chunk() if self._wants_usage else b""
            case "error":
                return b"data: %b\n\n" % _encode({"error": _error(found.error or StreamError())})
        return b""

    def _start(self, block: AnswerBlock) -> bytes:
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


def _call(block: AnswerBlock) -> dict[str, Any]:
    arguments = "{}" if bytes(block.input) == b"null" else bytes(block.input).decode()
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _joined(texts: list[msgspec.Raw]) -> msgspec.Raw | None:
    """One JSON string of those that are some; None when none is."""
    found = [bytes(text)[1:-1] for text in texts if _is_string(text)]
    return msgspec.Raw(b'"' + b"".join(found) + b'"') if found else None


def _error(error: StreamError) -> dict[str, Any]:
    return {"message": error.message, "type": "server_error", "param": None, "code": error.type}


def _is_string(value: msgspec.Raw) -> bool:
    return memoryview(value)[0] == 0x22


def _says(value: msgspec.Raw) -> bool:
    """It is a JSON string with something in it."""
    return _is_string(value) and memoryview(value).nbytes > 2
