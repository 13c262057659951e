"""A model at zero: who asks for it waits until it is there, and the first request is answered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from tests.support.fleet import Fleet, either, models
from tests.support.plane import Plane
from tests.support.upstream import Upstream
from tests.support.wire import post
from tidemill.gateway.routing.models import ModelSpec


class World:
    """A plane before a model that has no replica, and the engine that it will have."""

    def __init__(self, plane: Plane, engine: Upstream, asleep: ModelSpec) -> None:
        self.plane = plane
        self.engine = engine
        self._asleep = asleep
        self.wanted = 0
        plane.routes.activator.on_wanted = self._on_wanted

    def _on_wanted(self) -> None:
        self.wanted += 1

    def announce(self, *, ready: bool, wakes: bool = True) -> None:
        replicas = models("mock", self.engine.port).replicas if ready else ()
        spec = msgspec.structs.replace(self._asleep, replicas=replicas, wakes=wakes)
        self.plane.routes.update([spec])
        self.plane.queues.update([spec])

    async def waiting(self, count: int) -> None:
        async with asyncio.timeout(60):
            while sum(self.plane.routes.activator.waiting.values()) != count:
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    changes: dict[str, Any] = getattr(request, "param", {})
    async with AsyncExitStack() as stack:
        fleet = Fleet(tmp_path, stack)
        (engine,) = await fleet.engines(either)
        asleep = models("mock", engine.port, **{"replicas": (), "wakes": True, "wake_seconds": 30.0, **changes})
        yield World(await fleet.plane(asleep), engine, asleep)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_first_request_survives(world: World, stream: bool) -> None:
    asking = asyncio.create_task(world.plane.ask(stream=stream))
    await world.waiting(1)
    assert world.wanted == 1
    assert world.plane.wallet.holds == 0 and world.plane.live.open_requests == 0, "it holds nothing while it waits"
    world.announce(ready=True)
    answer = await asking
    assert answer.status == 200
    assert len(await world.plane.settled()) == 1
    await world.waiting(0)
    seen = world.plane.routes.take_load().seen["mock"]
    assert seen.arrivals == 1


async def test_anthropics_clients_too(world: World) -> None:
    body = {"model": "mock", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
    headers = b"anthropic-version: 2023-06-01\r\n"
    asking = asyncio.create_task(world.plane.send(post("/v1/messages", body, world.plane.key, headers)))
    await world.waiting(1)
    world.announce(ready=True)
    assert (await asking).status == 200
    await world.plane.settled()


async def test_all_that_wait_go_on_and_the_fleet_is_told_once(world: World) -> None:
    asking = [asyncio.create_task(world.plane.ask()) for _ in range(20)]
    await world.waiting(20)
    assert world.wanted == 1
    world.announce(ready=False)  # still starting
    await world.waiting(20)
    world.announce(ready=True)
    assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 20
    await world.plane.settled()


async def test_a_client_that_leaves_waits_no_more(world: World) -> None:
    line = await world.plane.line()
    await line.send(world.plane.request())
    await world.waiting(1)
    line.close()
    await world.waiting(0)
    world.announce(ready=True)
    assert await world.plane.settled() == []
    assert (await world.plane.ask()).status == 200


@pytest.mark.parametrize("world", [{"max_queued": 2}], indirect=True)
async def test_so_many_wait_and_no_more(world: World) -> None:
    asking = [asyncio.create_task(world.plane.ask()) for _ in range(2)]
    await world.waiting(2)
    refused = await world.plane.ask()
    assert refused.status == 429 and refused.error["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) > 0
    world.announce(ready=True)
    assert [answer.status for answer in await asyncio.gather(*asking)] == [200, 200]


@pytest.mark.parametrize("world", [{"wake_seconds": 0.2}], indirect=True)
async def test_nobody_waits_for_ever(world: World) -> None:
    refused = await world.plane.ask()
    assert refused.status == 503 and refused.error["code"] == "model_not_ready"
    assert world.plane.routes.activator.waiting == {}


async def test_a_model_that_will_not_wake_is_said_to_be_away(world: World) -> None:
    asking = asyncio.create_task(world.plane.ask())
    await world.waiting(1)
    world.announce(ready=False, wakes=False)
    assert (await asking).status == 503
    assert (await world.plane.ask()).status == 503
    assert world.wanted == 1


async def test_a_platform_asleep_is_ready(world: World) -> None:
    answer = await world.plane.send(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.status == 200 and answer.json["models"] == {"mock": "asleep"}
    world.announce(ready=False, wakes=False)
    assert (await world.plane.send(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")).status == 503


async def test_a_fallback_answers_before_anybody_waits(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        fleet = Fleet(tmp_path, stack)
        (engine,) = await fleet.engines(either)
        asleep = models("mock", engine.port, replicas=(), wakes=True, fallbacks=("other",))
        plane = await fleet.plane(asleep, models("other", engine.port))
        assert (await plane.ask()).status == 200
