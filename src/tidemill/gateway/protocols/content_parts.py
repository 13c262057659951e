"""A model's answer as a list of parts: thinking, text and tool calls.

OpenAI's chat chunks are taken apart here.

Anthropic's Messages and OpenAI's Responses both write an answer as such a row, each part opened, filled piece by piece,
and closed. A `StreamWriter` says how; `PartStream` calls it, event by event, and keeps nothing of what has passed.
Texts stay JSON strings (see `jsontext`).

Sources: OpenAI API reference, "The chat completion chunk object"; `reasoning_content` as DeepSeek's API names it,
`reasoning` as vLLM does; `stop_reason` of vLLM and `matched_stop` of SGLang say which stop sequence was met.
"""

from enum import Enum
from typing import Protocol

import msgspec

from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream, data_of
from tidemill.gateway.protocols.json_strings import NULL, inside, is_null, is_string, joined, quoted, says_something


class PartKind(Enum):
    """The kind of a part."""

    THINKING = "thinking"
    TEXT = "text"
    CALL = "call"


class AnswerPart(msgspec.Struct):
    """One part of an answer.

    `text` is filled only when the answer is whole; of a call it is its arguments.
    """

    kind: PartKind
    index: int
    call_id: msgspec.Raw = NULL
    name: msgspec.Raw = NULL
    text: msgspec.Raw = NULL
    logprobs: msgspec.Raw = NULL


class FinishReason(msgspec.Struct):
    """Why an answer ended."""

    reason: str = "stop"
    """OpenAI's `finish_reason`."""
    stop_sequence: msgspec.Raw = NULL
    """The stop sequence that was met, where the engine says so."""


class _Function(msgspec.Struct):
    name: msgspec.Raw = NULL
    arguments: msgspec.Raw = NULL


class _Call(msgspec.Struct):
    index: int | None = None
    id: msgspec.Raw = NULL
    function: _Function | None = None


class _Said(msgspec.Struct):
    """A `delta` or a `message`."""

    content: msgspec.Raw = NULL
    reasoning_content: msgspec.Raw = NULL
    reasoning: msgspec.Raw = NULL
    refusal: msgspec.Raw = NULL
    tool_calls: list[_Call] | None = None


class _Logprobs(msgspec.Struct):
    content: msgspec.Raw = NULL


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Said | None = None
    message: _Said | None = None
    finish_reason: str | None = None
    stop_reason: msgspec.Raw = NULL
    matched_stop: msgspec.Raw = NULL
    logprobs: _Logprobs | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: msgspec.Raw = NULL


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None
    type: str | None = None


class _ContentPart(msgspec.Struct):
    text: msgspec.Raw = NULL


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_content = msgspec.json.Decoder(list[_ContentPart]).decode


class StreamWriter(Protocol):
    """Writes the events of one API's stream. Each method gives whole events, or b""."""

    def start(self, counts: TokenCounts) -> bytes:
        """The start of the answer; `counts` are the engine's counts so far, if it sends any."""
        ...

    def alive(self) -> bytes:
        """The event for a keep-alive of the engine."""
        ...

    def open(self, part: AnswerPart) -> bytes: ...

    def piece(self, part: AnswerPart, text: msgspec.Raw, logprobs: msgspec.Raw) -> bytes:
        """A piece of the open part, a JSON string; `logprobs` is a JSON list or null."""
        ...

    def close(self, part: AnswerPart) -> bytes: ...

    def failed(self, message: str, code: str) -> bytes:
        """The event for an engine's error in mid-stream; nothing follows."""
        ...


