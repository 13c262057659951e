"""A client's connection: flow control, deadlines, and the order of its exchanges.

`RequestParser` parses.

What an attacker may send is answered with 4xx and the connection closed: what follows on it cannot be trusted. Each
buffer and wait has a bound.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, NamedTuple, Protocol, cast

import httptools

from tidemill.http.exchange import Exchange
from tidemill.http.head_cache import KnownHead
from tidemill.http.request_parser import ParserRules, RequestParser

WRITE_BUFFER_BYTES = 64 * 1024
"""What waits for a slow reader in this process before the engine has to wait (the kernel holds some more)."""
HEAD_TIMEOUT_S = 20.0
"""From the first byte of a request to the end of its headers."""
BODY_TIMEOUT_S = 120.0
"""Between two pieces of a request body."""
LINGER_S = 30.0
"""How long what a refused client still sends is taken and thrown away, so that it gets to read why."""
_CROWDED_S = 5.0
"""How long a connection beyond the limit may take to ask for something."""
MAX_CROWD = 256
"""Connections beyond the limit that are told so at a time; further ones are broken off without a word."""
KEEP_ALIVE_S = 75.0
"""An idle connection is kept this long, like nginx does."""
_MAX_MISSES = 8
"""A client whose heads differ each time is not looked at for known ones any more."""
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
NEVER = float("inf")


class ServerState(ParserRules, Protocol):
    """The part of the server that its connections use."""

    loop: asyncio.AbstractEventLoop
    connections: "set[ServerConnection]"
    stopping: bool
    now: float
    """The loop's time, as of the last second."""
    date_lines: bytes
    underway: int
    max_connections: int

    def start(self, exchange: Exchange) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


class CachedHead(NamedTuple):
    """A cached head of this client, with its parsed properties."""

    head: KnownHead
    method: bytes
    path: bytes
    query: bytes


class ServerConnection(asyncio.Protocol):
    """One client connection. Pipelined requests are answered one after the other."""

    def __init__(self, server: ServerState) -> None:
        self.work = server
        self.blocked = False
        self.blocked_since = 0.0
        self.deadline = server.now + KEEP_ALIVE_S
        """Server time after which the connection is closed unless something happens; inf while it is worked on."""
        self.crowded = False
        self._transport: asyncio.Transport | None = None
        self._parser = RequestParser(self, server)
        self._working: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._unblock: asyncio.Future[None] | None = None
        self._known: CachedHead | None = None
        self._misses = 0
        self._deaf = False
        """Nothing more is taken from its client."""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        server = self.work
        room = server.max_connections - len(server.connections)
        if room <= 0:
            self.crowded = True
            self.deadline = server.now + _CROWDED_S
            if room <= -MAX_CROWD:
                self._deaf = True
                self._transport.abort()
        server.connections.add(self)
        if server.stopping:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        known, parser = self._known, self._parser
        if known is not None and parser.between and self._working is None:
            body = known.head.body_of(data)
            if body is not None and len(body) <= self.work.max_body_bytes:
                self._misses = 0
                self._received_again(known, body)
                return
        between, messages, head_goes_on = parser.between, parser.messages, parser.in_head
        try:
            parser.feed(data)
        except httptools.HttpParserError:
            if self._deaf:
                return  # the last answer has said that nothing more is taken
            self._refuse(*(parser.refusal or (400, "This is not a valid HTTP/1.1 request.")))
            return
        if parser.latest is not None:
            if between and parser.messages == messages + 1 and self._misses < _MAX_MISSES:
                self._learn(data, parser.latest)
            parser.latest = None
        if head_goes_on and parser.in_head and parser.messages == messages:
            return  # it must be whole by the deadline that its first byte has set
        if self._working is None and not parser.between:
            self.deadline = self.work.now + (HEAD_TIMEOUT_S if parser.in_head else BODY_TIMEOUT_S)
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
        """Set the deadline for the next piece of a body that is read piece by piece."""
        working = self._working
        if working is not None and working.incoming is not None and not working.incoming.complete:
            self.deadline = self.work.now + BODY_TIMEOUT_S

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
        self._parser.close()

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
        """After a complete answer, go on with the connection's next request, or close it."""
        self._working = None
        exchange.on_gone = None  # which has the in-flight request, which has the exchange
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
        elif self._parser.invites:
            self._parser.invites = False
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
        """Take a request whose head is cached, except for its length.

        The parser is where it was: between two requests.
        """
        exchange = Exchange(self, known.method, known.path, self.work.new_request_id(), known.head.headers)
        if known.query:
            exchange.query = known.query
        exchange.body = body
        self._begin(exchange)

    def _learn(self, message: bytes, exchange: Exchange) -> None:
        """Cache the head of a request that came in one piece, if it is plain."""
        self._misses += 1
        if exchange.method == b"POST" and exchange.chunked and exchange.keep_alive:
            head = KnownHead.of(message, exchange.headers)
            self._known = CachedHead(head, exchange.method, exchange.path, exchange.query) if head is not None else None

    # What the parser calls

    @property
    def idle(self) -> bool:
        return self._working is None

    @property
    def sent_ahead(self) -> int:
        return len(self._waiting)

    def received(self, exchange: Exchange) -> None:
        if self._deaf and exchange.refusal is None:
            return
        if self._working is None:
            self._begin(exchange)
            return
        self._waiting.append(exchange)
        if self._transport is not None:
            self._transport.pause_reading()

    def body_received(self, exchange: Exchange) -> None:
        if self._working is exchange:
            self.deadline = NEVER

    def _refuse(self, status: int, message: str) -> None:
        """Answer an invalid request and close, as the following bytes cannot be trusted."""
        self._deaf = True
        receiving = self._parser.receiving
        if receiving is not None and receiving.incoming is not None:  # its handler has it already
            receiving.incoming.fail(message)
            return
        exchange = receiving or Exchange(self, b"GET", b"", self.work.new_request_id())
        exchange.refusal = (status, message)
        exchange.keep_alive = False
        self._parser.receiving = None
        self.received(exchange)
