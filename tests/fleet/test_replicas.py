"""Replicas with real processes: their life, the reasons that are kept of it, and what ends it."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.fleet.fleets import FarBackend, ready, recipe, replica_set, slots, until, weights
from tests.fleet.processes import gone
from tidemill.errors import Conflict, NotFound
from tidemill.fleet.backend import Node
from tidemill.fleet.replica import Replica, ReplicaLoadSample
from tidemill.fleet.replicas import HISTORY
from tidemill.fleet.static_placement import first_fit, share_of_slots
from tidemill.tides.state import Phase


async def test_a_life_and_its_reasons(tmp_path: Path) -> None:
    announced = []
    async with replica_set(
        tmp_path, recipe(weights(tmp_path)), changed=lambda: announced.append(1), devices=2
    ) as found:
        (replica,) = await ready(found)
        assert replica.pid is not None and replica.ready_after_s is not None
        view = found.views()[0]
        assert (view.id, view.model, view.devices, view.phase, view.version) == (
            "m/0",
            "m",
            ("local/0",),
            "ready",
            "v1",
        )
        name = found.start("m", ["local/1"], why="more people came")
        assert name == "m/1" and found.views()[1].phase is Phase.STARTING
        await ready(found, "m/1")
        await found.stop(name, "they have left")
        assert [each.id for each in found.views()] == ["m/0"]
        steps = [(each.phase, each.why) for each in found.history("m") if each.replica == "m/1"]
        assert [phase for phase, _ in steps] == ["starting", "warming", "ready", "draining", "gone"]
        assert steps[0][1] == "more people came" and steps[-1][1] == "they have left"
        assert len(announced) == len(found.history("m"))
        assert found.start("m", [], why="") == "m/1", "the lowest number that is free"
        pids = [each.pid or 0 for each in found.replicas.values()]
        for unknown in (
            lambda: found.start("x", []),
            lambda: found.start("m", ["far/0"]),
            lambda: found.stop("m/9", ""),
        ):
            with pytest.raises(NotFound):
                unknown()
    assert gone(*[pid for pid in pids if pid])()
    log = (tmp_path / "engine-m-1.log").read_text()
    assert "sees 1" in log, "it was shown its device and no other"


async def test_it_dies_and_comes_back(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        (replica,) = await ready(found)
        incarnation, address = replica.incarnation, replica.base_url
        os.kill(replica.pid or 0, signal.SIGKILL)
        await until(lambda: not replica.ready)
        await ready(found)
        assert replica.incarnation != incarnation and replica.base_url != address and replica.starts == 2
        assert any("killed" in each.why or "code -9" in each.why for each in found.history("m"))
        assert any("again in 0.2 s" in each.why for each in found.history("m"))


async def test_one_that_hangs_is_killed_and_started_again(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        (replica,) = await ready(found)
        pid = replica.pid or 0
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: replica.starts == 2 and replica.ready)
        assert gone(pid)()
        assert any("it hung: no answer for 2.5 s" in each.why for each in found.history("m"))


async def test_one_that_does_not_start(tmp_path: Path) -> None:
    """It is tried again, ever later; the reasons can be read, and the history stays bounded."""
    async with replica_set(tmp_path, recipe(weights(tmp_path, fails="CUDA out of memory"))) as found:
        (replica,) = found.of("m")
        await until(lambda: replica.stuck)
        waits = [each.why.rpartition(" in ")[2] for each in found.history("m") if "again" in each.why]
        assert waits[:2] == ["0.2 s", "1 s"]
        assert any("its process ended with code 1" in each.why for each in found.history("m"))
        for _ in range(HISTORY + 10):
            replica.move(Phase.STARTING, "again")
        assert len(found.history("m")) == HISTORY


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    missing = recipe(weights(tmp_path))
    async with replica_set(tmp_path, missing) as found:
        await ready(found)
    from dataclasses import replace

    from tidemill.engines.launch import CommandLine

    missing = replace(missing, command=lambda version, devices, part: CommandLine(("no-such-vllm", "{port}")))
    async with replica_set(tmp_path, missing) as found:
        await until(lambda: any("there is no program 'no-such-vllm'" in each.why for each in found.history("m")))


async def test_one_that_takes_too_long(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path, load_s=100.0), start_s=0.8)) as found:
        await until(lambda: any("was not ready within 0.8 s" in each.why for each in found.history("m")))


async def answer(replica: Replica, tokens: int) -> str:
    """A chat straight to the engine, as the gateways would send it."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    async with httpx.AsyncClient(timeout=60) as client:
        answered = await client.post(f"{replica.base_url}/chat/completions", json=body)
        return str(answered.json()["choices"][0]["message"]["content"])


