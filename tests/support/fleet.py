"""Several scripted engines behind one data plane, and an engine with a prefix cache."""

import asyncio
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.support.plane import Plane, model
from tests.support.upstream import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Asked,
    Caller,
    Script,
    Upstream,
    finish,
    role,
    usage,
    usage_object,
    word,
)
from tests.support.upstream import completion as answer
from tidemill.gateway.routing.models import ModelSpec, ReplicaSpec


def replicas(name: str, *ports: int, ready: bool = True) -> tuple[ReplicaSpec, ...]:
    return tuple(
        ReplicaSpec(f"{name}/{index}", f"http://127.0.0.1:{port}/v1", ready) for index, port in enumerate(ports)
    )


def models(name: str, *ports: int, **changes: Any) -> ModelSpec:
    """A model with a replica at each port."""
    return model(ports[0], name, **{"replicas": replicas(name, *ports), **changes})


def dead_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fleet:
    """Starts engines and planes, and stops them all."""

    def __init__(self, path: Path, stack: AsyncExitStack) -> None:
        self._path = path
        self._stack = stack

    async def engines(self, *scripts: Script) -> list[Upstream]:
        started = []
        for script in scripts:
            upstream = Upstream(script)
            await upstream.start()
            self._stack.push_async_callback(upstream.stop)
            started.append(upstream)
        return started

    async def plane(self, *specs: ModelSpec, **options: Any) -> Plane:
        path = self._path / f"plane{len(list(self._path.iterdir()))}"
        path.mkdir()
        return await self._stack.enter_async_context(Plane(path, list(specs), **options))


async def whole(asked: Asked, caller: Caller) -> None:
    """A whole answer: 100 prompt tokens, 10 of the answer."""
    await caller.whole(answer(usage=usage_object(100, 10)))


async def either(asked: Asked, caller: Caller) -> None:
    """What was asked for: a stream of two words, or a whole answer."""
    if not asked.json.get("stream"):
        await whole(asked, caller)
        return
    await caller.stream(role(), word("a"), word("b"), finish(), usage(100, 2), DONE)


async def dies_at_once(asked: Asked, caller: Caller) -> None:
    """Takes the request and is gone."""
    caller.reset()


async def dies_in_the_middle(asked: Asked, caller: Caller) -> None:
    await caller.send(STREAM_HEAD)
    await caller.chunk(role())
    await caller.chunk(word("half"))
    await asyncio.sleep(0.05)
    caller.reset()


def refuses(status: int, headers: bytes = b"") -> Script:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"error": {"message": "There is no room here now.", "type": "x"}}, status, headers)

    return script


class CachingEngine:
    """An engine with a prefix cache: of each prompt it knows how many words it has computed before."""

    def __init__(self, *, tokens_a_second: float = 0.0) -> None:
        self._known: set[tuple[str, ...]] = set()
        self._pace = tokens_a_second
        self.prompt = self.cached = 0
        self.conversations: list[str] = []

    async def __call__(self, asked: Asked, caller: Caller) -> None:
        words = tuple(" ".join(message["content"] for message in asked.json["messages"]).split())
        self.conversations.append(words[0])
        cached = 0
        while cached < len(words) and words[: cached + 1] in self._known:
            cached += 1
        self._known.update(words[: length + 1] for length in range(len(words)))
        self.prompt += len(words)
        self.cached += cached
        if self._pace:
            await asyncio.sleep((len(words) - cached) / self._pace)
        await caller.whole(answer(usage=usage_object(len(words), 5, cached)))


async def stream_slowly(asked: Asked, caller: Caller) -> None:
    """Two hundred words, 10 ms apart."""
    await caller.send(STREAM_HEAD)
    await caller.chunk(role())
    for _ in range(200):
        await caller.chunk(word("w "))
        await asyncio.sleep(0.01)
    await caller.chunk(usage(100, 200))
    await caller.chunk(DONE)
    await caller.send(LAST_CHUNK)
