"""The tide of one platform: what gateways report becomes what plans are made from, and room for lines."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.no_jobs import NoJobs
from tests.support.stores import migrated_store
from tidemill.app.batches import BatchProcess
from tidemill.app.config.schema.models import ModelConfig, ObjectiveConfig
from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.fleet import Fleet
from tidemill.app.tide import BESIDE_LINGER_S, BESIDE_WORK, Tide
from tidemill.errors import NotFound
from tidemill.fleet.backend import Device, Node
from tidemill.fleet.history import DemandHistory
from tidemill.fleet.replica import Replica
from tidemill.gateway.routing.demand import DemandReport, ModelSeen, ReplicaUse
from tidemill.store.engine import Store
from tidemill.tides.buckets import bucket_of
from tidemill.tides.state import BacklogView, ModelView, Phase

DEVICES = tuple(Device(f"local/{index}", "local", index, "cpu") for index in range(2))


class World:
    """A tide without processes: replicas are put where the test wants them."""

    def __init__(self, path: Path, **model: Any) -> None:
        weights = path / "w.gguf"
        weights.write_bytes(b"GGUF")
        config = ModelConfig(
            **{
                "engine": "llamacpp",
                "path": str(weights),
                "parallel": 8,
                "objective": ObjectiveConfig(ttft_seconds=1.0),
                **model,
            }
        )
        self.store: Store = migrated_store(path)
        data = DataDir(path / "data")
        everything = Config(models={"m": config})
        self.config = everything
        self.fleet = Fleet(everything, path, data, lambda: None)
        self.fleet.replicas._nodes = (Node("local", "127.0.0.1", DEVICES),)
        self.batches = BatchProcess(
            everything, path, data, gateway_url="", store_url="", token="", specs=self.fleet.specs
        )
        self.rolling: set[str] = set()
        self.tide = Tide(
            everything,
            self.fleet,
            self.batches,
            NoJobs(),
            self.store,
            history=DemandHistory(self.store),
            rolling=lambda: self.rolling,
        )

    def put(self, index: int, *, batch_only: bool = False, phase: Phase = Phase.READY) -> Replica:
        replicas = self.fleet.replicas
        replica = replicas._replicas.get(f"m/{index}") or replicas._add(replicas.recipes["m"], batch_only=batch_only)
        replica.devices = DEVICES[index : index + 1] or DEVICES[:1]
        replica.batch_only, replica.phase = batch_only, phase
        return replica

    def slots(self, now: float) -> int:
        self.tide.tick(now)
        return self.batches._allowed["m"]

    def view(self, now: float) -> ModelView:
        (view,) = self.tide.models(now)
        return view


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    world = World(tmp_path, **getattr(request, "param", {}))
    await world.tide.open()
    yield world
    world.store.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What time.monotonic says; the test sets it."""
    now = [time.monotonic()]
    monkeypatch.setattr("tidemill.app.tide.time.monotonic", lambda: now[0])
    yield now


def seen(**changes: Any) -> DemandReport:
    return DemandReport(seen={"m": ModelSeen(**changes)})


async def test_an_empty_replica_is_open_to_half_of_its_places(world: World, clock: list[float]) -> None:
    assert world.slots(clock[0]) == 0, "there is none"
    world.put(0)
    assert world.slots(clock[0]) == 4
    world.put(1)
    assert world.slots(clock[0]) == 8


@pytest.mark.parametrize("world", [{"batch_parallel": 2}], indirect=True)
async def test_the_configured_number_is_never_passed(world: World, clock: list[float]) -> None:
    world.put(0)
    assert world.slots(clock[0]) == 2
    world.put(1, batch_only=True)
    assert world.slots(clock[0]) == 2


async def test_nothing_enters_while_somebody_waits(world: World, clock: list[float]) -> None:
    world.put(0)
    world.tide.note_waiting({"m": 1})
    assert world.slots(clock[0]) == 0
    world.tide.note_waiting({})
    assert world.slots(clock[0]) == 4


async def test_lines_give_way_to_people_who_are_late_and_come_back_slowly(world: World, clock: list[float]) -> None:
    world.put(0)
    slow = seen(arrivals=20, work=1000, ended=20, ttft={bucket_of(3_000_000): 20})
    found = []
    for _ in range(8):
        world.tide.note_load(0, msgspec.structs.replace(slow, replicas={"m/0": ReplicaUse(1, 2, 0)}))
        found.append(world.slots(clock[0]))
        clock[0] += 1.0
    assert found[-1] == 0, found
    quick = seen(arrivals=20, work=1000, ended=20, ttft={bucket_of(50_000): 20})
    clock[0] += 60.0
    found = []
    for _ in range(20):
        world.tide.note_load(0, msgspec.structs.replace(quick, replicas={"m/0": ReplicaUse(1, (found or [0])[-1], 0)}))
        found.append(world.slots(clock[0]))
        clock[0] += 1.0
    assert 0 < found[-1] <= 4 and found == sorted(found), found