async def test_draining_waits_for_the_requests(tmp_path: Path) -> None:
    heard: list[Phase] = []

    async def on_drained(replica: Replica) -> None:
        heard.append(replica.phase)
        assert replica.pid is not None

    served = recipe(weights(tmp_path, interval_ms=20.0, word="w"))
    async with replica_set(tmp_path, served, on_drained=on_drained) as found:
        (replica,) = await ready(found)
        working = asyncio.create_task(answer(replica, 60))
        await asyncio.sleep(0.3)
        ending = found.stop("m/0", "rolled")
        assert not replica.ready and replica.phase is Phase.DRAINING
        assert found.stop("m/0", "again") is ending, "asked twice, drained once"
        assert await working == "w" * 60
        assert not ending.done()
        await ending
        assert heard == [Phase.DRAINING]


async def test_draining_believes_the_gateways(tmp_path: Path) -> None:
    """What they have on the way to it counts, also when the engine has not heard of it."""
    async with replica_set(tmp_path, recipe(weights(tmp_path), min_replicas=0)) as found:
        found.start("m", ["local/0"])
        await ready(found)
        found.note_use({"m/0": ReplicaLoadSample(people=1), "m/9": ReplicaLoadSample(filler=1)})
        assert found.views()[0].in_flight == 1
        ending = found.stop("m/0", "given up")
        await asyncio.sleep(1.2)
        assert not ending.done()
        found.note_use({})
        await ending


async def test_draining_has_an_end(tmp_path: Path) -> None:
    served = recipe(weights(tmp_path, interval_ms=100.0), drain_s=0.5)
    async with replica_set(tmp_path, served) as found:
        (replica,) = await ready(found)
        working = asyncio.create_task(answer(replica, 1000))
        await asyncio.sleep(0.3)
        await found.stop("m/0", "rolled")
        assert "requests that had not ended in 0.5 s were cut off" in found.history("m")[-1].why
        with pytest.raises(httpx.HTTPError):
            await working


async def test_one_that_dies_while_it_drains_stays_dead(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path, interval_ms=50.0), min_replicas=0)) as found:
        found.start("m", ["local/0"])
        (replica,) = await ready(found)
        found.note_use({"m/0": ReplicaLoadSample(people=1)})
        ending = found.stop("m/0", "rolled")
        os.kill(replica.pid or 0, signal.SIGKILL)
        await asyncio.sleep(0.5)
        found.note_use({})
        await ending
        assert replica.starts == 1 and not found.views()


async def test_one_that_is_stopped_while_it_loads(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path, load_s=100.0), min_replicas=0)) as found:
        for pause in (0.0, 0.01, 0.3):
            name = found.start("m", ["local/0"])
            replica = found.replicas[name]
            await asyncio.sleep(pause)
            began = time.monotonic()
            await found.stop(name, "changed my mind")
            assert time.monotonic() - began < 60 and replica.pid is None and replica.phase is Phase.GONE


