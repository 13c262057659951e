"""Both ends of a request without a socket: transports that remember what is written, and lose when they are told to."""

import asyncio
from typing import Any


class FakeTransport(asyncio.Transport):
    """What is written is kept in `sent`. `abort` and `close` end it, as the event loop would: a moment later."""

    def __init__(self, protocol: asyncio.Protocol, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__({"peername": ("127.0.0.1", 40_000), "sockname": ("127.0.0.1", 8080)})
        self.sent = bytearray()
        self.paused = False
        self._protocol = protocol
        self._loop = loop
        self._closing = False
        self.lost = False
        protocol.connection_made(self)

    def feed(self, data: bytes) -> None:
        """Bytes of the peer arrive; a lost connection takes none."""
        if not self._closing:
            self._protocol.data_received(data)

    def lose(self) -> None:
        """The peer is gone."""
        if not self.lost:
            self._closing = self.lost = True
            self._protocol.connection_lost(None)

    def end(self) -> None:
        """The peer says no more, and closes."""
        if not self._closing:
            self._protocol.eof_received()
            self.lose()

    def write(self, data: Any) -> None:
        if not self._closing:
            self.sent += data

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._lose_late)

    def close(self) -> None:
        self.abort()

    def _lose_late(self) -> None:
        if not self.lost:
            self.lost = True
            self._protocol.connection_lost(None)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass
