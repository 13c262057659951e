"""The data plane's HTTP/1.1 server: asyncio protocols on uvloop, httptools for parsing.

It exists for three things that the measured servers do not give together (docs/decisions/0003-own-http-server.md):
back-pressure from a slow reader down to the engine, the moment at which a client leaves, and the lowest processor
time per chunk. It speaks what API clients speak: keep-alive, chunked bodies both ways, `Expect: 100-continue`. Each
buffer and wait has a bound.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from email.utils import formatdate
from http import HTTPStatus
from typing import cast
from urllib.parse import unquote_to_bytes

import httptools

from tidemill.gateway.incoming import IncomingBody

MAX_HEAD_BYTES = 32 * 1024
"""Request line and headers together."""
MAX_PIPELINED = 16
"""Requests that a client may send ahead while its first is worked on."""
WRITE_BUFFER_BYTES = 64 * 1024
"""What waits for a slow reader in this process before the engine has to wait (the kernel holds some more)."""
HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request to the end of its headers."""
BODY_TIMEOUT_S = 120.0
"""Between two pieces of a request body."""
LINGER_S = 30.0
"""How long what a refused client still sends is taken and thrown away, so that it gets to read why."""
KEEP_ALIVE_S = 75.0
"""An idle connection is kept this long, like nginx does."""
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")

_OFFER = (b"upgrade", b"connection", b"http2-settings")
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}


class ClientGone(Exception):
    """The client has closed its connection, or takes nothing any more."""


