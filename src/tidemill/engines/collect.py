"""Putting a streamed answer together again, for a client that wants it whole: chats and text completions alike.

The counterpart of `collects` in `engines.protocol`: the gateway counts the tokens of an own engine while they are
produced, also when the client asked for one JSON object. Follows OpenAI's chunk object (API reference, "The chat
completion chunk object"): deltas of strings are appended, tool calls are merged by their index, the rest is set.
"""

from typing import Any

import msgspec

from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream, data_of, usage_object

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode

_APPENDED = ("content", "reasoning_content", "reasoning", "refusal")


class Collector:
    """Takes the events that a tap lets through; gives the chat completion object at the end."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self.error: dict[str, Any] | None = None

    def feed(self, events: bytes) -> None:
        """Add whole events. Raises BrokenStream."""
        for event in events.split(b"\n\n"):
            payload = data_of(event)
            if payload:
                try:
                    self._add(_decode(payload))
                except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
                    raise BrokenStream(f"a chunk is not a JSON object of the right form: {error}") from error

    def _add(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error"):
            self.error = chunk["error"]
            return
        for choice in chunk.pop("choices", None) or ():
            self._add_choice(choice)
        chunk.pop("usage", None)
        self._head = {**chunk, **{key: value for key, value in self._head.items() if value}}

    def _add_choice(self, delta: dict[str, Any]) -> None:
        choice = self._choices.setdefault(
            delta.get("index", 0),
            {"index": delta.get("index", 0), "message": {"role": "assistant", "content": None}, "finish_reason": None},
        )
        if delta.get("finish_reason"):
            choice["finish_reason"] = delta["finish_reason"]
        for part, tokens in (delta.get("logprobs") or {}).items():
            if tokens:
                logprobs = choice.setdefault("logprobs", {})
                logprobs[part] = (logprobs.get(part) or []) + tokens
        if isinstance(delta.get("text"), str):
            choice["text"] = choice.get("text", "") + delta["text"]
        message = choice["message"]
        for name, value in (delta.get("delta") or {}).items():
            if name == "tool_calls":
                for call in value or ():
                    _add_tool_call(message.setdefault("tool_calls", []), call)
            elif name in _APPENDED and isinstance(value, str):
                message[name] = (message.get(name) or "") + value
            elif value is not None:
                message[name] = value

    def answer(self, counts: TokenCounts) -> bytes:
        """The chat completion object, with `counts` as its usage."""
        for choice in self._choices.values():
            choice.setdefault("logprobs", None)
            if "text" in choice:
                choice.pop("message", None)
            elif choice["message"]["content"] is None and "tool_calls" not in choice["message"]:
                choice["message"]["content"] = ""
        return _encode(
            {
                **self._head,
                "object": str(self._head.get("object", "chat.completion")).removesuffix(".chunk"),
                "choices": [self._choices[index] for index in sorted(self._choices)],
                "usage": usage_object(counts),
            }
        )


def _add_tool_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    index = delta.get("index", len(calls))
    while len(calls) <= index:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    if delta.get("id"):
        call["id"] = delta["id"]
    function = delta.get("function") or {}
    if function.get("name"):
        call["function"]["name"] += function["name"]
    if function.get("arguments"):
        call["function"]["arguments"] += function["arguments"]
