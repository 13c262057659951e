"""One connection to an engine: a request, the response's head, its body piece by piece.

Whoever asked either awaits (`response`, `next`, `body`) or has set itself as `sink`, and is then called within the
event that brought the bytes, without a task being woken; it may take up awaiting at any moment, where the sink left
off. httptools parses, except what need not be parsed again: a head that was seen before (`http.head_cache`), and a
chunk that arrives exactly whole between two others, which is most of what a stream consists of.
"""

import asyncio
import re
from collections import deque
from functools import lru_cache
from typing import Protocol, cast

import httptools

from tidemill.errors import Unavailable
from tidemill.http.head_cache import KnownHead

_BUFFER_BYTES = 256 * 1024
"""Body bytes kept for a client that reads more slowly than the engine writes; then the engine has to wait."""
MAX_RESPONSE_HEADERS = 200
MAX_RESPONSE_HEAD_BYTES = 256 * 1024
MAX_SIZE_DIGITS = 8
_HEX = re.compile(rb"[0-9A-Fa-f]+")
MAX_MISSES = 64
"""An engine whose heads differ each time is not looked at for known ones any more."""


class EngineLost(Unavailable):
    """The engine cannot be reached, broke off its answer, or sent invalid HTTP."""

    status = 502
    code = "engine_lost"

    def __init__(self, message: str, *, sent: bool = True, timed_out: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        """False when nothing of the request can have reached the engine, so that it may be sent elsewhere."""
        self.timed_out = timed_out


@lru_cache(maxsize=4096)
def _size(line: bytes) -> int:
    """The size that a chunk's first line says; -1 for one that is not just a number."""
    return int(line, 16) if _HEX.fullmatch(line) else -1


class AnswerSink(Protocol):
    """Callbacks for an incoming answer; none after `EngineConnection.sink` is set to None."""

    def arrived(self) -> None:
        """Called when anything has changed.

        The head is there, bytes are there, the body is complete, or the engine is lost.
        """
        ...

    def chunk(self, data: bytes, framed: bytes) -> None:
        """A piece of the body that came as one chunk, while nothing else waits; `framed` is it with its frame."""
        ...


class ConnectionOwner(Protocol):
    """The pool that a connection belongs to."""

    loop: asyncio.AbstractEventLoop
    known_head: KnownHead | None
    """The head of an answer of this engine: all its connections get the same."""
    misses: int
    """Answers since the last that had it."""

    def put_back(self, connection: "EngineConnection") -> None: ...

    def forget(self, connection: "EngineConnection") -> None: ...


class EngineConnection(asyncio.Protocol):
    """One connection to an engine: a request, then its response head, then its body piece by piece."""

    def __init__(self, pool: ConnectionOwner) -> None:
        self._pool = pool
        self._loop = pool.loop
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self.sink: AnswerSink | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pieces: deque[bytes] = deque()
        """Of the body, a piece for each packet."""
        self._packet: list[bytes] = []
        """What the packet that is being read has of the body."""
        self._buffered = 0
        self._paused = False
        self._failure: EngineLost | None = None
        self._got_bytes = False
        self._head_bytes = 0
        self.head_done = False
        """`status` and `headers` are those of the answer."""
        self._between_chunks = False
        """In a chunked body: the parser has had the last chunk to its end, and nothing of the next."""
        self._keep_alive = False
        self.complete = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.deadline = 0.0
        """Loop time after which a silent engine is given up; moved by the owner, checked by `Pool.sweep`."""
        self.served = 0

    # The owner's side

    def send(self, head: bytes, body: bytes) -> None:
        """Send a request. The connection must be fresh from `Pool.acquire`."""
        if self._transport is None:
            return  # lost since it was made; `response` says so
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        self._got_bytes = self.head_done = self._between_chunks = self._keep_alive = self.complete = False
        self._head_bytes = 0
        self.status = 0
        self.headers = {}
        if len(body) < 65536:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    async def response(self) -> None:
        """Wait for the response's head; then `status` and `headers` are set. Raises EngineLost."""
        while not self.head_done:
            await self._wait()

    async def next(self) -> bytes:
        """The body bytes of the next packet, or b"" once the body is complete.

        Packet by packet, as a sink gets them: what is made of an answer must not hang on who reads it. Raises
        EngineLost when the engine goes away before the body is complete.
        """
        while not self._pieces:
            if self.complete:
                return b""
            await self._wait()
        if len(self._pieces) == 1:
            return self.take()
        data = self._pieces.popleft()
        self._buffered -= len(data)
        return data

    def take(self) -> bytes:
        """The body bytes received so far, possibly none."""
        pieces = self._pieces
        data = pieces.popleft() if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def give_back(self, data: bytes) -> None:
        """Put taken bytes back before the unread ones, for another reader."""
        self._pieces.appendleft(data)
        self._buffered += len(data)

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises EngineLost when it is longer than `limit` bytes or breaks off."""
        parts, size = [], 0
        while data := await self.next():
            size += len(data)
            if size > limit:
                raise EngineLost(f"The engine's answer is longer than {limit} bytes.")
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def lost(self) -> EngineLost | None:
        """Why the body stays incomplete; None while nothing has failed."""
        return self._failure

    @property
    def full(self) -> bool:
        """True if the buffer is full, so reading from the engine is paused."""
        return self._paused

    def pending(self) -> bytes:
        """The received but unread bytes; used to count what an aborted engine had produced."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    def expire_in(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now."""
        self.deadline = self._loop.time() + seconds

    async def finish(self, within_s: float) -> None:
        """Read and discard the end of the body, so that the connection can be kept."""
        if self._transport is None:
            return
        self.expire_in(within_s)
        try:
            while await self.next():
                pass
        except EngineLost:
            pass

    def release(self) -> None:
        """Give the connection back: kept when the response is complete, else closed."""
        if self.complete and self._keep_alive and not self._pieces:
            self._pool.put_back(self)
        else:
            self.abort()

    def abort(self, failure: EngineLost | None = None) -> None:
        """Close at once, so that the engine notices and stops; a waiting owner gets `failure`."""
        if failure is not None and self._failure is None:
            self._failure = failure
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        self._pool.forget(self)
        self._wake()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def late(self, now: float) -> bool:
        """True if the deadline has passed while the owner waits; an engine that waits is not late."""
        waits = (self._waiter is not None or self.sink is not None) and not self._paused
        return waits and 0.0 < self.deadline < now

    @property
    def reused_and_silent(self) -> bool:
        """True when a kept connection broke before any byte came back.

        The engine had closed it while it was idle.
        """
        return self.served > 0 and not self._got_bytes

    async def _wait(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._failure is not None and not self._pieces and not self.complete:
            raise self._failure

    def _wake(self) -> None:
        if self.sink is not None:
            self.sink.arrived()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._between_chunks:
            end = data.find(b"\r\n", 1, MAX_SIZE_DIGITS + 2)
            size = len(data) - end - 4
            if end > 0 and size > 0 and _size(data[:end]) == size and data[-2:] == b"\r\n":
                if self.sink is not None and not self._pieces:
                    self.sink.chunk(data[end + 2 : -2], data)
                else:
                    self._add(data[end + 2 : -2])
                    self._hold_back()
                    self._wake()
                return
        if self._parser is None or self.complete:
            self.abort(EngineLost("The engine sent bytes without a request."))
            return
        if not self._got_bytes:
            self._got_bytes = True
            known = self._pool.known_head
            if known is not None and (body := known.body_of(data)) is not None:
                self._pool.misses = 0
                self.status, self.headers = 200, known.headers
                self.head_done = self.complete = self._keep_alive = True
                if body:
                    self._add(body)
                self._hold_back()
                self._wake()
                return
            first = data
        else:
            first = b""
        broken: Exception | None = None
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            broken = error
        if self._packet:
            self._add(self._packet[0] if len(self._packet) == 1 else b"".join(self._packet))
            self._packet.clear()
        if broken is not None:
            if not self.complete:
                self.abort(EngineLost(f"The engine's answer is not valid HTTP: {broken}."))
                return
            self._keep_alive = False  # the answer is whole, and what came behind it is nobody's
        if self._between_chunks and not data.endswith(b"\r\n"):
            self._between_chunks = False  # a part of the next chunk's size may be among it
        if first and self.complete and self._keep_alive and self.status == 200:
            self._learn(first)
        if not self.head_done:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_RESPONSE_HEAD_BYTES:
                self.abort(EngineLost("The headers of the engine's answer are too large."))
                return
        self._hold_back()
        self._wake()

    def _add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._buffered += len(piece)

    def _learn(self, answer: bytes) -> None:
        pool = self._pool
        if pool.misses < MAX_MISSES:
            pool.misses += 1
            pool.known_head = KnownHead.of(answer, self.headers)

    def _hold_back(self) -> None:
        if self._buffered > _BUFFER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        # A body with neither length nor chunks ends with the connection (RFC 9112, 6.3).
        chunked = self.headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        if self.head_done and not self.complete and not chunked and b"content-length" not in self.headers:
            self.complete = True
            self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._parser = None  # the parser has this connection, and would keep it
        if not self.complete and self._failure is None:
            self._failure = EngineLost("The engine closed the connection before its answer was complete.")
        self._pool.forget(self)
        self._wake()

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("bytes after the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_RESPONSE_HEADERS:
            raise ValueError("too many response headers")
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:
            self.headers = {}  # 1xx: an interim answer; the real one follows
            return
        self.status = status
        self.head_done = True
        self._between_chunks = self.headers.get(b"transfer-encoding") == b"chunked"

    def on_body(self, body: bytes) -> None:
        self._packet.append(body)

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_message_complete(self) -> None:
        self._between_chunks = False
        if self.head_done:
            self.complete = True
            assert self._parser is not None
            self._keep_alive = self._parser.should_keep_alive()
