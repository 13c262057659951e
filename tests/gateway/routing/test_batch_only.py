"""Replicas that are lent to batches: no person's request goes there, and lines go nowhere else."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest_asyncio

from tests.support.fleet import Fleet, either, models
from tests.support.plane import CHAT, PRICE, Plane
from tests.support.upstream import DONE, Asked, Caller, Upstream, finish, role, usage, word
from tests.support.wire import Answer, post
from tidemill.gateway.admission.fair_queue import Priority
from tidemill.gateway.auth.internal_token import InternalAuth
from tidemill.gateway.routing.models import ModelSpec
from tidemill.gateway.routing.replica import ReplicaSpec
from tidemill.ledger.pricing import PriceTier
from tidemill.store.prices import set_price

TOKEN = "the-token-of-this-start"


class World:
    """An ordinary replica and one that is lent."""

    def __init__(self, plane: Plane, engines: list[Upstream], spec: ModelSpec) -> None:
        self.plane = plane
        self.engines = engines
        self.spec = spec

    async def line(self, number: int) -> Answer:
        """A batch's line."""
        headers = f"authorization: Tidemill {TOKEN}\r\nx-tidemill-tenant: {self.plane.tenant_id}\r\n"
        headers += f"x-tidemill-key: key_gone\r\nx-tidemill-request: batch_x_{number}\r\n"
        body = {"model": "mock", "messages": [{"role": "user", "content": "one two three"}]}
        return await self.plane.send(post(CHAT, body, None, headers.encode()))

    def announce(self, *, ordinary: bool = True, lent: bool = True) -> None:
        first, second = self.spec.replicas
        changed = (
            msgspec.structs.replace(first, ready=ordinary),
            msgspec.structs.replace(second, ready=lent),
        )
        self.plane.routes.update([msgspec.structs.replace(self.spec, replicas=changed)])

    async def served(self) -> list[str]:
        return [each.opened.replica for each in await self.plane.settled()]


async def open_road(plane: Plane) -> None:
    """Admit lines of batches, at a price."""
    plane.authenticator._road = InternalAuth(TOKEN)
    with plane.store.write() as connection:
        set_price(connection, model="mock", currency="USD", price=PRICE, now=datetime.now(UTC), tier=PriceTier.BATCH)
    await plane.authenticator.renew()


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        fleet = Fleet(tmp_path, stack)
        engines = await fleet.engines(either, either)
        first, second = (
            ReplicaSpec(f"mock/{index}", f"http://127.0.0.1:{engine.port}/v1", True, batch_only=index == 1)
            for index, engine in enumerate(engines)
        )
        spec = models("mock", *(engine.port for engine in engines), replicas=(first, second), max_concurrent=1)
        plane = await fleet.plane(spec)
        await open_road(plane)
        yield World(plane, engines, spec)


async def test_each_goes_where_it_belongs(world: World) -> None:
    for number in range(4):
        assert (await world.plane.ask()).status == 200
        assert (await world.line(number)).status == 200
    assert await world.served() == ["mock/0", "mock/1"] * 4


async def test_people_never_go_to_a_lent_replica(world: World) -> None:
    world.announce(ordinary=False)
    assert not world.plane.routes.by_name["mock"].ready
    refused = await world.plane.ask()
    assert refused.status == 503 and refused.error["code"] == "model_not_ready"
    assert (await world.line(0)).status == 200
    assert await world.served() == ["mock/1"]


async def test_lines_go_to_ordinary_replicas_when_none_is_lent(world: World) -> None:
    world.announce(lent=False)
    assert (await world.line(0)).status == 200
    assert await world.served() == ["mock/0"]


async def test_lines_on_a_lent_replica_take_nobodys_place(world: World) -> None:
    queue = world.plane.queues.of("mock")
    assert queue is not None and queue.capacity == 1
    place = queue.enter_now("somebody", 1, 1, Priority.INTERACTIVE)
    assert place is not None
    assert (await world.line(0)).status == 200, "the model is full, and yet it does not wait"
    place.leave(0)
    assert await world.served() == ["mock/1"]


async def test_the_load_report_tells_people_from_lines(world: World) -> None:
    assert (await world.plane.ask()).status == 200
    assert (await world.line(0)).status == 200
    await world.plane.settled()
    load = world.plane.routes.take_load()
    assert load.seen["mock"].arrivals == 1, "a line is no demand"
    assert load.replicas["mock/0"].done > 0 and load.replicas["mock/1"].done > 0


async def test_an_engine_that_orders_by_priority_is_told_which_requests_can_wait(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    async def listens(asked: Asked, caller: Caller) -> None:
        bodies.append(asked.json)
        await caller.stream(role(), word("a"), finish(), usage(10, 1), DONE)

    async with AsyncExitStack() as stack:
        fleet = Fleet(tmp_path, stack)
        (engine,) = await fleet.engines(listens)
        spec = models("mock", engine.port, engine="vllm", owned=True, priority_scheduling=True)
        plane = await fleet.plane(spec)
        world = World(plane, [engine], spec)
        await open_road(plane)
        assert (await plane.ask(stream=True)).status == 200
        assert (await world.line(1)).status == 200
        await plane.settled()
    people, line = bodies
    assert "priority" not in people and line["priority"] > 0
