"""An exchange: one request of a client, and its answer."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from tidemill.http.head_lines import STATUS_LINES
from tidemill.http.request_body import RequestBody


class ClientGone(Exception):
    """The client has closed its connection, or has stopped reading."""


class OpenWork(Protocol):
    """The server's open work, which a clean stop waits for."""

    date_lines: bytes
    """Header lines that every answer begins with, renewed each second."""
    underway: int
    """Exchanges that are worked on without a task."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the rest of the work in a task."""
        ...


class ClientConnection(Protocol):
    """The connection that an exchange came by."""

    blocked: bool
    """The client takes less than it is sent; more should wait."""

    @property
    def work(self) -> OpenWork: ...

    @property
    def from_here(self) -> bool: ...

    @property
    def peer(self) -> str: ...

    def write(self, data: bytes) -> None:
        """Send bytes as they are; nothing happens when the client is gone."""
        ...

    def finished(self, exchange: "Exchange") -> None: ...

    def abort(self) -> None: ...

    async def unblocked(self) -> None: ...


class Exchange:
    """One request of a client, and the methods to answer it."""

    # What most exchanges never change is a default of the class: an exchange is made for each request.
    refusal: tuple[int, str] | None = None
    """Status and message when the request cannot be taken as HTTP; the connection closes after the answer."""
    query = b""
    """What follows the question mark, undecoded."""
    body = b""
    incoming: RequestBody | None = None
    """The body, when it is taken piece by piece (`HttpServer.streamed`), or only once it is known who sends it
    (`HttpServer.lets_in`); `body` is then empty."""
    extra = b""
    """Header lines that the answer carries, whatever it is, each with its CRLF."""
    streaming = False
    ended = False
    """The answer is complete."""
    gone = False
    on_gone: Callable[[], None] | None = None
    """Called once, in the event loop, when the client leaves before its answer is complete."""
    answered = False
    """The answer has begun."""
    chunked = True
    """False for HTTP/1.0: a streamed answer ends with the connection."""

    def __init__(
        self,
        carrier: ClientConnection,
        method: bytes,
        path: bytes,
        request_id: str,
        headers: dict[bytes, bytes] | None = None,
        keep_alive: bool = True,
    ) -> None:
        self.carrier = carrier
        """Takes bytes as they are; only for chunks that have their frame already."""
        self.method = method
        self.path = path
        self.request_id = request_id
        self.headers = {} if headers is None else headers
        """By name in lower case. Not to be changed: the next request on the connection may share it."""
        self.keep_alive = keep_alive

    @property
    def unread(self) -> bool:
        """True if part of the body is still to come, so the connection can't be reused after an answer."""
        return self.incoming is not None and not self.incoming.complete

    @property
    def from_here(self) -> bool:
        """True if the client is on this machine.

        The source of a connection to an address of one's own cannot be forged.
        """
        return self.carrier.from_here

    @property
    def peer(self) -> str:
        """The address at the other end of the connection; empty when it is gone."""
        return self.carrier.peer

    @property
    def must_drain(self) -> bool:
        """True if the write buffer is full."""
        return self.carrier.blocked

    @property
    def work(self) -> OpenWork:
        """The server's account of open work."""
        return self.carrier.work

    def respond(self, status: int, body: bytes, headers: bytes = b"", *, close: bool = False) -> None:
        """Send a whole answer. `headers` are complete lines, each with its CRLF."""
        if self.answered or self.gone:
            return
        self.answered = self.ended = True
        if close or self.incoming is not None:
            self.keep_alive = self.keep_alive and not close and not self.unread
        carrier = self.carrier
        head = b"%b%b%bx-request-id: %b\r\n%b%bcontent-length: %d\r\n\r\n" % (
            STATUS_LINES[status],
            carrier.work.date_lines,
            self.extra,
            self.request_id.encode(),
            headers,
            b"" if self.keep_alive else b"connection: close\r\n",
            len(body),
        )
        carrier.write(head + body if self.method != b"HEAD" else head)
        carrier.finished(self)

    def start_stream(self, headers: bytes) -> None:
        """Begin a streamed answer (status 200)."""
        self.answered = self.streaming = True
        framing = b"transfer-encoding: chunked\r\n"
        if not self.chunked:
            self.keep_alive = False
            framing = b""
        self.carrier.write(
            b"%b%b%bx-request-id: %b\r\n%b%b%b\r\n"
            % (
                STATUS_LINES[200],
                self.carrier.work.date_lines,
                self.extra,
                self.request_id.encode(),
                headers,
                framing,
                b"" if self.keep_alive else b"connection: close\r\n",
            )
        )

    def send(self, data: bytes) -> None:
        """Send a piece of a streamed answer. Raises ClientGone."""
        if self.gone:
            raise ClientGone
        if not data:
            return  # a chunk of no bytes would end the answer
        self.carrier.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    async def drain(self) -> None:
        """Wait until the write buffer has room. Raises ClientGone."""
        if self.carrier.blocked:
            await self.carrier.unblocked()
        if self.gone:
            raise ClientGone

    def end(self, data: bytes = b"") -> None:
        """End a streamed answer, with its last piece."""
        if self.gone or self.ended:
            return
        self.ended = True
        if self.chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        if data:
            self.carrier.write(data)
        self.carrier.finished(self)

    def cut(self) -> None:
        """Break off a streamed answer, so that the client sees that it is incomplete."""
        self.carrier.abort()


Handler = Callable[[Exchange], Awaitable[None]]
"""Answers an exchange."""
