"""The control plane's server: Granian in this process, on an address of its own."""

import asyncio
from contextlib import suppress
from typing import Any

from granian.constants import Interfaces
from granian.server.embed import Server

from tidemill.errors import Conflict

STOP_WITHIN_S = 5.0


class ControlServer:
    """Serves an ASGI application."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._server = Server(
            app, address=host, port=port, interface=Interfaces.ASGI, log_enabled=False, websockets=False
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises Conflict when the port is taken."""
        try:
            await _try_port(self._host, self._port)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise Conflict(
                f"Cannot listen on port {self._port}: {reason}.",
                hint="Stop the program that uses it, or choose another port with --control-port.",
            ) from error
        self._task = asyncio.create_task(self._server.serve())

    async def stop(self) -> None:
        """Stop; what is answered now gets a few seconds."""
        if self._task is None:
            return
        self._server.stop()  # type: ignore[no-untyped-call]
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_WITHIN_S):
                await asyncio.gather(self._task, return_exceptions=True)


async def _try_port(host: str, port: int) -> None:
    """Raises OSError when the address cannot be listened on."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
    server.close()
    await server.wait_closed()
