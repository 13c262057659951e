"""A small keep-alive HTTP/1.1 client toward the engines, on asyncio.Protocol and httptools.

The one place where a general HTTP library costs too much (docs/decisions/0002-upstream-client.md). It knows what a
gateway needs: one request at a time on a connection, bodies handed over as they arrive, back-pressure to the
engine, reuse of idle connections, and a deadline that a coarse timer enforces.
"""

import asyncio
import ssl
from collections import deque
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from tidemill.errors import ConfigError, Unavailable

BUFFER_BYTES = 256 * 1024
"""Body bytes kept for a client that reads more slowly than the engine writes; then the engine has to wait."""
CONNECT_TIMEOUT_S = 5.0
IDLE_CONNECTIONS = 1024
"""Keep-alive connections kept per engine."""
MAX_RESPONSE_HEADERS = 200
MAX_RESPONSE_HEAD_BYTES = 256 * 1024


class EngineLost(Unavailable):
    """The engine cannot be reached, went away in the middle, or sent what is not HTTP."""

    status = 502
    code = "engine_lost"

    def __init__(self, message: str, *, sent: bool = True, timed_out: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        """False when nothing of the request can have reached the engine, so that it may be sent elsewhere."""
        self.timed_out = timed_out


class Address:
    """Where an engine listens: base URL taken apart once."""

    __slots__ = ("base_url", "headers", "host", "path", "port", "tls")

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"base_url {base_url!r}: the port is not a number.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url {base_url!r} is not an address.", hint="Write http://HOST:PORT/v1.")
        self.base_url = base_url
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Content-Type: application/json"]
        if api_key:
            if not api_key.isascii() or not api_key.isprintable():
                raise ConfigError("The API key of an upstream has characters that a header cannot carry.")
            lines.append(f"Authorization: Bearer {api_key}")
        self.headers = "\r\n".join(lines).encode("ascii") + b"\r\n"


class Connection(asyncio.Protocol):
    """One connection to an engine: a request, then its response head, then its body piece by piece."""

    def __init__(self, pool: "Pool") -> None:
        self._pool = pool
        self._loop = pool.loop
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._paused = False
        self._failure: EngineLost | None = None
        self._got_bytes = False
        self._head_bytes = 0
        self._head_done = False
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
        self._parser = httptools.HttpResponseParser(self)
        self._got_bytes = self._head_done = self._keep_alive = self.complete = False
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
        while not self._head_done:
            await self._wait()

    async def next(self) -> bytes:
        """The body bytes that have arrived since the last call, or b"" once the body is complete.

        Raises EngineLost when the engine goes away before the body is complete.
        """
        while not self._pieces:
            if self.complete:
                return b""
            await self._wait()
        pieces = self._pieces
        data = pieces.popleft() if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises EngineLost when it is longer than `limit` bytes or breaks off."""
        parts, size = [], 0
        while data := await self.next():
            size += len(data)
            if size > limit:
                raise EngineLost(f"The engine's answer is longer than {limit} bytes.")
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pending(self) -> bytes:
        """What has arrived and was not yet handed over; used to count what an aborted engine had produced."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    def expire_in(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now."""
        self.deadline = self._loop.time() + seconds

    async def finish(self, within_s: float) -> None:
        """Read what ends the body, of which nothing more is wanted, so that the connection can be kept."""
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
        """The deadline has passed while the owner waits. An engine that waits for its owner is not late."""
        return self._waiter is not None and 0.0 < self.deadline < now

    @property
    def reused_and_silent(self) -> bool:
        """True when a kept connection broke before any byte came back: the engine had closed it while it was idle."""
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
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but name.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self.complete:
            self.abort(EngineLost("The engine sent bytes that nobody asked for."))
            return
        self._got_bytes = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self.abort(EngineLost(f"The engine's answer is not HTTP: {error}."))
            return
        if not self._head_done:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_RESPONSE_HEAD_BYTES:
                self.abort(EngineLost("The head of the engine's answer does not end."))
                return
        if self._buffered > BUFFER_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        # A body with neither length nor chunks ends with the connection (RFC 9112, 6.3).
        chunked = self.headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        if self._head_done and not self.complete and not chunked and b"content-length" not in self.headers:
            self.complete = True
            self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.complete and self._failure is None:
            self._failure = EngineLost("The engine closed the connection before its answer was complete.")
        self._pool.forget(self)
        self._wake()

    # httptools callbacks

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
        self._head_done = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        if self._head_done:
            self.complete = True
            assert self._parser is not None
            self._keep_alive = self._parser.should_keep_alive()


class Owner(Protocol):
    """Whoever waits for an answer."""

    connection: Connection | None
    given_up: bool


class Pool:
    """The connections to one engine: idle ones for reuse, busy ones for the sweep."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.loop = loop
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._tls = ssl.create_default_context() if address.tls else None

    def idle_connection(self) -> Connection | None:
        """A kept connection that still looks alive, the most recently used first."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._busy.add(connection)
                return connection
        return None

    async def connect(self) -> Connection:
        """A new connection. Raises EngineLost (with `sent` false) when the engine does not answer."""
        address = self.address
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self), address.host, address.port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
            raise EngineLost(f"The engine cannot be reached: {reason}.", sent=False) from error
        self._busy.add(connection)
        return connection

    async def request(
        self,
        path: bytes,
        body: bytes,
        timeout_s: float,
        *,
        owner: "Owner | None" = None,
        method: bytes = b"POST",
        headers: bytes = b"",
    ) -> Connection:
        """Send a request and wait for its head, on a kept connection or a new one.

        `headers` are further complete lines, each with its CRLF.
        `owner.connection` is the connection in use from the start, so that it can be aborted meanwhile. A kept
        connection that the engine had closed while it was idle is replaced once, unseen. Raises EngineLost, and the
        connection is closed then. The caller must `release` or `abort` what is returned.
        """
        address = self.address
        head = b"%b %b%b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n" % (
            method,
            address.path.encode("ascii"),
            path,
            address.headers,
            headers,
            len(body),
        )
        connection = self.idle_connection() or await self.connect()
        while True:
            if owner is not None:
                owner.connection = connection
                if owner.given_up:
                    connection.abort()
                    raise EngineLost("The client left before its request was sent.", sent=False)
            connection.expire_in(timeout_s)
            connection.send(head, body)
            try:
                await connection.response()
                return connection
            except EngineLost as lost:
                connection.abort()
                given_up = owner is not None and owner.given_up
                if not connection.reused_and_silent or lost.timed_out or given_up:
                    raise
                connection = await self.connect()
            except BaseException:
                connection.abort()
                raise

    def put_back(self, connection: Connection) -> None:
        self._busy.discard(connection)
        connection.served += 1
        connection.deadline = 0.0
        if len(self._idle) < IDLE_CONNECTIONS and connection.usable:
            self._idle.append(connection)
        else:
            connection.abort()

    def forget(self, connection: Connection) -> None:
        self._busy.discard(connection)

    def sweep(self, now: float) -> None:
        """Give up on engines that have been silent past their deadline. Called a few times a second."""
        late = [connection for connection in self._busy if connection.late(now)]
        for connection in late:
            connection.abort(EngineLost("The engine fell silent.", timed_out=True))

    def close_idle(self) -> None:
        """Close the kept connections; busy ones finish."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()
