"""The loop: what a plan says is done, what fails is tried again, and nothing stops it."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from tidemill.clock import JumpTolerantClock
from tidemill.fleet.backend import CannotStart, Device, Node
from tidemill.fleet.controller import FleetController
from tidemill.tides.state import (
    BacklogView,
    Demand,
    JobPhase,
    JobView,
    ModelView,
    Phase,
    QueueView,
    ReplicaView,
    ReservationView,
)


class World:
    """A fleet of one node that does at once what it is asked for; `fails` names deeds that fail."""

    def __init__(self, devices: int = 2) -> None:
        self.node = Node("n", "h", tuple(Device(f"n/{index}", "n", index, "cpu") for index in range(devices)))
        self.taken_out: dict[str, str] = {}
        self.model: dict[str, Any] = {"name": "m", "min_replicas": 0, "max_replicas": 2, "capacity": 100.0}
        self.replicas: dict[str, ReplicaView] = {}
        self.jobs: dict[str, JobView] = {}
        self.lines: set[str] = set()
        self.work: tuple[BacklogView, ...] = ()
        self.besides: set[str] = set()
        self.done: list[str] = []
        self.fails: set[str] = set()
        self.startups: list[tuple[str, float]] = []
        self.changed: Callable[[], None] = lambda: None
        self.rented: tuple[ReservationView, ...] = ()
        self.controller = FleetController(self, _Replicas(self), _Jobs(self), interval_s=0.05)

    def phase(self, name: str, phase: Phase) -> None:
        view = self.replicas[name]
        self.replicas[name] = ReplicaView(
            id=name,
            model=view.model,
            devices=view.devices,
            phase=phase,
            batch_only=view.batch_only,
            colocated=view.colocated,
        )

    def action(self, text: str) -> None:
        if any(text.startswith(prefix) for prefix in self.fails):
            raise CannotStart(f"{text} cannot be done.")
        self.done.append(text)

    # Sight

    def nodes(self) -> Sequence[Node]:
        return [self.node]

    def drained(self) -> Mapping[str, str]:
        return self.taken_out

    def models(self, now: float) -> Sequence[ModelView]:
        return [ModelView(**self.model)]

    def backlogs(self) -> Sequence[BacklogView]:
        return self.work

    def colocated_models(self) -> Collection[str]:
        return self.lines

    def learn_startup(self, model: str, seconds: float) -> None:
        self.startups.append((model, seconds))


class _Replicas:
    def __init__(self, world: World) -> None:
        self._world = world
        self._count = 0

    def views(self) -> Sequence[ReplicaView]:
        return list(self._world.replicas.values())

    def start(
        self, model: str, devices: Sequence[Device], *, batch_only: bool = False, colocated: bool = False, why: str = ""
    ) -> str:
        places = tuple(device.id for device in devices)
        self._world.action(f"start {model} {'beside ' if colocated else ''}on {','.join(places)}")
        name = f"{model}/{self._count}"
        self._count += 1
        self._world.replicas[name] = ReplicaView(
            id=name, model=model, devices=places, phase=Phase.STARTING, batch_only=batch_only, colocated=colocated
        )
        return name

    def stop(self, name: str, why: str) -> object:
        self._world.action(f"stop {name}")
        self._world.phase(name, Phase.DRAINING)
        return None

    def sleep(self, name: str, why: str) -> object:
        self._world.action(f"sleep {name}")
        self._world.phase(name, Phase.DRAINING)
        return None

    def wake(self, name: str, why: str) -> object:
        self._world.action(f"wake {name}")
        self._world.phase(name, Phase.STARTING)
        return None

    def set_batch_only(self, name: str, *, batch_only: bool, why: str) -> None:
        self._world.action(f"turn {name}")


class _Jobs:
    def __init__(self, world: World) -> None:
        self._world = world

    def views(self) -> Sequence[JobView]:
        return list(self._world.jobs.values())

    def queues(self) -> Sequence[QueueView]:
        return ()

    def reservations(self) -> Sequence[ReservationView]:
        return self._world.rented

    def start(self, job_id: str, devices: Sequence[Device], why: str) -> None:
        self._world.action(f"job {job_id}")
        self._world.jobs[job_id] = msgspec.structs.replace(
            self._world.jobs[job_id], phase=JobPhase.RUNNING, on=tuple(each.id for each in devices)
        )

    def preempt(self, job_id: str, why: str) -> None:
        self._world.action(f"preempt {job_id}")
        self._world.jobs[job_id] = msgspec.structs.replace(self._world.jobs[job_id], phase=JobPhase.STOPPING)

    def on_change(self, changed: Callable[[], None]) -> None:
        self._world.changed = changed


@pytest.fixture
def world() -> World:
    return World()


def queued(name: str, devices: int = 1) -> JobView:
    return JobView(id=name, tenant="t", queue="q", devices=devices)


def test_somebody_who_waits_gets_a_replica_and_only_one(world: World) -> None:
    world.controller.step()
    assert world.done == [], "nobody asks"
    world.model |= {"waiting": 1, "idle_s": 0.0}
    for _ in range(5):
        world.controller.step()
    assert world.done == ["start m on n/0"]


def test_one_that_is_needed_no_more_is_drained_once(world: World) -> None:
    world.model["waiting"] = 1
    world.controller.step()
    world.phase("m/0", Phase.READY)
    world.model |= {"waiting": 0, "idle_s": 1000.0, "peak": 0.0}
    for _ in range(5):
        world.controller.step()
    assert world.done == ["start m on n/0", "stop m/0"]


def test_a_flood_takes_a_device_from_a_job_that_may_be_interrupted(world: World) -> None:
    world.model |= {"min_replicas": 1, "demand": Demand(10.0, 10.0)}
    world.jobs["j"] = queued("j")
    world.controller.step()
    assert world.done == ["start m on n/0", "job j"]
    world.phase("m/0", Phase.READY)
    world.model |= {"now": 150.0, "waiting": 20}
    world.controller.step()
    assert world.done[2:] == ["preempt j"]
    world.controller.step()
    assert world.done[2:] == ["preempt j"], "it has its grace"
    del world.jobs["j"]
    world.controller.step()
    assert world.done[3:] == ["start m on n/1"]


def test_slots_that_a_replica_shares_are_for_jobs_too(world: World) -> None:
    """As on a fresh installation, whose one model has all cores."""
    slots = tuple(device.id for device in world.node.devices)
    world.replicas["m/0"] = ReplicaView(id="m/0", model="m", devices=slots, phase=Phase.READY, shared=True)
    world.model |= {"min_replicas": 1, "max_replicas": 1, "devices": 2, "now": 1000.0, "waiting": 20}
    world.work = (BacklogView(model="m", parts=((1e6, 1e12),)),)
    world.jobs["j"] = queued("j", devices=2)
    for _ in range(3):
        world.controller.step()
    assert world.done == ["job j"], "it runs in the idle class, and nobody has to give way"
    assert world.controller.last is not None
    assert [view.id for view in world.controller.last.snapshot.replicas] == ["m/0"]


def test_a_deed_that_fails_stops_no_other_and_is_tried_again_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fails = {"start m"}
    world.model["waiting"] = 1
    world.jobs["j"] = queued("j")
    for _ in range(5):
        world.controller.step()
    assert world.done == ["job j"]
    last = world.controller.last
    assert last is not None
    (note,) = last.failures
    assert note.work == "model m" and "cannot be done" in note.why and "failed 1 times" in note.why
    world.fails.clear()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2.0)
    world.controller.step()
    assert len(world.done) == 2 and world.done[1].startswith("start m on")
    assert world.controller.last is not None and world.controller.last.failures == ()


def test_a_clock_that_jumps_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.model |= {"min_replicas": 1, "waiting": 0, "demand": Demand(10.0, 10.0), "now": 10.0}
    world.jobs["j"] = queued("j")
    world.controller.step()
    world.phase("m/0", Phase.READY)
    done = list(world.done)
    wall = time.time()
    for jump_s in (86_400.0, -86_400.0, 3.2e8):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: wall + jump_s)
        world.controller.step()
    assert world.done == done


def test_what_is_taken_out_is_left(world: World) -> None:
    world.model |= {"min_replicas": 1}
    world.controller.step()
    world.phase("m/0", Phase.READY)
    world.taken_out = {"n/0": "its fan is loud"}
    world.controller.step()
    world.phase("m/1", Phase.READY)
    world.controller.step()
    assert world.done == ["start m on n/0", "start m on n/1", "stop m/0"], "the new one first"
    assert world.controller.last is not None
    assert world.controller.last.plan.devices[0].holder == "lost"


def test_a_lost_node_is_not_used(world: World) -> None:
    world.node = Node("n", "h", world.node.devices, up=False, why="silent")
    world.model |= {"min_replicas": 1}
    world.controller.step()
    assert world.done == []
    assert world.controller.last is not None and world.controller.last.plan.waiting


def test_lines_are_worked_on_beside_as_long_as_there_are_any(world: World) -> None:
    world.model |= {"min_replicas": 1, "max_replicas": 1}
    world.controller.step()
    world.lines = {"m"}
    world.controller.step()
    assert len(world.done) == 1, "there is nothing ready to be beside of"
    world.phase("m/0", Phase.READY)
    for _ in range(3):
        world.controller.step()
    assert world.done[1:] == ["start m beside on n/0"]
    assert world.replicas["m/1"].batch_only
    world.phase("m/1", Phase.READY)
    world.jobs["j"] = queued("j")
    world.controller.step()
    assert world.done[2:] == ["job j"], "it holds nothing"
    world.lines = set()
    for _ in range(3):
        world.controller.step()
    assert world.done[3:] == ["stop m/1"]
    world.lines = {"m"}
    world.controller.step()
    assert world.done[4:] == [], "not before the last one has gone"
    del world.replicas["m/1"]
    world.controller.step()
    assert world.done[4:] == ["start m beside on n/0"]


def test_one_beside_goes_with_its_host(world: World) -> None:
    world.model |= {"min_replicas": 1, "max_replicas": 1}
    world.lines = {"m"}
    world.controller.step()
    world.phase("m/0", Phase.READY)
    world.controller.step()
    world.phase("m/1", Phase.READY)
    del world.replicas["m/0"]
    world.controller.step()
    assert "stop m/1" in world.done


def test_it_learns_how_long_a_start_takes(world: World) -> None:
    world.model |= {"min_replicas": 1}
    world.controller.step()
    world.controller.step()
    world.phase("m/0", Phase.READY)
    world.controller.step()
    world.controller.step()
    ((model, seconds),) = world.startups
    assert model == "m" and 0 <= seconds < 60


def test_reserved_devices_are_marked_until_the_end(world: World) -> None:
    now = time.time()
    world.rented = (ReservationView(id="r", tenant="t", devices=1, start=now - 10, end=now + 1000),)
    world.controller.step()
    world.controller.step()
    assert world.controller.last is not None
    marked = [view.reserved_by for view in world.controller.last.snapshot.devices]
    assert sorted(marked, key=str) == [None, "r"]
    world.jobs["j"] = queued("j", devices=2)
    world.controller.step()
    assert world.done == [], "it is not lent"
    world.rented = ()
    world.controller.step()
    assert world.done == ["job j"]


async def test_the_loop_outlives_whatever_happens_in_it(world: World) -> None:
    real = world.models

    def broken(now: float) -> Sequence[ModelView]:
        raise RuntimeError("out of the blue")

    world.models = broken  # type: ignore[method-assign]
    running = asyncio.create_task(world.controller.run())
    await asyncio.sleep(0.12)
    assert not running.done() and world.done == []
    world.models = real  # type: ignore[method-assign]
    world.model["waiting"] = 1
    async with asyncio.timeout(60):
        while not world.done:
            await asyncio.sleep(0.01)
    running.cancel()


async def test_an_event_is_planned_for_soon() -> None:
    world = World()
    world.controller = FleetController(world, _Replicas(world), _Jobs(world), interval_s=60.0)
    running = asyncio.create_task(world.controller.run())
    await asyncio.sleep(0.05)
    world.jobs["j"] = queued("j")
    world.changed()
    async with asyncio.timeout(60):
        while not world.done:
            await asyncio.sleep(0.01)
    running.cancel()


def test_a_wall_clock_that_jumps_takes_nothing_from_anyone() -> None:
    world = World(devices=2)
    wall, steady = [1_000_000.0], [50.0]
    clock = JumpTolerantClock(lambda: wall[0], lambda: steady[0])
    world.controller = FleetController(world, _Replicas(world), _Jobs(world), clock=clock)
    tomorrow = wall[0] + 86_400.0
    world.rented = (ReservationView(id="r", tenant="t", devices=2, start=tomorrow, end=tomorrow + 86_400.0),)
    world.jobs = {name: queued(name) for name in ("one", "two")}

    def pass_seconds(seconds: int) -> None:
        for _ in range(seconds):
            world.controller.step()
            wall[0] += 1.0
            steady[0] += 1.0

    pass_seconds(3)
    assert sorted(world.done) == ["job one", "job two"]
    for jump in (90_000.0, -2 * 90_000.0, 90_000.0):
        wall[0] += jump
        pass_seconds(5)
    assert sorted(world.done) == ["job one", "job two"]
    wall[0] += 90_000.0
    steady[0] += 90_000.0
    pass_seconds(3)
    assert sorted(world.done)[2:] == ["preempt one", "preempt two"], "it has really become tomorrow"
