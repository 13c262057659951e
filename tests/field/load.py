"""Clients that never pause: each asks again as soon as it is answered, and remembers how it was answered."""

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from tests.support.wire import Line, post

CHAT = "/v1/chat/completions"
PAUSE_S = 0.02
"""Between two requests of a client, so that a few clients do not fill the machine."""


class Told(msgspec.Struct, frozen=True):
    """One answer, and how long it took."""

    tenant: str
    status: int
    """0 when there was none: the connection broke, or nothing came in time."""
    took_s: float
    at: float
    """When it was asked, on the monotonic clock."""
    message: str = ""
    code: str = ""
    retry_after: str | None = None


class Load:
    """So many clients of each tenant, from `start` to `stop`. Every answer is in `told`."""

    def __init__(self, port: int, keys: dict[str, str], *, clients: int = 4, patience_s: float = 20.0) -> None:
        """`keys`: the API keys by tenant."""
        self.told: list[Told] = []
        self._port = port
        self._keys = keys
        self._clients = clients
        self._patience_s = patience_s
        self._tasks: list[asyncio.Task[None]] = []
        self._going = False

    def start(self, **fields: Any) -> None:
        """Begin. `fields` go into each request."""
        self._going = True
        self._tasks = [
            asyncio.create_task(self._client(tenant, key, fields))
            for tenant, key in self._keys.items()
            for _ in range(self._clients)
        ]

    async def stop(self) -> None:
        """Let each client be answered once more."""
        self._going = False
        await asyncio.gather(*self._tasks)

    def since(self, instant: float, *, tenant: str | None = None) -> "list[Told]":
        """The answers to what was asked since then."""
        return [each for each in self.told if each.at >= instant and tenant in (None, each.tenant)]

    async def _client(self, tenant: str, key: str, fields: dict[str, Any]) -> None:
        line: Line | None = None
        while self._going:
            began = time.monotonic()
            try:
                line = line or await Line.open(self._port)
                await line.send(chat(key, **fields))
                answer = await line.answer(within_s=self._patience_s)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                self.told.append(Told(tenant, 0, time.monotonic() - began, began))
                line = None
                continue
            error = answer.error if answer.status != 200 else {}
            self.told.append(
                Told(
                    tenant,
                    answer.status,
                    time.monotonic() - began,
                    began,
                    error.get("message", ""),
                    error.get("code", ""),
                    answer.headers.get("retry-after"),
                )
            )
            await asyncio.sleep(PAUSE_S)
        if line is not None:
            line.close()


def chat(key: str, **fields: Any) -> bytes:
    """A short chat request."""
    body = {"model": "mock", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4, **fields}
    return post(CHAT, body, key)


def statuses(told: list[Told]) -> Counter[int]:
    return Counter(each.status for each in told)


class Stream:
    """One open stream, read as it comes."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self.events: list[str] = []
        self.request_id = ""
        self.status = 0
        self.ended = False
        """The body came to its proper end."""

    @classmethod
    async def begin(cls, port: int, key: str, **fields: Any) -> "Stream":
        """Ask; returns when the answer's head is here."""
        line = await Line.open(port)
        await line.send(chat(key, stream=True, **fields))
        stream = cls(line)
        stream.status, headers = await line.head()
        stream.request_id = headers["x-request-id"]
        stream._length = int(headers["content-length"]) if "content-length" in headers else None
        return stream

    _length: int | None = None

    async def read(self, *, tokens: int | None = None, within_s: float = 60.0) -> "Stream":
        """Read to the end, or until so many tokens have come."""
        async with asyncio.timeout(within_s):
            if self._length is not None:
                self.events.append((await self._line.reader.readexactly(self._length)).decode())
                self.ended = True
                return self
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                async for piece in self._line.pieces():
                    self.events += [each.removeprefix("data: ") for each in piece.decode().split("\n\n") if each]
                    if tokens is not None and self.tokens >= tokens:
                        return self
                self.ended = True
        return self

    def leave(self) -> None:
        self._line.reset()

    def close(self) -> None:
        self._line.close()

    def _chunks(self) -> Iterator[dict[str, Any]]:
        for each in self.events:
            if each.startswith("{"):
                yield json.loads(each)

    @property
    def tokens(self) -> int:
        """Events with text, of which each is one token of the mock engine."""
        return sum(
            bool(choice.get("delta", {}).get("content"))
            for chunk in self._chunks()
            for choice in chunk.get("choices", ())
        )

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the stream itself says of its usage."""
        return next((chunk["usage"] for chunk in self._chunks() if chunk.get("usage")), None)

    @property
    def error(self) -> dict[str, Any] | None:
        return next((chunk["error"] for chunk in self._chunks() if "error" in chunk), None)

    @property
    def done(self) -> bool:
        """`[DONE]` came, as the last event, and then the proper end of the body."""
        return self.ended and bool(self.events) and self.events[-1] == "[DONE]"