async def test_a_lent_replica_is_filled_and_the_others_are_left_alone(world: World, clock: list[float]) -> None:
    world.put(0)
    world.put(1, batch_only=True)
    world.tide.note_waiting({"m": 5})
    assert world.slots(clock[0]) == 8


async def test_a_batch_worth_it_gets_an_engine_beside_that_lingers(world: World, clock: list[float]) -> None:
    def left(work: float) -> None:
        world.batches.backlogs = (BacklogView(model="m", parts=((work, 1e10),)),) if work else ()

    left(BESIDE_WORK / 2)
    assert world.tide.colocated_models() == set(), "a short one is not"
    left(BESIDE_WORK)
    assert world.tide.colocated_models() == {"m"}
    left(10.0)
    clock[0] += 1.0
    assert world.tide.colocated_models() == {"m"}, "to the last line"
    left(0)
    clock[0] += BESIDE_LINGER_S - 1
    assert world.tide.colocated_models() == {"m"}
    clock[0] += 2.0
    assert world.tide.colocated_models() == set()


@pytest.mark.parametrize("world", [{"filler": "inside"}], indirect=True)
async def test_who_wants_it_inside_gets_no_engine_beside(world: World) -> None:
    world.batches.backlogs = (BacklogView(model="m", parts=((1e9, 1e10),)),)
    assert world.tide.colocated_models() == set()


@pytest.mark.parametrize("world", [{"devices": 1, "min_replicas": 0, "max_replicas": 2}], indirect=True)
async def test_reports_of_all_gateways_add_up(world: World, clock: list[float]) -> None:
    world.put(0)
    clock[0] += 100.0
    assert world.view(clock[0]).idle_s >= 100.0
    for process in (0, 1):
        load = DemandReport({"m/0": ReplicaUse(2, 1, 50)}, {"m": ModelSeen(arrivals=3, work=300)})
        world.tide.note_load(process, load)
    assert world.fleet.replicas.replicas["m/0"].view().in_flight == 4
    assert world.fleet.replicas.replicas["m/0"].view().filler == 2
    view = world.view(clock[0])
    assert view.now == 60.0 and view.idle_s == 0.0 and view.peak == 60.0
    assert (view.min_replicas, view.max_replicas, view.devices) == (0, 2, 1)
    world.tide.note_load(1, None)
    assert world.fleet.replicas.replicas["m/0"].view().in_flight == 2, "a gateway has died"


@pytest.mark.parametrize("world", [{"devices": 1, "min_replicas": 0, "max_replicas": 2}], indirect=True)
async def test_whoever_waits_for_a_model_at_zero_has_it_planned_at_once(world: World) -> None:
    event = world.tide.controller._event
    world.tide.note_waiting({"m": 1})
    assert event.is_set()
    event.clear()
    world.tide.note_waiting({"m": 2})
    assert not event.is_set(), "it is being started"
    world.put(0)
    world.tide.note_waiting({})
    world.tide.note_waiting({"m": 1})
    assert not event.is_set(), "this one waits for a place"


async def test_what_is_of_no_matter_for_plans_is_left_as_it_is(world: World, clock: list[float]) -> None:
    world.put(0)
    view = world.view(clock[0])
    assert (view.min_replicas, view.max_replicas) == (1, 1)
    world.fleet.replicas._replicas.clear()
    view = world.view(clock[0])
    assert (view.min_replicas, view.max_replicas) == (0, 0)


@pytest.mark.parametrize("world", [{"devices": 1, "min_replicas": 1, "max_replicas": 2}], indirect=True)
async def test_a_model_that_is_rolled_is_left_to_its_roll(world: World, clock: list[float]) -> None:
    world.put(0)
    world.put(1)
    world.rolling = {"m"}
    view = world.view(clock[0])
    assert (view.min_replicas, view.max_replicas) == (2, 2)


async def test_a_start_is_learned_and_a_late_one_at_once(world: World) -> None:
    tide = world.tide
    tide.learn_startup("m", 10.0)
    assert tide._models["m"].startup_s == 10.0
    tide.learn_startup("m", 30.0)
    assert tide._models["m"].startup_s == 30.0
    tide.learn_startup("m", 10.0)
    assert 20.0 < tide._models["m"].startup_s < 30.0
    tide.learn_startup("gone", 1.0)


async def test_what_was_taken_out_stays_so_over_a_restart(world: World) -> None:
    await world.tide.drain("local/1", "loud")
    again = Tide(
        world.config, world.fleet, world.batches, NoJobs(), world.store, history=DemandHistory(world.store), rolling=set
    )
    await again.open()
    assert again.drained() == {"local/1": "loud"}
    await world.tide.undrain("local/1")
    assert world.tide.drained() == {}
    with pytest.raises(NotFound, match="not drained"):
        await world.tide.undrain("local/1")
    with pytest.raises(NotFound, match="Known: local, local/0, local/1"):
        await world.tide.drain("elsewhere", "")
