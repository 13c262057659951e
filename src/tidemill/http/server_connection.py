"""A client's connection: bytes become exchanges. httptools parses; each buffer and wait has a bound.

What an attacker may send is answered with 4xx and the connection closed: what follows on it cannot be trusted.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Coroutine
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import unquote_to_bytes

import httptools

from tidemill.http.exchange import Exchange
from tidemill.http.head_cache import KnownHead
from tidemill.http.request_body import RequestBody

MAX_HEAD_BYTES = 32 * 1024
"""Request line and headers together."""
MAX_PIPELINED = 16
"""Requests that a client may send ahead while its first is worked on."""
EARLY_BYTES = 16 * 1024
"""A longer body, or one of unknown length, is not taken before it is known who sends it."""
WRITE_BUFFER_BYTES = 64 * 1024
"""What waits for a slow reader in this process before the engine has to wait (the kernel holds some more)."""
HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request to the end of its headers."""
BODY_TIMEOUT_S = 120.0
"""Between two pieces of a request body."""
LINGER_S = 30.0
"""How long what a refused client still sends is taken and thrown away, so that it gets to read why."""
CROWDED_S = 5.0
"""How long a connection beyond the limit may take to ask for something."""
MAX_CROWD = 256
"""Connections beyond the limit that are told so at a time; further ones are broken off without a word."""
KEEP_ALIVE_S = 75.0
"""An idle connection is kept this long, like nginx does."""
MAX_MISSES = 8
"""A client whose heads differ each time is not looked at for known ones any more."""
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
NEVER = float("inf")

_OFFER = (b"upgrade", b"connection", b"http2-settings")


class ServerState(Protocol):
    """The server, as its connections know it."""

    loop: asyncio.AbstractEventLoop
    connections: "set[ServerConnection]"
    stopping: bool
    now: float
    """The loop's time, as of the last second."""
    date_lines: bytes
    underway: int
    max_connections: int
    max_body_bytes: int
    too_large_message: str
    crowded_message: str
    streamed: Collection[tuple[bytes, bytes]]

    def new_request_id(self) -> str: ...

    def lets_in(self, exchange: Exchange) -> bool: ...

    def start(self, exchange: Exchange) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class CachedHead(NamedTuple):
    """A head that this client has sent before, and what it says beside its headers."""

    head: KnownHead
    method: bytes
    path: bytes
    query: bytes


