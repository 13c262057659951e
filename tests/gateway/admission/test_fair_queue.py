"""Waiting for a model that is full: order, fairness, bounds, and the way of a request that waits."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.data_plane import Start
from tests.support.upstream import DONE, Asked, Caller, completion, finish, role, usage, word
from tests.support.waiting import until
from tests.support.wire import Answer
from tidemill.gateway.admission.fair_queue import CROWDED_S, FairQueues, ModelQueue, Priority, QueueSlot
from tidemill.gateway.errors import QueueFull, WaitedTooLong

INTERACTIVE, BATCH = Priority.INTERACTIVE, Priority.BATCH


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def queue(capacity: int, *, max_queued: int = 100, max_wait_s: float = 30.0, clock: Clock | None = None) -> ModelQueue:
    made = ModelQueue("big", clock or Clock())
    made.resize(capacity, max_queued, max_wait_s)
    return made


def client() -> Any:
    return SimpleNamespace(gone=False, on_gone=None)


class Waiting:
    """Requests that wait, in the order in which they get a place."""

    def __init__(self, queue: ModelQueue) -> None:
        self.queue = queue
        self.served: list[str] = []
        self.places: list[QueueSlot] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, tenant: str, *, work: int = 100, weight: int = 1, priority: Priority = INTERACTIVE) -> None:
        self.tasks.append(asyncio.create_task(self._ask(tenant, weight, work, priority)))
        await asyncio.sleep(0)

    async def _ask(self, tenant: str, weight: int, work: int, priority: Priority) -> None:
        turn = (tenant, weight, work, priority)
        place = self.queue.enter_now(*turn) or await self.queue.enter(client(), *turn)
        assert place is not None
        self.served.append(tenant if priority is INTERACTIVE else tenant.upper())
        self.places.append(place)

    async def end(self, count: int = 1) -> None:
        """The requests that have run longest end."""
        for _ in range(count):
            place = self.places.pop(0)
            place.leave(place.work)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def all(self) -> str:
        while self.places:
            await self.end()
        assert self.queue.running == self.queue.queued == 0
        return " ".join(self.served)


async def test_interactive_requests_go_before_batch_ones_and_tenants_in_turn() -> None:
    waiting = Waiting(queue(1))
    await waiting.ask("a")
    await waiting.ask("a", priority=BATCH)
    for tenant in "aaabc":
        await waiting.ask(tenant)
    await waiting.ask("b", priority=BATCH)
    assert await waiting.all() == "a b c a a a A B"


async def test_a_weight_is_a_share() -> None:
    waiting = Waiting(queue(1))
    await waiting.ask("x")
    for _ in range(8):
        await waiting.ask("a", weight=3)
        await waiting.ask("b", weight=1)
    await waiting.end(9)
    assert waiting.served[1:9].count("a") == 6


async def test_a_flood_leaves_a_place_for_whoever_has_nothing_running() -> None:
    clock = Clock()
    places = queue(8, clock=clock)
    waiting = Waiting(places)
    for _ in range(8):
        await waiting.ask("flood")
    assert places.running == 8, "alone, a tenant has all of it"
    await waiting.ask("victim")
    await waiting.end(2)
    for _ in range(20):
        await waiting.ask("flood")
    assert waiting.served[8] == "victim"
    await waiting.end(8)
    assert places.running == 7, "while several are about, one place is kept"
    turn = ("victim", 1, 100, INTERACTIVE)
    place = places.enter_now(*turn)
    assert place is not None and places.running == 8
    assert places.enter_now(*turn) is None, "and it is not kept twice for one"
    assert places.enter_now("other", 1, 100, BATCH) is None
    place.leave(100)
    assert places.running == 7
    clock.now += CROWDED_S + 1
    places.resize(8, 100, 30.0)
    assert places.running == 8


async def test_a_full_queue_drops_the_newest_of_the_longest() -> None:
    waiting = Waiting(queue(1, max_queued=4))
    await waiting.ask("x")
    for _ in range(3):
        await waiting.ask("flood")
    await waiting.ask("b", priority=BATCH)
    await waiting.ask("flood")  # pushes the batch out
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="too many requests are waiting for it, 0 of them yours"):
        waiting.tasks[4].result()
    await waiting.ask("flood")
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="4 of them yours"):
        waiting.tasks[6].result()
    await waiting.ask("a")  # has a better right to wait than the flood's fourth
    await asyncio.sleep(0)
    assert isinstance(waiting.tasks[5].exception(), QueueFull)
    assert await waiting.all() == "x flood a flood flood"


async def test_one_waits_only_so_long() -> None:
    full = queue(1, max_wait_s=0.05)
    place = full.enter_now("a", 1, 100, INTERACTIVE)
    assert place is not None
    with pytest.raises(
        WaitedTooLong, match="'big' is busy: your request timed out after waiting for 0.05 s"
    ) as refused:
        await full.enter(client(), "b", 1, 100, INTERACTIVE)
    assert refused.value.retry_after_s == 1 and full.queued == 0
    place.leave(100)
    assert full.running == 0


async def test_a_client_that_leaves_is_taken_out() -> None:
    full = queue(1)
    place = full.enter_now("a", 1, 100, INTERACTIVE)
    assert place is not None
    gone = client()
    waiting = asyncio.create_task(full.enter(gone, "b", 1, 100, INTERACTIVE))
    await asyncio.sleep(0)
    assert full.queued == 1
    gone.gone = True
    gone.on_gone()
    assert await waiting is None
    assert full.queued == 0 and gone.on_gone is None
    leaving = client()
    waiting = asyncio.create_task(full.enter(leaving, "b", 1, 100, INTERACTIVE))
    await asyncio.sleep(0)
    place.leave(100)  # gives it the place in the moment in which it leaves
    leaving.gone = True
    leaving.on_gone()
    assert await waiting is None
    assert full.running == full.queued == 0


@pytest.mark.parametrize("seed", range(10))
async def test_any_order_of_events_leaves_nothing_behind(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    places = queue(chance.randint(1, 9), max_queued=chance.randint(1, 12), clock=clock, max_wait_s=0.02)
    tasks: list[tuple[Any, asyncio.Task[QueueSlot | None]]] = []
    held: list[QueueSlot] = []

    async def ask(who: Any, tenant: str, priority: Priority) -> QueueSlot | None:
        turn = (tenant, chance.randint(1, 3), chance.randint(1, 1000), priority)
        try:
            place = places.enter_now(*turn) or await places.enter(who, *turn)
        except (QueueFull, WaitedTooLong):
            return None
        if place is not None:
            held.append(place)
        return place

    for _ in range(1500):
        match chance.choice(["ask", "ask", "ask", "end", "end", "go", "wait", "resize"]):
            case "ask":
                who = client()
                task = asyncio.create_task(ask(who, chance.choice("abcd"), chance.choice([INTERACTIVE, BATCH])))
                tasks.append((who, task))
            case "end" if held:
                held.pop(chance.randrange(len(held))).leave(chance.randint(0, 1000))
            case "go" if tasks:
                who, task = chance.choice(tasks)
                if not task.done():
                    who.gone = True
                    if who.on_gone is not None:
                        who.on_gone()
            case "wait":
                clock.now += chance.random() * 30
                await asyncio.sleep(chance.choice([0, 0, 0.01]))
            case "resize":
                places.resize(chance.randint(1, 9), places.max_queued, 0.02)
        assert places.queued <= places.max_queued
        if places.queued:
            assert places.running >= 1, "nobody waits for nothing"
    await asyncio.sleep(0.05)
    async with asyncio.timeout(60):
        while held or places.queued:
            while held:
                held.pop().leave(0)
            await asyncio.sleep(0.01)
    assert places.running == 0 and places._running_of == {}
    assert all(task.done() for _, task in tasks)


def test_processes_share_a_bound() -> None:
    for processes in (1, 2, 3, 5):
        parts = [FairQueues(index, processes, Clock()).part(8) for index in range(processes)]
        assert sum(parts) == 8 and max(parts) - min(parts) <= 1
    assert [FairQueues(index, 4, Clock()).part(2) for index in range(4)] == [1, 1, 1, 1]


# The way of a request


async def test_a_request_waits_for_the_model_and_is_metered_from_its_admission(start: Start) -> None:
    gate = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await gate.wait()
        await caller.whole(completion(usage={"prompt_tokens": 5, "completion_tokens": 2}))

    plane, upstream = await start(script, max_concurrent=2)
    asked = [asyncio.create_task(plane.ask()) for _ in range(5)]
    queue = plane.queues.of("mock")
    assert queue is not None
    await until(lambda: len(upstream.asked) == 2 and queue.queued == 3)
    gone = await plane.line()
    await gone.send(plane.request())
    await until(lambda: queue.queued == 4)
    gone.close()
    await until(lambda: queue.queued == 3)
    assert len(upstream.asked) == 2
    gate.set()
    assert [(await each).status for each in asked] == [200] * 5
    assert len(await plane.settled()) == 5, "who left while waiting has no record, as nothing was done for it"


async def test_the_service_tier_is_a_class(start: Start) -> None:
    order: list[str] = []
    gate = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await gate.wait()
        order.append(asked.json["user"])
        assert asked.json.get("service_tier") in (None, "flex", "priority"), "it is passed on"
        await caller.whole(completion(usage={"prompt_tokens": 5, "completion_tokens": 2}))

    plane, _ = await start(script, max_concurrent=1)
    queue = plane.queues.of("mock")
    assert queue is not None
    tasks: list[asyncio.Task[Answer]] = []
    tiers: list[dict[str, Any]] = [{}, {"service_tier": "flex"}, {"service_tier": "priority"}, {}]
    for number, tier in enumerate(tiers):
        tasks.append(asyncio.create_task(plane.ask(user=str(number), **tier)))
        await until(lambda: queue.running + queue.queued == len(tasks))
    gate.set()
    assert [(await each).status for each in tasks] == [200] * 4
    assert order == ["0", "2", "3", "1"]


async def test_a_full_queue_and_a_long_wait_are_told_in_the_apis_form(start: Start) -> None:
    gate = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await gate.wait()
        await caller.whole(completion(usage={"prompt_tokens": 5, "completion_tokens": 2}))

    plane, _ = await start(script, max_concurrent=1, max_queued=1, queue_seconds=0.3)
    queue = plane.queues.of("mock")
    assert queue is not None
    first = asyncio.create_task(plane.ask())
    await until(lambda: queue.running == 1)
    second = asyncio.create_task(plane.ask())
    await until(lambda: queue.queued == 1)
    third = await plane.ask()
    assert (third.status, third.error["code"], third.headers["retry-after"]) == (429, "queue_full", "1")
    waited = await second
    assert (waited.status, waited.error["code"]) == (503, "model_busy")
    assert "retry-after" in waited.headers
    gate.set()
    assert (await first).status == 200


async def test_a_tenant_that_floods_does_not_move_anothers_first_token(start: Start) -> None:
    """An engine that works on 8 at a time; one tenant keeps 40 requests open at it."""
    flood_ends = asyncio.Event()
    order: list[str] = []

    async def script(asked: Asked, caller: Caller) -> None:
        if asked.json["user"] != "victim":
            await flood_ends.wait()
        order.append(asked.json["user"])
        await caller.stream(role(), word("one"), finish(), usage(5, 1), DONE)

    plane, upstream = await start(script, max_concurrent=8)
    victim = await plane.new_tenant("victim")
    queue = plane.queues.of("mock")
    assert queue is not None
    assert (await plane.ask(key=victim, user="victim", stream=True)).status == 200  # two are about from now on
    flood = [asyncio.create_task(plane.ask(user="flood", stream=True, within_s=60)) for _ in range(40)]
    await until(lambda: len(upstream.asked) == 8 and queue.queued == 33)
    for _ in range(20):
        assert (await plane.ask(key=victim, user="victim", stream=True)).status == 200, "it waits for nobody's end"
        await until(lambda: queue.running == 7)
    assert order == ["victim"] * 21 and queue.queued == 33
    late = asyncio.create_task(plane.ask(user="late", stream=True, within_s=60))
    await until(lambda: queue.queued == 34)
    flood_ends.set()
    assert [(await each).status for each in (*flood, late)] == [200] * 41
    assert order.index("late") >= 21 + 33, "as one of the flood: first come, first served"