class Exchange:
    """One request and the way to answer it."""

    __slots__ = (
        "_answered",
        "_chunked",
        "_protocol",
        "body",
        "ended",
        "extra",
        "gone",
        "headers",
        "incoming",
        "keep_alive",
        "method",
        "on_gone",
        "path",
        "query",
        "refusal",
        "request_id",
        "streaming",
    )

    def __init__(self, protocol: "ServerProtocol", method: bytes, path: bytes, request_id: str) -> None:
        self._protocol = protocol
        self._answered = False
        self._chunked = True
        self.refusal: tuple[int, str] | None = None
        """Status and message when the request cannot be taken as HTTP; the connection closes after the answer."""
        self.method = method
        self.path = path
        self.query = b""
        """What follows the question mark, undecoded."""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.incoming: IncomingBody | None = None
        """The body of a route that takes it piece by piece (`HttpServer.streamed`); `body` is then empty."""
        self.keep_alive = True
        self.request_id = request_id
        self.extra = b""
        """Header lines that the answer carries, whatever it is, each with its CRLF."""
        self.streaming = False
        self.ended = False
        """The answer is complete."""
        self.gone = False
        self.on_gone: Callable[[], None] | None = None
        """Called once, in the event loop, when the client leaves before its answer is complete."""

    @property
    def answered(self) -> bool:
        """The answer has begun."""
        return self._answered

    @property
    def unread(self) -> bool:
        """A part of the body is still to come: the connection cannot go on behind an answer to it."""
        return self.incoming is not None and not self.incoming.complete

    @property
    def from_here(self) -> bool:
        """The client is on this machine (the source of a connection to an address of one's own cannot be forged)."""
        return self._protocol.from_here

    @property
    def peer(self) -> str:
        """The address at the other end of the connection; empty when it is gone."""
        return self._protocol.peer

    def respond(self, status: int, body: bytes, headers: bytes = b"", *, close: bool = False) -> None:
        """Send a whole answer. `headers` are complete lines, each with its CRLF."""
        if self._answered or self.gone:
            return
        self._answered = self.ended = True
        self.keep_alive = self.keep_alive and not close and not self.unread
        head = b"%bx-request-id: %b\r\n%b%bcontent-length: %d\r\n\r\n" % (
            self._head(status),
            self.request_id.encode(),
            headers,
            b"" if self.keep_alive else b"connection: close\r\n",
            len(body),
        )
        self._protocol.write(head + body if self.method != b"HEAD" else head)
        self._protocol.finished(self)

    def start_stream(self, headers: bytes) -> None:
        """Begin a streamed answer (status 200)."""
        self._answered = self.streaming = True
        framing = b"transfer-encoding: chunked\r\n"
        if not self._chunked:
            self.keep_alive = False
            framing = b""
        self._protocol.write(
            b"%bx-request-id: %b\r\n%b%b%b\r\n"
            % (
                self._head(200),
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
        self._protocol.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def drain(self) -> None:
        """Wait while the client reads more slowly than it is written to. Raises ClientGone."""
        if self._protocol.blocked:
            await self._protocol.unblocked()
        if self.gone:
            raise ClientGone

    @property
    def must_drain(self) -> bool:
        return self._protocol.blocked

    def end(self, data: bytes = b"") -> None:
        """End a streamed answer, with its last piece."""
        if self.gone or self.ended:
            return
        self.ended = True
        if self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        if data:
            self._protocol.write(data)
        self._protocol.finished(self)

    def cut(self) -> None:
        """Break a streamed answer off, so that the client sees that it is not whole."""
        self._protocol.abort()

    def without_chunks(self) -> None:
        """The client speaks HTTP/1.0: a streamed answer ends with the connection."""
        self._chunked = False

    def _head(self, status: int) -> bytes:
        return _STATUS_LINES[status] + self._protocol.server.date_lines + self.extra


Handler = Callable[[Exchange], Awaitable[None]]


class ServerProtocol(asyncio.Protocol):
    """One client connection. Requests that a client sends ahead are worked on one after the other."""

    def __init__(self, server: "HttpServer") -> None:
        self.server = server
        self.blocked = False
        self.blocked_since = 0.0
        self.deadline = server.now + KEEP_ALIVE_S
        """Server time after which the connection is closed unless something happens; inf while it is worked on."""
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._working: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._unblock: asyncio.Future[None] | None = None
        # Of the request that is being received:
        self._receiving: Exchange | None = None
        self._messages = 0
        self._in_head = True
        self._head_bytes = 0
        self._fed_in_head = 0
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: bytes | bytearray = b""
        self._body_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._deaf = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self.server.connections.add(self)
        if self.server.stopping:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        before = (self._messages, self._in_head)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._refuse(*(self._refusal or (400, "What was sent is not an HTTP/1.1 request.")))
            return
        if self._in_head and before == (self._messages, True):  # all of it belongs to a head that had begun before
            self._fed_in_head += len(data)
            if self._fed_in_head > MAX_HEAD_BYTES:
                self._refuse(431, "The request's headers are too large.")
        elif self._working is None:
            self.deadline = self.server.now + (HEAD_TIMEOUT_S if self._in_head else BODY_TIMEOUT_S)
        elif self.deadline != float("inf"):
            self._await_body()

    @property
    def from_here(self) -> bool:
        if self._transport is None:
            return False
        peer, own = (self._transport.get_extra_info(name) for name in ("peername", "sockname"))
        return bool(peer) and (peer[0] in LOOPBACK or peer[0] == own[0])

    @property
    def peer(self) -> str:
        peer = self._transport.get_extra_info("peername") if self._transport is not None else None
        return str(peer[0]) if peer else ""

    def hold_body(self) -> None:
        self.deadline = float("inf")
        if self._transport is not None:
            self._transport.pause_reading()

    def take_body(self) -> None:
        self._await_body()
        if self._transport is not None:
            self._transport.resume_reading()

    def _await_body(self) -> None:
        """Of a body that is being taken piece by piece, the next piece must come in time."""
        if self._working is not None and self._working.unread:
            self.deadline = self.server.now + BODY_TIMEOUT_S

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
            # An offer to change protocols, such as Java's `Upgrade: h2c`, may be ignored (RFC 9110, 7.8). The parser
            # has stopped behind the head, so that is parsed once more without the offer.
            method = self._parser.get_method()
            if method == b"CONNECT":
                raise httptools.HttpParserError("not a proxy")
            self._parser = httptools.HttpRequestParser(self)
            lines = [b"%b %b HTTP/1.1" % (method, self._url)]
            lines += [b"%b: %b" % header for header in self._headers.items() if header[0] not in _OFFER]
            data = b"\r\n".join(lines) + b"\r\n\r\n" + data

    def eof_received(self) -> bool:
        # Clients of an API do not half-close: an end of input is a client that left (as nginx and hyper take it).
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.server.connections.discard(self)
        self._waiting.clear()
        exchange = self._working
        if exchange is not None:
            exchange.gone = True
            if exchange.incoming is not None:
                exchange.incoming.fail("The client has left.")
            if exchange.on_gone is not None:
                exchange.on_gone()
        self.resume_writing()

    def pause_writing(self) -> None:
        self.blocked = True
        self.blocked_since = self.server.loop.time()

    def resume_writing(self) -> None:
        self.blocked = False
        if self._unblock is not None and not self._unblock.done():
            self._unblock.set_result(None)

    # What exchanges call

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def unblocked(self) -> None:
        """Wait until the transport's buffer has drained, or the connection is lost."""
        self._unblock = self.server.loop.create_future()
        try:
            await self._unblock
        finally:
            self._unblock = None

    def finished(self, exchange: Exchange) -> None:
        """The answer is complete: go on with the next request of the connection, or close it."""
        self._working = None
        self.deadline = self.server.now + KEEP_ALIVE_S
        if self._transport is None:
            return
        if (exchange.refusal is not None or exchange.unread) and self._transport.can_write_eof():
            self._deaf = True
            # Closing while the client still sends would reset the connection, and the answer with it (RFC 9112, 9.6).
            self._transport.write_eof()
            self._transport.resume_reading()
            self.deadline = self.server.now + LINGER_S
        elif not exchange.keep_alive or self.server.stopping:
            self._deaf = True
            self._transport.close()
        elif self._waiting:
            self._begin(self._waiting.popleft())
            self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        if self._working is None and self._transport is not None:
            self._transport.close()

    def _begin(self, exchange: Exchange) -> None:
        self._working = exchange
        self.deadline = float("inf")
        self._await_body()
        self.server.start(exchange)

    def _received(self, exchange: Exchange) -> None:
        if self._working is None:
            self._begin(exchange)
            return
        self._waiting.append(exchange)
        if self._transport is not None:
            self._transport.pause_reading()

    def _refuse(self, status: int, message: str) -> None:
        """Answer a request that is not taken, and close: what follows on the connection cannot be trusted."""
        self._deaf = True
        if self._receiving is not None and self._receiving.incoming is not None:  # its handler has it already
            self._receiving.incoming.fail(message)
            return
        exchange = self._receiving or Exchange(self, b"GET", b"", self.server.new_request_id())
        exchange.refusal = (status, message)
        exchange.keep_alive = False
        self._receiving = None
        self._received(exchange)

    # httptools callbacks

    def on_message_begin(self) -> None:
        if len(self._waiting) >= MAX_PIPELINED:
            self._refusal = (400, f"Send at most {MAX_PIPELINED} requests ahead on a connection.")
            raise ValueError("too many requests ahead")
        self._receiving = None
        self._messages += 1
        self._in_head = True
        self._head_bytes = self._fed_in_head = self._body_bytes = 0
        self._url = b""
        self._headers = {}
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        if self._in_head:  # else a trailer, which must not change what the head has said
            self._headers[name.lower()] = value

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refusal = (431, "The request's headers are too large.")
            raise ValueError("head too large")

    def on_headers_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        self._in_head = False
        headers = self._headers
        path, _, query = self._url.partition(b"?")
        if b"%" in path:
            path = unquote_to_bytes(path)
        exchange = Exchange(self, self._parser.get_method(), path, self.server.new_request_id())
        exchange.query = query
        exchange.headers = headers
        exchange.keep_alive = self._parser.should_keep_alive()
        if self._parser.get_http_version() == "1.0":
            exchange.without_chunks()
        self._receiving = exchange
        length = headers.get(b"content-length")
        streamed = (exchange.method, path) in self.server.streamed
        if length is not None and int(length) > self.server.max_body_bytes and not streamed:
            self._too_large()
        if headers.get(b"expect", b"").lower() == b"100-continue" and self._working is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if streamed:
            exchange.incoming = IncomingBody(self)
            self._received(exchange)

    def on_body(self, body: bytes) -> None:
        if self._receiving is not None and self._receiving.incoming is not None:
            self._receiving.incoming.feed(body)
            return
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body  # a list of pieces would let chunks of one byte take thirty times their room
        self._body_bytes += len(body)
        if self._body_bytes > self.server.max_body_bytes:
            self._too_large()

    def _too_large(self) -> None:
        self._refusal = (413, self.server.too_large_message)
        raise ValueError("body too large")

    def on_message_complete(self) -> None:
        exchange = self._receiving
        if exchange is None:
            return  # see `_feed`
        exchange.body = bytes(self._body)
        self._body = b""
        self._receiving = None
        self._in_head = True
        self._fed_in_head = 0
        if exchange.incoming is None:
            self._received(exchange)
            return
        exchange.incoming.end()
        if self._working is exchange:
            self.deadline = float("inf")


class HttpServer:
    """The listening side: connections, their deadlines, and a clean stop.

    `handler` answers an exchange, also one that is not proper HTTP (`Exchange.refusal`).
    """

    def __init__(
        self,
        handler: Handler,
        new_request_id: Callable[[], str],
        *,
        loop: asyncio.AbstractEventLoop,
        max_body_bytes: int,
        write_timeout_s: float,
        streamed: Collection[tuple[bytes, bytes]] = (),
    ) -> None:
        self.loop = loop
        self.handler = handler
        self.new_request_id = new_request_id
        self.max_body_bytes = max_body_bytes
        self.streamed = streamed
        """Routes, by method and path, whose handlers take the body piece by piece, and limit it themselves."""
        self.too_large_message = (
            f"The request body is larger than {max_body_bytes // (1024 * 1024)} MiB. Send a smaller one."
        )
        self.connections: set[ServerProtocol] = set()
        self.stopping = False
        self.now = loop.time()
        self.date_lines = b""
        self._write_timeout_s = write_timeout_s
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._tick()

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> None:
        """Begin to accept. Raises OSError when the address is taken."""
        self._server = await self.loop.create_server(
            lambda: ServerProtocol(self), host, port, backlog=4096, reuse_port=reuse_port
        )

    def start(self, exchange: Exchange) -> None:
        task: asyncio.Task[None] = self.loop.create_task(self.handler(exchange))  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def working(self) -> int:
        """Requests that are worked on."""
        return len(self._tasks)

    async def stop(self, grace_s: float) -> bool:
        """Accept nothing more, let open requests finish for `grace_s` seconds; True when all of them did."""
        self.stopping = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_if_idle()
        deadline = self.loop.time() + grace_s
        while self._tasks and self.loop.time() < deadline:
            await asyncio.wait(self._tasks, timeout=max(deadline - self.loop.time(), 0.01))
        return not self._tasks

    async def cut_off(self) -> None:
        """Break off what is still open, and wait for its settlement."""
        for connection in list(self.connections):
            connection.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)

    def _tick(self) -> None:
        """Once a second: the date, and connections whose time is over."""
        self.now = self.loop.time()
        self.date_lines = b"date: %b\r\nserver: tidemill\r\n" % formatdate(time.time(), usegmt=True).encode()
        for connection in list(self.connections):
            if connection.deadline < self.now or (
                connection.blocked and connection.blocked_since < self.now - self._write_timeout_s
            ):
                connection.abort()
        self.loop.call_later(1.0, self._tick)
