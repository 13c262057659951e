"""A request body that its handler reads piece by piece.

An upload is never held in memory, and what somebody sends who has no key is not taken at all.
"""

import asyncio
from typing import Protocol

BUFFER_BYTES = 256 * 1024
"""Bytes kept for a handler that takes them more slowly than the client sends; then the client has to wait."""


class BrokenBody(Exception):
    """The body is incomplete: the client has left, or sent invalid HTTP."""


class BodySource(Protocol):
    """The connection that a body comes by."""

    def hold_body(self) -> None:
        """Pause reading the body."""
        ...

    def take_body(self) -> None:
        """Resume reading the body."""
        ...

    def invite_body(self) -> None:
        """Send `100 Continue` to a client that waits for it."""
        ...


class RequestBodyTooLong(Exception):
    """The body is longer than the limit."""


class RequestBody:
    """The body of one request, as it arrives."""

    def __init__(self, flow: BodySource, *, waits: bool = False, limit: int | None = None) -> None:
        """`waits`: the client sends it only when it is told to, or after a while."""
        self._waits = waits
        self.limit = limit
        """Bytes that it may have, if it is to be taken as a whole; None: piece by piece, as the handler likes."""
        self.complete = False
        """All of it has arrived."""
        self._flow = flow
        self._buffer = bytearray()
        self._held = False
        self._failure: BrokenBody | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> bytes:
        """The bytes since the last call, or b"" at the end of the body. Raises BrokenBody."""
        while not self._buffer:
            if self._failure is not None:
                raise self._failure
            if self.complete:
                return b""
            if self._waits:
                self._waits = False
                self._flow.invite_body()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        data = bytes(self._buffer)
        self._buffer.clear()
        if self._held:
            self._held = False
            self._flow.take_body()
        return data

    async def whole(self) -> bytes:
        """The whole body. Raises BrokenBody, and RequestBodyTooLong beyond the limit."""
        body = bytearray()
        while data := await self.next():
            body += data
            if self.limit is not None and len(body) > self.limit:
                raise RequestBodyTooLong
        return bytes(body)

    # The connection's side

    def feed(self, data: bytes) -> None:
        self._waits = False
        self._buffer += data
        if len(self._buffer) > BUFFER_BYTES and not self._held:
            self._held = True
            self._flow.hold_body()
        self._wake()

    def end(self) -> None:
        self.complete = True
        self._wake()

    def fail(self, reason: str) -> None:
        """Mark the body as broken. Bytes that came before are still returned."""
        if self._failure is None and not self.complete:
            self._failure = BrokenBody(reason)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