class PartStream:
    """Reads the chunks of a chat stream and passes its parts to a writer."""

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._started = False
        self._counts = TokenCounts()
        self._part: AnswerPart | None = None
        self._parts = 0
        self._calls = 0
        self._call_index = -1
        self._unnamed: AnswerPart | None = None
        self.ending = FinishReason()
        self.failed = False

    @property
    def called(self) -> bool:
        """True if the answer has a tool call."""
        return self._calls > 0

    def feed(self, events: bytes, counts: TokenCounts) -> bytes:
        """Translate whole events to the writer's API. Raises BrokenStream."""
        out: list[bytes] = []
        self._counts = counts
        try:
            for event in events.split(b"\n\n"):
                payload = data_of(event)
                if payload:
                    self._chunk(payload, out)
                elif event and self._started:
                    out.append(self._writer.alive())
        except BrokenStream as broken:
            broken.before = b"".join(out)
            raise
        return b"".join(out)

    def end(self) -> bytes:
        """Close the open part."""
        out: list[bytes] = []
        self._start(out)
        self._close(out)
        return b"".join(out)

    def _chunk(self, payload: bytes, out: list[bytes]) -> None:
        if self.failed:
            return
        try:
            chunk = _decode_chunk(payload)
        except msgspec.DecodeError as error:
            raise BrokenStream(f"a chunk is not a chat completion chunk: {error}") from error
        if not is_null(chunk.error):
            self.failed = True
            self._start(out)
            out.append(self._writer.failed(*_error_of(chunk.error)))
            return
        for choice in chunk.choices or ():
            if choice.index != 0:
                continue
            if choice.delta is not None:
                self._delta(choice.delta, _logprobs_of(choice), out)
            if choice.finish_reason:
                self.ending = _ending_of(choice)

    def _start(self, out: list[bytes]) -> None:
        """Begin, with the first word rather than with the chunk that names the role: then more is counted."""
        if not self._started:
            self._started = True
            out.append(self._writer.start(self._counts))

    def _delta(self, said: _Said, logprobs: msgspec.Raw, out: list[bytes]) -> None:
        thinking, text = _thinking_of(said), _text_of(said.content)
        if says_something(thinking):
            self._piece(PartKind.THINKING, thinking, NULL, out)
        if says_something(text):
            self._piece(PartKind.TEXT, text, logprobs, out)
        if says_something(said.refusal):
            self._piece(PartKind.TEXT, said.refusal, NULL, out)
        for call in said.tool_calls or ():
            self._call(call, out)

    def _piece(self, kind: PartKind, text: msgspec.Raw, logprobs: msgspec.Raw, out: list[bytes]) -> None:
        part = self._part
        if part is None or part.kind is not kind:
            part = self._open(AnswerPart(kind, self._parts), out)
        out.append(self._writer.piece(part, text, logprobs))

    def _call(self, call: _Call, out: list[bytes]) -> None:
        """A piece of a tool call.

        Its index tells which; engines that send none send whole calls, or one at a time.
        """
        function = call.function or _Function()
        index = call.index
        if index is None:
            index = self._call_index + 1 if says_something(call.id) or self._call_index < 0 else self._call_index
        if index > self._call_index:
            self._call_index = index
            self._calls += 1
            self._close(out)
            self._unnamed = AnswerPart(PartKind.CALL, -1, call.id)
        if self._unnamed is not None:
            if not says_something(function.name):
                return  # its name comes with the next piece
            self._open(AnswerPart(PartKind.CALL, self._parts, self._unnamed.call_id, function.name), out)
        part = self._part
        if not says_something(function.arguments):
            return
        if part is None or part.kind is not PartKind.CALL or index != self._call_index:
            raise BrokenStream("it continues a tool call that was already complete")
        out.append(self._writer.piece(part, function.arguments, NULL))

    def _open(self, part: AnswerPart, out: list[bytes]) -> AnswerPart:
        self._start(out)
        self._close(out)
        self._part = part
        self._parts += 1
        self._unnamed = None
        out.append(self._writer.open(part))
        return part

    def _close(self, out: list[bytes]) -> None:
        if self._part is not None:
            out.append(self._writer.close(self._part))
            self._part = None


def parts_of(answer: bytes) -> tuple[list[AnswerPart], FinishReason]:
    """The parts of a whole chat completion. Raises BrokenStream."""
    try:
        chunk = _decode_chunk(answer)
    except msgspec.DecodeError as error:
        raise BrokenStream(f"the answer is not a chat completion: {error}") from error
    choice = chunk.choices[0] if chunk.choices else None
    if choice is None or choice.message is None:
        raise BrokenStream("the answer has no message")
    said, parts = choice.message, []
    thinking, text = _thinking_of(said), _text_of(said.content)
    texts = [each for each in (text, said.refusal) if says_something(each)]
    if says_something(thinking):
        parts.append(AnswerPart(PartKind.THINKING, 0, text=thinking))
    if texts:
        parts.append(AnswerPart(PartKind.TEXT, len(parts), text=joined(texts, b""), logprobs=_logprobs_of(choice)))
    for call in said.tool_calls or ():
        function = call.function or _Function()
        arguments = function.arguments
        if not is_string(arguments):  # some engines give the object itself
            arguments = quoted(b"" if is_null(arguments) else bytes(arguments))
        parts.append(AnswerPart(PartKind.CALL, len(parts), call.id, function.name, arguments))
    return parts, _ending_of(choice)


def _thinking_of(said: _Said) -> msgspec.Raw:
    return said.reasoning_content if says_something(said.reasoning_content) else said.reasoning


def _text_of(content: msgspec.Raw) -> msgspec.Raw:
    """The text of a content that is a string, or a list of parts as some engines send it."""
    if memoryview(content)[0] != ord("["):
        return content
    try:
        parts = _decode_content(content)
    except msgspec.DecodeError as error:
        raise BrokenStream(f"the content must be a string or a list of parts: {error}") from error
    return msgspec.Raw(b'"' + b"".join(inside(part.text) for part in parts if is_string(part.text)) + b'"')


def _logprobs_of(choice: _Choice) -> msgspec.Raw:
    return choice.logprobs.content if choice.logprobs is not None else NULL


def _ending_of(choice: _Choice) -> FinishReason:
    stop = choice.stop_reason if is_string(choice.stop_reason) else choice.matched_stop
    return FinishReason(choice.finish_reason or "stop", stop if is_string(stop) else NULL)


def _error_of(error: msgspec.Raw) -> tuple[str, str]:
    try:
        found = _decode_error(error)
    except msgspec.DecodeError:
        return "The engine has failed.", "engine_error"
    code = found.code if isinstance(found.code, str) else found.type
    return found.message or "The engine has failed.", code or "engine_error"
