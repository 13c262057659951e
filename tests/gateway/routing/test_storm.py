"""Engines that fail in every way at once: one record a request, nothing billed twice, nothing left behind."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.fleet import Fleet, dead_port, models
from tests.support.upstream import DONE, LAST_CHUNK, STREAM_HEAD, Asked, Caller, completion, finish, role, usage, word
from tests.support.upstream import usage_object as tokens

REQUESTS = 300
AT_ONCE = 24


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, stack)


class Chaos:
    """An engine that answers, refuses, breaks off or goes, as it likes. It keeps the books of what it has produced."""

    def __init__(self, seed: int, books: "Counter[str]", asked: "Counter[str]") -> None:
        self._chance = random.Random(seed)
        self._books = books
        self._asked = asked

    async def __call__(self, asked: Asked, caller: Caller) -> None:
        name = asked.json["messages"][0]["content"]
        self._asked[name] += 1
        await asyncio.sleep(self._chance.random() * 0.01)
        what = self._chance.choice(
            ["answer", "answer", "answer", "429", "503", "500", "gone", "half", "error", "close"]
        )
        if what in ("429", "503", "500"):
            await caller.whole({"error": {"message": "Not this time."}}, int(what))
            return
        if what == "gone":
            caller.reset()
            return
        self._books[name] += 1  # from here on it works, and an upstream would bill it
        if not asked.json.get("stream"):
            if what in ("half", "close"):
                await caller.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
                caller.reset()
                return
            await caller.whole(completion(usage=tokens(10, 3)))
            return
        await caller.send(STREAM_HEAD)
        for each in (role(), word("a"), word("b"), word("c")):
            await caller.chunk(each)
            if what == "half" and self._chance.random() < 0.4:
                caller.reset()
                return
        if what == "error":
            await caller.chunk(b'data: {"error":{"message":"dead","code":500}}\n\n')
        for each in (finish(), usage(10, 3), DONE):
            await caller.chunk(each)
        if what == "close":
            caller.close()
            return
        await caller.send(LAST_CHUNK)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("owned", [False, True])
async def test_a_storm(fleet: Fleet, owned: bool, seed: int) -> None:
    books: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    engines = await fleet.engines(*(Chaos(10 * seed + index, books, asked) for index in range(4)))
    ports = [engine.port for engine in engines]
    plane = await fleet.plane(
        models("mock", ports[0], dead_port(), *ports[1:3], owned=owned, fallbacks=("spare",)),
        models("spare", ports[3], owned=owned),
    )
    chance = random.Random(seed)
    room = asyncio.Semaphore(AT_ONCE)
    outcomes: Counter[str] = Counter()

    async def one(number: int) -> None:
        async with room:
            stream = chance.random() < 0.5
            request = plane.request(stream=stream, messages=[{"role": "user", "content": f"request-{number}"}])
            line = await plane.line()
            await line.send(request)
            if chance.random() < 0.15:
                await asyncio.sleep(chance.random() * 0.02)
                line.reset()
                outcomes["left"] += 1
                return
            answer = await line.answer()
            line.close()
            if answer.status != 200:
                outcomes[str(answer.status)] += 1
                assert answer.error["message"]
            elif not stream:
                outcomes["whole"] += 1
                assert answer.json["usage"]["completion_tokens"] == 3
            elif any("error" in chunk for chunk in answer.chunks):
                outcomes["broken"] += 1
            else:
                outcomes["stream"] += 1
                assert answer.text == "abc"

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    records = await plane.settled()  # which looks for holds, slots, work in flight and doubles
    statuses = Counter(record.status for record in records)
    assert outcomes["whole"] + outcomes["stream"] <= statuses["ok"]
    assert len(records) <= REQUESTS
    refused_at_the_door = REQUESTS - len(records)
    assert refused_at_the_door <= outcomes["503"] + outcomes["left"], (outcomes, statuses)
    full_price = 10 * 1000 + 3 * 2000
    assert all(record.charge == full_price for record in records if record.status == "ok")
    assert all(record.charge <= 40_000 for record in records)
    assert max(asked.values()) <= 4
    if not owned:
        assert max(books.values()) == 1, "no upstream has worked twice for one request"
    else:
        assert max(books.values()) <= 2
    for route in plane.routes.by_name.values():
        assert all(replica.in_flight == 0 for replica in route.replicas)
    served = Counter(record.opened.replica for record in records if record.status == "ok")
    assert len(served) >= 3 and "mock/1" not in served