async def test_a_lost_node_takes_its_replicas_with_it(tmp_path: Path) -> None:
    """At once and with the reason; the model gets its minimum again elsewhere."""
    backend = FarBackend("a", "b", owner=f"far-{tmp_path.name}")
    served = recipe(weights(tmp_path), min_replicas=3, max_replicas=3)
    async with replica_set(tmp_path, served, backend=backend) as found:
        await ready(found)
        assert [each.devices[0].id for each in found.of("m")] == ["a/0", "b/0", "a/1"]
        backend.lost["a"] = "it does not answer"
        await until(lambda: any(each.phase is Phase.GONE for each in found.history("m")))
        lost = [each for each in found.history("m") if each.phase is Phase.GONE]
        assert {each.replica for each in lost} == {"m/0", "m/2"}
        assert {each.why for each in lost} == {"node a is lost: it does not answer"}
        await until(lambda: sorted(each.devices[0].id for each in found.of("m") if each.ready) == ["b/0", "b/1"])
        (waits,) = [each for each in found.of("m") if not each.ready]
        assert waits.why == "there are no 1 free devices of one kind on one node" and waits.stuck
        backend.lost.clear()
        await ready(found)
        assert len(found.views()) == 3


async def test_a_replica_is_lent_to_batches_and_taken_back(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        found.keeps_minimum = False
        await ready(found)
        found.set_batch_only("m/0", batch_only=True, why="nobody asks")
        assert found.views()[0].batch_only and found.views()[0].phase is Phase.READY
        found.set_batch_only("m/0", batch_only=False, why="the flood")
        assert not found.views()[0].batch_only
        colocated = found.start("m", ["local/0"], batch_only=True, colocated=True)
        await ready(found, colocated)
        with pytest.raises(Conflict):
            found.set_batch_only(colocated, batch_only=False, why="the flood")
        pid = found.replicas[colocated].pid or 0
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        assert os.sched_getscheduler(found.replicas["m/0"].pid or 0) == os.SCHED_OTHER


def test_where_replicas_go_when_nobody_plans(tmp_path: Path) -> None:
    from tidemill.fleet.backend import Device

    cpus = tuple(Device(f"a/{index}", "a", index, "cpu") for index in range(4))
    nodes = [
        Node("a", "a", cpus),
        Node("b", "b", slots(4, "b")),
        Node("c", "c", tuple(Device(f"c/{index}", "c", index, "h800-sxm") for index in range(4))),
    ]
    version = weights(tmp_path)

    def ids(devices: "tuple[Device, ...] | None") -> list[str] | None:
        return None if devices is None else [device.id for device in devices]

    two = recipe(version, devices=2, kinds=("h800-sxm", "h20"))
    assert ids(first_fit(two, nodes, set())) == ["c/0", "c/1"]
    assert ids(first_fit(two, nodes, {"c/0", "c/1", "c/3"})) == ["b/0", "b/1"], "all on one node"
    assert ids(first_fit(two, [nodes[0]], set())) is None
    assert ids(first_fit(recipe(version, devices=3), nodes, {"a/0"})) == ["a/1", "a/2", "a/3"], "any kind"
    one = recipe(version, devices=1, kinds=("cpu",))
    both = [Node("a", "a", cpus[:2]), Node("d", "d", tuple(Device(f"d/{n}", "d", n, "cpu") for n in range(2)))]
    assert ids(first_fit(one, both, {"a/0"}, apart={"a"})) == ["d/0"], "rather on another node than the first"
    assert ids(first_fit(one, both[:1], {"a/0"}, apart={"a"})) == ["a/1"], "on the same one when there is no other"
    down = Node("c", "c", nodes[2].devices, up=False)
    assert ids(first_fit(two, [down, nodes[1]], set())) == ["b/0", "b/1"]
    share = recipe(version, devices=None, max_replicas=2)
    assert [ids(share_of_slots(share, index, nodes)) for index in (0, 1, 2)] == [
        ["a/0", "a/1"],
        ["a/2", "a/3"],
        ["a/0", "a/1"],
    ]
    many = recipe(version, devices=None, max_replicas=9)
    assert ids(share_of_slots(many, 5, nodes)) == ["a/1"]
    assert share_of_slots(share, 0, nodes[1:]) == ()
