"""An engine whose every answer is a coroutine of the test's own, to the byte."""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
UNFRAMED_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


class Asked(msgspec.Struct):
    """A request as it reached the engine."""

    head: bytes
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """The gateway at the other end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise ConnectionResetError("the gateway has hung up")
        self._writer.write(data)
        await self._writer.drain()

    async def chunk(self, data: bytes) -> None:
        """Send a piece of a chunked body."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def stream(self, *events: bytes, end: bool = True) -> None:
        """A whole event stream, an event a chunk."""
        await self.send(STREAM_HEAD)
        for each in events:
            await self.chunk(each)
        if end:
            await self.send(LAST_CHUNK)

    async def whole(self, body: bytes | dict[str, Any], status: int = 200, headers: bytes = b"") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.send(b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n%b" % (status, headers, len(data), data))

    async def hangs_up(self, within_s: float = 60.0) -> None:
        """Wait until the gateway closes the connection; fails when it does not."""
        async with asyncio.timeout(within_s):
            with contextlib.suppress(ConnectionError):
                assert await self._reader.read(1) == b"", "the gateway sent something else"

    def close(self) -> None:
        self._writer.close()

    def half_close(self) -> None:
        """Say no more, but go on reading."""
        self._writer.write_eof()

    def reset(self) -> None:
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Script = Callable[[Asked, Caller], Awaitable[None]]


class Upstream:
    """A scripted engine on a port of its own. A script that raises fails the test at `stop`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.connections = 0
        self.port = 0
        self.failures: list[BaseException] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=64 * 1024 * 1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.failures:
            raise self.failures[0]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line
                )
                asked = Asked(head, await reader.readexactly(length))
                self.asked.append(asked)
                await self.script(asked, Caller(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        except BaseException as failure:
            self.failures.append(failure)
        finally:
            self._tasks.discard(task)
            writer.close()


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def word(text: str, index: int = 0, **more: Any) -> bytes:
    """A chunk with a piece of text."""
    return event({"id": "c1", "choices": [{"index": index, "delta": {"content": text}, "finish_reason": None}], **more})


def role(index: int = 0) -> bytes:
    return event({"id": "c1", "choices": [{"index": index, "delta": {"role": "assistant", "content": ""}}]})


def finish(reason: str = "stop", index: int = 0, **more: Any) -> bytes:
    return event({"id": "c1", "choices": [{"index": index, "delta": {}, "finish_reason": reason}], **more})


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    return event({"id": "c1", "choices": [], "usage": usage_object(prompt, completion, cached)})


def usage_object(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def completion(text: str = "hi", usage: dict[str, Any] | None = None) -> dict[str, Any]:
    """A whole answer."""
    answer: dict[str, Any] = {
        "id": "c1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }
    return {**answer, "usage": usage} if usage is not None else answer