class ServerConnection(asyncio.Protocol):
    """One client connection. Requests that a client sends ahead are worked on one after the other."""

    def __init__(self, server: ServerState) -> None:
        self.work = server
        self.blocked = False
        self.blocked_since = 0.0
        self.deadline = server.now + KEEP_ALIVE_S
        """Server time after which the connection is closed unless something happens; inf while it is worked on."""
        self._crowded = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._working: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._unblock: asyncio.Future[None] | None = None
        # Of the request that is being received:
        self._receiving: Exchange | None = None
        self._messages = 0
        self._between = True
        """Nothing of a request has come since the last one was whole."""
        self._known: CachedHead | None = None
        self._latest: Exchange | None = None
        self._misses = 0
        self._in_head = True
        self._head_bytes = 0
        self._fed_in_head = 0
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: bytes | bytearray = b""
        self._body_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._invites = False
        """Its client is to be told to send the body, when what came before it has been answered."""
        self._deaf = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        server = self.work
        room = server.max_connections - len(server.connections)
        if room <= 0:
            self._crowded = True
            self.deadline = server.now + CROWDED_S
            if room <= -MAX_CROWD:
                self._deaf = True
                self._transport.abort()
        server.connections.add(self)
        if server.stopping:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        known = self._known
        if known is not None and self._between and self._working is None:
            body = known.head.body_of(data)
            if body is not None and len(body) <= self.work.max_body_bytes:
                self._misses = 0
                self._received_again(known, body)
                return
        between, before = self._between, (self._messages, self._in_head)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            if self._deaf:
                return  # the last answer has said that nothing more is taken
            self._refuse(*(self._refusal or (400, "What was sent is not an HTTP/1.1 request.")))
            return
        if between and self._latest is not None and self._messages == before[0] + 1:
            self._learn(data, self._latest)
        self._latest = None
        if self._in_head and before == (self._messages, True):  # all of it belongs to a head that had begun before
            self._fed_in_head += len(data)
            if self._fed_in_head > MAX_HEAD_BYTES:
                self._refuse(431, "The request's headers are too large.")
        elif self._working is None and not self._between:
            self.deadline = self.work.now + (HEAD_TIMEOUT_S if self._in_head else BODY_TIMEOUT_S)
        elif self.deadline != NEVER:
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
        self.deadline = NEVER
        if self._transport is not None:
            self._transport.pause_reading()

    def take_body(self) -> None:
        self._await_body()
        if self._transport is not None:
            self._transport.resume_reading()

    def invite_body(self) -> None:
        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _await_body(self) -> None:
        """Of a body that is being taken piece by piece, the next piece must come in time."""
        working = self._working
        if working is not None and working.incoming is not None and not working.incoming.complete:
            self.deadline = self.work.now + BODY_TIMEOUT_S

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
        self.work.connections.discard(self)
        self._waiting.clear()
        exchange = self._working
        if exchange is not None:
            exchange.gone = True
            if exchange.incoming is not None:
                exchange.incoming.fail("The client has left.")
            if exchange.on_gone is not None:
                exchange.on_gone()
                exchange.on_gone = None
        self.resume_writing()
        # No rings are left behind: the collector comes late to what is as old as a long stream.
        self._working = None
        del self._parser

    def pause_writing(self) -> None:
        self.blocked = True
        self.blocked_since = self.work.loop.time()

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
        self._unblock = self.work.loop.create_future()
        try:
            await self._unblock
        finally:
            self._unblock = None

    def finished(self, exchange: Exchange) -> None:
        """The answer is complete: go on with the next request of the connection, or close it."""
        self._working = None
        exchange.on_gone = None  # which has the flight, which has the exchange
        self.deadline = self.work.now + KEEP_ALIVE_S
        if self._transport is None:
            return
        if (exchange.refusal is not None or exchange.unread) and self._transport.can_write_eof():
            self._deaf = True
            # Closing while the client still sends would reset the connection, and the answer with it (RFC 9112, 9.6).
            self._transport.write_eof()
            self._transport.resume_reading()
            self.deadline = self.work.now + LINGER_S
        elif not exchange.keep_alive or self.work.stopping:
            self._deaf = True
            self._transport.close()
        elif self._waiting:
            self._begin(self._waiting.popleft())
            self._transport.resume_reading()
        elif self._invites:
            self._invites = False
            self.invite_body()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        if self._working is None and self._transport is not None:
            self._transport.close()

    def _begin(self, exchange: Exchange) -> None:
        self._working = exchange
        self.deadline = NEVER
        if exchange.incoming is not None:
            self._await_body()
        self.work.start(exchange)

    def _received_again(self, known: CachedHead, body: bytes) -> None:
        """Take a request whose head is known, but for its length. The parser is where it was: between two requests."""
        exchange = Exchange(self, known.method, known.path, self.work.new_request_id(), known.head.headers)
        if known.query:
            exchange.query = known.query
        exchange.body = body
        self._begin(exchange)

    def _learn(self, message: bytes, exchange: Exchange) -> None:
        """Remember the head of a request that has come in one piece, if it is plain."""
        self._misses += 1
        if exchange.method == b"POST" and exchange.chunked and exchange.keep_alive:
            head = KnownHead.of(message, exchange.headers)
            self._known = CachedHead(head, exchange.method, exchange.path, exchange.query) if head is not None else None

    def _received(self, exchange: Exchange) -> None:
        if self._deaf and exchange.refusal is None:
            return
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
        exchange = self._receiving or Exchange(self, b"GET", b"", self.work.new_request_id())
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
        self._between = self._invites = False
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
        parser, server = self._parser, self.work
        exchange = Exchange(
            self, parser.get_method(), path, server.new_request_id(), headers, parser.should_keep_alive()
        )
        if query:
            exchange.query = query
        if parser.get_http_version() == "1.0":
            exchange.chunked = False
        self._receiving = exchange
        if self._crowded:
            self._refusal = (503, server.crowded_message)
            raise ValueError("too many connections")  # it gets to read why, see `finished`
        length = int(headers.get(b"content-length", b"0"))
        streamed = (exchange.method, path) in server.streamed
        if length > server.max_body_bytes and not streamed:
            self._too_large()
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        weighty = waits or length > EARLY_BYTES or b"transfer-encoding" in headers
        if streamed or (weighty and not server.lets_in(exchange)):
            exchange.incoming = RequestBody(self, waits=waits, limit=None if streamed else server.max_body_bytes)
            self._received(exchange)
        elif waits and self._working is None:
            self.invite_body()
        else:
            self._invites = waits

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
        if self._body_bytes > self.work.max_body_bytes:
            self._too_large()

    def _too_large(self) -> None:
        self._refusal = (413, self.work.too_large_message)
        raise ValueError("body too large")

    def on_message_complete(self) -> None:
        exchange = self._receiving
        if exchange is None:
            return  # see `_feed`
        self._between = True
        self._invites = False
        self._receiving = None
        self._in_head = True
        self._fed_in_head = 0
        if exchange.incoming is None:
            if self._body:
                exchange.body = bytes(self._body)
                self._body = b""
            if self._misses < MAX_MISSES:
                self._latest = exchange
            self._received(exchange)
            return
        exchange.incoming.end()
        if self._working is exchange:
            self.deadline = NEVER
