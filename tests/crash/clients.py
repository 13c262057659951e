"""Clients that remember: what each request was answered, to the byte, until its connection broke."""

import asyncio
import contextlib
import json
import random
import re
from dataclasses import dataclass, field
from typing import Any

_HEAD = re.compile(rb"^HTTP/1\.1 (\d{3}) ")
_REQUEST_ID = re.compile(rb"\r\nx-request-id: (\S+)\r\n")
_TOKEN = re.compile(rb'"content":"(?!")')
_USAGE = re.compile(rb'"completion_tokens":(\d+)')


@dataclass
class Seen:
    """What a client has seen of one request."""

    tenant: str
    model: str
    stream: bool
    max_tokens: int
    answer: bytes = b""

    @property
    def status(self) -> int | None:
        """The answer's status, None when nothing came."""
        found = _HEAD.match(self.answer)
        return int(found[1]) if found else None

    @property
    def request_id(self) -> str | None:
        found = _REQUEST_ID.search(self.answer)
        return found[1].decode() if found else None

    @property
    def tokens(self) -> int:
        """Tokens that arrived: events with text, of which each is one token or more."""
        return len(_TOKEN.findall(self.answer)) if self.stream else (self.usage or 0)

    @property
    def whole(self) -> bool:
        """The answer came to its end."""
        return b"data: [DONE]" in self.answer if self.stream else self.usage is not None

    @property
    def usage(self) -> int | None:
        """The completion tokens that the answer itself reports."""
        found = _USAGE.findall(self.answer)
        return int(found[-1]) if found else None


@dataclass
class Crowd:
    """So many clients at a time, each with one request after the other, for as long as it is told."""

    port: int
    keys: dict[str, str]
    """The API keys, by tenant."""
    random: random.Random
    seen: list[Seen] = field(default_factory=list)
    _tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    _going: bool = True

    def start(self, streams: int, *, embedded: int) -> None:
        """Begin, with `embedded` of the clients on the real model."""
        self._going = True
        models = ["smollm2-135m-instruct"] * embedded + ["mock"] * (streams - embedded)
        self._tasks = [asyncio.create_task(self._client(model)) for model in models]

    async def stop(self) -> None:
        """Let the requests in flight come to their end, whatever that is."""
        self._going = False
        await asyncio.wait_for(asyncio.gather(*self._tasks), 60)

    async def _client(self, model: str) -> None:
        while self._going:
            if await self.ask(model, stream=self.random.random() < 0.85) is None:
                await asyncio.sleep(0.1)  # nobody listens

    async def ask(self, model: str, *, stream: bool) -> Seen | None:
        """One request on a connection of its own; None when there was none to be had."""
        tenant = self.random.choice(list(self.keys))
        most = self.random.randint(10, 40) if model == "mock" else self.random.randint(4, 24)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return None
        seen = Seen(tenant, model, stream, most)
        self.seen.append(seen)
        body = self._body(seen)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.keys[tenant]}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError):
            writer.write(head.encode() + body)
            while data := await reader.read(65536):
                seen.answer += data
        writer.close()
        return seen

    def _body(self, seen: Seen) -> bytes:
        body: dict[str, Any] = {
            "model": seen.model,
            "messages": [{"role": "user", "content": f"Tell me of tide number {self.random.randint(1, 10**6)}"}],
            "max_tokens": seen.max_tokens,
            "stream": seen.stream,
        }
        if seen.stream and self.random.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        return json.dumps(body).encode()
