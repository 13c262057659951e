"""A small keep-alive HTTP/1.1 client toward the engines, on asyncio.Protocol and httptools.

The one place where a general HTTP library costs too much (docs/decisions/0002-upstream-client.md). It knows what a
gateway needs: one request at a time on a connection, bodies handed over as they arrive, back-pressure to the
engine, reuse of idle connections, and a deadline that a coarse timer enforces.
"""

import asyncio
import ssl
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import urlsplit

from tidemill.errors import ConfigError
from tidemill.http.client_connection import EngineConnection, EngineLost
from tidemill.http.head_cache import KnownHead

__all__ = ["AnswerOwner", "ConnectionPool", "EngineAddress", "EngineConnection", "EngineLost"]

CONNECT_TIMEOUT_S = 5.0
IDLE_CONNECTIONS = 1024
"""Keep-alive connections kept per engine."""


class EngineAddress:
    """An engine's base URL, parsed once."""

    __slots__ = ("base_url", "headers", "host", "path", "port", "prefix", "tls")

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        """`headers` go with every request, such as the one with the API key. Raises ConfigError."""
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"base_url {base_url!r}: the port is not a number.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url {base_url!r} is not a valid URL.", hint="Write http://HOST:PORT/v1.")
        self.base_url = base_url
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        self.prefix = self.path.encode("ascii")
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Content-Type: application/json"]
        for name, value in (headers or {}).items():
            if not value.isascii() or not value.isprintable():
                raise ConfigError("The API key of an upstream has characters that are not allowed in an HTTP header.")
            lines.append(f"{name}: {value}")
        self.headers = "\r\n".join(lines).encode("ascii") + b"\r\n"


class AnswerOwner(Protocol):
    """The waiter for an answer."""

    connection: EngineConnection | None

    @property
    def given_up(self) -> bool: ...


class ConnectionPool:
    """The connections to one engine: idle ones for reuse, busy ones for the sweep."""

    def __init__(self, address: EngineAddress, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.loop = loop
        self.known_head: KnownHead | None = None
        self.misses = 0
        self._idle: list[EngineConnection] = []
        self._busy: set[EngineConnection] = set()
        self._tls = ssl.create_default_context() if address.tls else None

    def idle_connection(self) -> EngineConnection | None:
        """A kept connection that still looks alive, the most recently used first."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._busy.add(connection)
                return connection
        return None

    async def connect(self) -> EngineConnection:
        """A new connection. Raises EngineLost (with `sent` false) when the engine does not answer."""
        address = self.address
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await self.loop.create_connection(
                    lambda: EngineConnection(self), address.host, address.port, ssl=self._tls
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
        owner: "AnswerOwner | None" = None,
        method: bytes = b"POST",
        headers: bytes = b"",
        fresh: bool = False,
    ) -> EngineConnection:
        """Send a request and wait for its head, on a kept connection or a new one (if `fresh`, a new one).

        `headers` are further complete lines, each with its CRLF.
        `owner.connection` is the connection in use from the start, so that it can be aborted meanwhile. A kept
        connection that the engine had closed while it was idle is replaced once, unseen. Raises EngineLost, and the
        connection is closed then. The caller must `release` or `abort` what is returned.
        """
        head = self._head(path, body, method, headers)
        connection = (None if fresh else self.idle_connection()) or await self.connect()
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

    def send(
        self, connection: EngineConnection, path: bytes, body: bytes, timeout_s: float, headers: bytes = b""
    ) -> None:
        """Send a POST on an exclusive connection.

        A kept one may turn out to be closed by the engine
        (`EngineConnection.reused_and_silent`).
        """
        connection.expire_in(timeout_s)
        connection.send(self._head(path, body, b"POST", headers), body)

    def _head(self, path: bytes, body: bytes, method: bytes, headers: bytes) -> bytes:
        address = self.address
        return b"%b %b%b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n" % (
            method,
            address.prefix,
            path,
            address.headers,
            headers,
            len(body),
        )

    def put_back(self, connection: EngineConnection) -> None:
        self._busy.discard(connection)
        connection.served += 1
        connection.deadline = 0.0
        if len(self._idle) < IDLE_CONNECTIONS and connection.usable:
            self._idle.append(connection)
        else:
            connection.abort()

    def forget(self, connection: EngineConnection) -> None:
        self._busy.discard(connection)

    def sweep(self, now: float) -> None:
        """Abort connections whose engine is silent past its deadline. Called a few times a second."""
        late = [connection for connection in self._busy if connection.late(now)]
        for connection in late:
            connection.abort(EngineLost("The engine stopped sending data.", timed_out=True))

    def close_idle(self) -> None:
        """Close the kept connections; busy ones finish."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()
