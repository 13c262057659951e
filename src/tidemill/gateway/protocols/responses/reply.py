"""Writes answers in the format of OpenAI's Responses API, whole and as a stream.

The events that end a part, and the one that ends the stream, say again all that was said. So this is the one reply
that keeps what has passed, within `MAX_KEPT_BYTES`.

Source: OpenAI API reference, "Responses", "The response object" and "Streaming events".
"""

import time
from collections.abc import Sequence

import msgspec

from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream
from tidemill.errors import TidemillError
from tidemill.gateway.protocols.content_parts import AnswerPart, FinishReason, PartKind, PartStream, parts_of
from tidemill.gateway.protocols.json_strings import EMPTY, inside, is_null, is_string, quoted, says_something
from tidemill.gateway.protocols.openai_errors import error_body
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.protocols.responses.request import ResponsesRequest

_encode = msgspec.json.Encoder().encode

MAX_KEPT_BYTES = 4 * 1024 * 1024
"""Text of one streamed response: about a million tokens. One that is longer is broken off."""

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_PREFIXES = {PartKind.THINKING: "rs", PartKind.TEXT: "msg", PartKind.CALL: "fc"}
_DELTAS = {
    PartKind.THINKING: (b"response.reasoning_text.delta", b'"content_index":0,'),
    PartKind.TEXT: (b"response.output_text.delta", b'"content_index":0,'),
    PartKind.CALL: (b"response.function_call_arguments.delta", b""),
}


def usage_object(counts: TokenCounts) -> dict[str, object]:
    """The usage object of the Responses API."""
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.completion,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.completion,
    }


