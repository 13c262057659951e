"""Base of endpoints that read and write the store for a tenant: authentication, threads, JSON."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

import msgspec
import structlog

from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.auth.snapshot import Principal
from tidemill.http.head_lines import JSON, OCTET_STREAM
from tidemill.http.server import ClientGone, Exchange, Handler
from tidemill.store.engine import Store

log = structlog.get_logger()

T = TypeVar("T")

READ_BYTES = 256 * 1024
"""Of a file that is sent, bytes read at a time."""

_encode = msgspec.json.Encoder().encode

Routes = dict[tuple[bytes, bytes], Handler]
"""Handlers by method and path; `{id}` in a path stands for any name."""


class TenantApi:
    """Base of the Files, Batches and Jobs APIs of one gateway process. What blocks runs in `executor`."""

    def __init__(self, authenticator: Authenticator, store: Store, executor: Executor) -> None:
        self._authenticator = authenticator
        self._store = store
        self._executor = executor

    @property
    def routes(self) -> Routes:
        """The endpoints of this API."""
        raise NotImplementedError

    async def authenticate(self, exchange: Exchange) -> Principal:
        """The principal of the request. Raises InvalidKey, NotAllowed, Unavailable."""
        return await self._authenticator.authenticate(exchange)

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run a blocking `call` in a thread and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def answer(self, exchange: Exchange, body: object) -> None:
        """Answer with a JSON object, status 200."""
        exchange.respond(200, _encode(body), JSON)

    async def send_file(self, exchange: Exchange, fd: int, name: str) -> None:
        """Send an open file as fast as the client takes it, and close it. `name` is for the log."""
        try:
            exchange.start_stream(OCTET_STREAM)
            while data := await self.in_thread(lambda: os.read(fd, READ_BYTES)):
                exchange.send(data)
                await exchange.drain()
            exchange.end()
        except ClientGone:
            pass
        except OSError:
            log.exception("a file cannot be read to its end", file=name)
            exchange.cut()
        finally:
            os.close(fd)
