"""Replies: write an engine's answer in the client's API.

Engines answer in OpenAI's form, or in the one that the client speaks itself.
"""

from typing import Protocol

from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import DONE_EVENT
from tidemill.errors import TidemillError
from tidemill.gateway.protocols.openai_errors import error_body, error_event
from tidemill.gateway.protocols.request import ModelRequest


class Reply(Protocol):
    """Writes one answer in the form of its endpoint."""

    def form(self, *, native: bool) -> "Reply":
        """What writes the answer of an engine; `native`: it speaks the client's own API."""
        ...

    def events(self, events: bytes, counts: TokenCounts) -> bytes:
        """Translate whole events of the engine's stream for the client.

        `counts` is what it counted so far.
        """
        ...

    def end(self, counts: TokenCounts) -> bytes:
        """The last bytes of a complete stream."""
        ...

    def stopped(self, error: TidemillError) -> bytes:
        """The last bytes of a stream that an error has stopped."""
        ...

    def whole(self, answer: bytes, counts: TokenCounts) -> bytes:
        """An answer that was not streamed, and what is billed for it."""
        ...

    def error(self, error: TidemillError) -> bytes:
        """The body of an error answer."""
        ...


class OpenAIReply:
    """OpenAI's own format: everything passes unchanged."""

    def __init__(self, request: ModelRequest, request_id: str) -> None:
        pass

    def form(self, *, native: bool) -> "OpenAIReply":
        return self

    def events(self, events: bytes, counts: TokenCounts) -> bytes:
        return events

    def end(self, counts: TokenCounts) -> bytes:
        return DONE_EVENT

    def stopped(self, error: TidemillError) -> bytes:
        return error_event(error) + DONE_EVENT

    def whole(self, answer: bytes, counts: TokenCounts) -> bytes:
        return answer

    def error(self, error: TidemillError) -> bytes:
        return error_body(error)
