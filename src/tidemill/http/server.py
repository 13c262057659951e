"""The data plane's HTTP/1.1 server: asyncio protocols on uvloop, httptools for parsing.

It exists for three things that the measured servers do not give together (docs/decisions/0003-own-http-server.md):
back-pressure from a slow reader down to the engine, the moment at which a client leaves, and the lowest processor
time per chunk. It speaks what API clients speak: keep-alive, chunked bodies both ways, `Expect: 100-continue`. Each
buffer and wait has a bound (`http.server_connection`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from email.utils import formatdate
from typing import Any

from tidemill.http.exchange import ClientGone, Exchange, Handler
from tidemill.http.server_connection import ServerConnection

__all__ = ["MAX_CONNECTIONS", "ClientGone", "Exchange", "Handler", "HttpServer"]

MAX_CONNECTIONS = 10_000
"""Connections that clients may have open to one gateway process, if nothing else is said."""


class HttpServer:
    """An HTTP/1.1 server: connections, their deadlines, and a clean stop.

    `handler` answers an exchange, also one that is not proper HTTP (`Exchange.refusal`), and never raises. What it
    cannot do at once it gives back as work to be waited for, or counts as `underway`.
    """

    def __init__(
        self,
        handler: Callable[[Exchange], Awaitable[None] | None],
        new_request_id: Callable[[], str],
        *,
        loop: asyncio.AbstractEventLoop,
        max_body_bytes: int,
        write_timeout_s: float,
        streamed: Collection[tuple[bytes, bytes]] = (),
        lets_in: Callable[[Exchange], bool] = lambda exchange: True,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """`lets_in`: whether a large body shall be taken before the handler is called.

        Else the handler is called at once, and takes the body itself (`Exchange.incoming`), or does not.
        """
        self.loop = loop
        self.handler = handler
        self.new_request_id = new_request_id
        self.max_body_bytes = max_body_bytes
        self.max_connections = max_connections
        self.lets_in = lets_in
        self.streamed = streamed
        """Routes, by method and path, whose handlers take the body piece by piece, and limit it themselves."""
        self.too_large_message = (
            f"The request body is larger than {max_body_bytes // (1024 * 1024)} MiB. Send a smaller one."
        )
        self.crowded_message = (
            f"This gateway has reached its limit of {max_connections} connections. Try again shortly."
        )
        self.connections: set[ServerConnection] = set()
        self.underway = 0
        """Exchanges that are worked on without a task."""
        self.stopping = False
        self.now = loop.time()
        self.date_lines = b""
        self._write_timeout_s = write_timeout_s
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._tick()

    async def listen(self, host: str, port: int, *, reuse_port: bool = False) -> None:
        """Start to accept connections. Raises OSError if the address is in use."""
        self._server = await self.loop.create_server(
            lambda: ServerConnection(self), host, port, backlog=4096, reuse_port=reuse_port
        )

    def start(self, exchange: Exchange) -> None:
        """Start to answer an exchange."""
        rest = self.handler(exchange)
        if rest is not None:
            self.spawn(rest)  # type: ignore[arg-type]

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the rest of the work on an exchange in a task."""
        task: asyncio.Task[None] = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def working(self) -> int:
        """Number of requests in work."""
        return len(self._tasks) + self.underway

    async def stop(self, grace_s: float) -> bool:
        """Stop accepting, and give open requests `grace_s` seconds; True if all of them finished."""
        self.stopping = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_if_idle()
        await self._finish(grace_s)
        return not self.working

    async def _finish(self, within_s: float) -> None:
        deadline = self.loop.time() + within_s
        while self.working and self.loop.time() < deadline:
            await asyncio.sleep(0.01)

    async def cut_off(self) -> None:
        """Break off open requests, and wait until they are settled."""
        for connection in list(self.connections):
            connection.abort()
        await self._finish(5.0)

    def _tick(self) -> None:
        """Update the date header and close connections past their deadline, once a second."""
        self.now = self.loop.time()
        self.date_lines = b"date: %b\r\nserver: tidemill\r\n" % formatdate(time.time(), usegmt=True).encode()
        for connection in list(self.connections):
            if connection.deadline < self.now or (
                connection.blocked and connection.blocked_since < self.now - self._write_timeout_s
            ):
                connection.abort()
        self.loop.call_later(1.0, self._tick)