class ResponsesReply:
    """See `replies.Reply` and, for its streams, `parts.Writer`."""

    def __init__(self, request: ModelRequest, request_id: str) -> None:
        assert isinstance(request, ResponsesRequest)
        self._request = request
        self._suffix = request_id.removeprefix("req_")
        self._created = int(time.time())
        self._parts = PartStream(self)
        self._number = 0
        self._items: list[msgspec.Raw] = []
        self._text: list[bytes] = []
        self._logprobs: list[bytes] = []
        self._kept_bytes = 0
        self._ending = False

    # replies.Reply

    def form(self, *, native: bool) -> "ResponsesReply":
        return self

    def events(self, events: bytes, counts: TokenCounts) -> bytes:
        return self._parts.feed(events, counts)

    def end(self, counts: TokenCounts) -> bytes:
        if self._parts.failed:
            return b""
        self._ending = True
        rest = self._parts.end()
        response = self._finished(self._items, self._parts.ending, counts)
        return rest + self._event(f"response.{response['status']}", {"response": self._kept(response)})

    def stopped(self, error: TidemillError) -> bytes:
        return b"" if self._parts.failed else self.failed(str(error), error.code)

    def whole(self, answer: bytes, counts: TokenCounts) -> bytes:
        parts, ending = parts_of(answer)
        last = len(parts) - 1
        items = [self._item(part, self._status(ending, part.index == last)) for part in parts]
        return bytes(self._kept(self._finished(items, ending, counts)))

    def error(self, error: TidemillError) -> bytes:
        return error_body(error)

    # parts.Writer

    def start(self, counts: TokenCounts) -> bytes:
        response = _raw(self._response("in_progress"))
        return self._event("response.created", {"response": response}) + self._event(
            "response.in_progress", {"response": response}
        )

    def alive(self) -> bytes:
        return b": the engine is at work\n\n"

    def open(self, part: AnswerPart) -> bytes:
        self._text, self._logprobs = [], []
        fields = {"output_index": part.index, "item": self._item(part, "in_progress")}
        added = self._event("response.output_item.added", fields)
        if part.kind is PartKind.CALL:
            return added
        return added + self._event("response.content_part.added", self._at(part, {"part": _content(part)}))

    def piece(self, part: AnswerPart, text: msgspec.Raw, logprobs: msgspec.Raw) -> bytes:
        said = inside(text)
        self._text.append(said)
        self._kept_bytes += len(said)
        more = b""
        if part.kind is PartKind.TEXT:
            chosen = b"[]" if is_null(logprobs) else bytes(logprobs)
            more = b',"logprobs":' + chosen
            if len(chosen) > 2:
                self._logprobs.append(chosen[1:-1])
                self._kept_bytes += len(chosen)
        if self._kept_bytes > MAX_KEPT_BYTES:
            raise BrokenStream(f"the response is longer than {MAX_KEPT_BYTES} bytes; use chat completions for it")
        kind, where = _DELTAS[part.kind]
        self._number += 1
        return (
            b'event: %b\ndata: {"type":"%b","item_id":"%b","output_index":%d,%b"delta":"%b"%b,"sequence_number":%d}\n\n'
            % (kind, kind, self._id(part).encode(), part.index, where, said, more, self._number - 1)
        )

    def close(self, part: AnswerPart) -> bytes:
        part.text = msgspec.Raw(b'"' + b"".join(self._text) + b'"')
        part.logprobs = msgspec.Raw(b"[" + b",".join(self._logprobs) + b"]")
        item = _raw(self._item(part, self._status(self._parts.ending, self._ending)))
        self._items.append(item)
        match part.kind:
            case PartKind.THINKING:
                said = self._event("response.reasoning_text.done", self._at(part, {"text": part.text}))
            case PartKind.TEXT:
                fields: dict[str, object] = {"text": part.text, "logprobs": part.logprobs}
                said = self._event("response.output_text.done", self._at(part, fields))
            case PartKind.CALL:
                fields = {"arguments": part.text, "name": part.name}
                said = self._event("response.function_call_arguments.done", self._at(part, fields))
        if part.kind is not PartKind.CALL:
            said += self._event("response.content_part.done", self._at(part, {"part": _content(part)}))
        return said + self._event("response.output_item.done", {"output_index": part.index, "item": item})

    def failed(self, message: str, code: str) -> bytes:
        response = self._response("failed")
        response["output"] = self._items
        response["error"] = {"code": code, "message": message}
        return self._event("error", {"code": code, "message": message, "param": None}) + self._event(
            "response.failed", {"response": response}
        )

    # The objects

    def _event(self, kind: str, fields: dict[str, object]) -> bytes:
        data = _encode({"type": kind, **fields, "sequence_number": self._number})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def _at(self, part: AnswerPart, fields: dict[str, object]) -> dict[str, object]:
        """Where an event belongs, and what it says."""
        where: dict[str, object] = {"item_id": self._id(part), "output_index": part.index}
        return {**where, **fields} if part.kind is PartKind.CALL else {**where, "content_index": 0, **fields}

    def _id(self, part: AnswerPart) -> str:
        return f"{_PREFIXES[part.kind]}_{self._suffix}_{part.index}"

    def _item(self, part: AnswerPart, status: str) -> dict[str, object]:
        whole = is_string(part.text)
        match part.kind:
            case PartKind.THINKING:
                content = [_content(part)] if whole else []
                return {"id": self._id(part), "type": "reasoning", "summary": [], "content": content, "status": status}
            case PartKind.TEXT:
                content = [_content(part)] if whole else []
                return {
                    "id": self._id(part),
                    "type": "message",
                    "role": "assistant",
                    "status": status,
                    "content": content,
                }
            case PartKind.CALL:
                call_id = part.call_id if says_something(part.call_id) else quoted(f"call_{self._suffix}_{part.index}")
                return {
                    "id": self._id(part),
                    "type": "function_call",
                    "call_id": call_id,
                    "name": part.name if is_string(part.name) else EMPTY,
                    "arguments": part.text if whole else EMPTY,
                    "status": status,
                }

    def _status(self, ending: FinishReason, is_last: bool) -> str:
        return "incomplete" if is_last and ending.reason in _INCOMPLETE else "completed"

    def _response(self, status: str) -> dict[str, object]:
        request = self._request
        return {
            "id": f"resp_{self._suffix}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **request.echo,
            "store": request.keeps,
        }

    def _finished(self, items: Sequence[object], ending: FinishReason, counts: TokenCounts) -> dict[str, object]:
        reason = _INCOMPLETE.get(ending.reason)
        response = self._response("incomplete" if reason else "completed")
        response["completed_at"] = int(time.time())
        response["output"] = items
        response["usage"] = usage_object(counts)
        if reason:
            response["incomplete_details"] = {"reason": reason}
        return response

    def _kept(self, response: dict[str, object]) -> msgspec.Raw:
        """The response as JSON, put into the store if the client wants that; it says whether it was."""
        encoded = _encode(response)
        if self._request.keeps and not self._request.keep(f"resp_{self._suffix}", encoded):
            encoded = _encode({**response, "store": False})
        return msgspec.Raw(encoded)


def _content(part: AnswerPart) -> dict[str, object]:
    text = part.text if is_string(part.text) else EMPTY
    if part.kind is PartKind.THINKING:
        return {"type": "reasoning_text", "text": text}
    logprobs = [] if is_null(part.logprobs) else part.logprobs
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))
