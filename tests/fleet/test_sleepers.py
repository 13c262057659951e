"""Replicas that sleep and wake, as processes that are started like vLLM."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from tests.fleet.fleets import ready, recipe, replica_set, until, weights
from tidemill.app.engine_http import post
from tidemill.engines import vllm
from tidemill.errors import Conflict
from tidemill.fleet.replica import Replica, ReplicaLoadSample
from tidemill.fleet.replicas import ReplicaSet
from tidemill.fleet.roll import Rolls
from tidemill.tides.state import Phase


async def asleep(found: ReplicaSet) -> Replica:
    (replica,) = await ready(found)
    found.keeps_minimum = False
    found.set_batch_only(replica.name, batch_only=True, why="lent meanwhile")
    found.sleep(replica.name, "nobody asks")
    assert replica.phase is Phase.DRAINING and found.held() == {"local/0"}
    await until(lambda: replica.phase is Phase.ASLEEP)
    return replica


async def test_one_that_sleeps_holds_no_device_and_wakes_as_the_same_process(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        replica = await asleep(found)
        pid, incarnation = replica.pid, replica.incarnation
        assert not replica.batch_only
        assert found.held() == set() and not replica.ready
        (view,) = found.views()
        assert (view.phase, view.devices) == (Phase.ASLEEP, ("local/0",))
        found.wake(replica.name, "somebody asks")
        assert replica.phase is Phase.WARMING and found.held() == {"local/0"}
        await until(lambda: replica.ready)
        assert (replica.pid, replica.incarnation, replica.starts) == (pid, incarnation, 1)
        whys = [step.why for step in found.history("m")][-4:]
        assert whys[:2] == ["nobody asks", "nobody asks"] and "it wakes: somebody asks" in whys[2]
        assert "it woke in" in whys[3]


async def test_it_ends_what_it_works_on_before_it_sleeps(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        (replica,) = await ready(found)
        found.keeps_minimum = False
        found.note_use({"m/0": ReplicaLoadSample(people=1)})
        found.sleep("m/0", "nobody asks")
        await asyncio.sleep(1.0)
        assert replica.phase is Phase.DRAINING
        found.note_use({})
        await until(lambda: replica.phase is Phase.ASLEEP)


async def test_one_that_does_not_wake_is_started_anew(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        replica = await asleep(found)
        pid = replica.pid
        assert await post(replica.root, b"/mock/wakes-no-more", 5.0)
        found.wake(replica.name, "somebody asks")
        await until(lambda: replica.ready)
        assert replica.pid != pid and replica.starts == 2


async def test_one_that_dies_asleep_is_gone_as_its_devices_are_others(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        replica = await asleep(found)
        assert replica.pid is not None
        os.kill(replica.pid, signal.SIGKILL)
        await until(lambda: replica.phase is Phase.GONE)
        assert not found.views() and replica.starts == 1


async def test_one_that_cannot_sleep_is_ended(tmp_path: Path) -> None:
    deaf = msgspec.structs.replace(vllm.CONTROL, sleep="/no-such-page")
    async with replica_set(tmp_path, recipe(weights(tmp_path), control=deaf)) as found:
        (replica,) = await ready(found)
        found.keeps_minimum = False
        found.sleep(replica.name, "nobody asks")
        await until(lambda: replica.phase is Phase.GONE)
        assert "it could not be put to sleep" in replica.why


async def test_it_is_stopped_while_it_sleeps_after_on_drained(tmp_path: Path) -> None:
    heard: list[str] = []

    async def on_drained(replica: Replica) -> None:
        heard.append(replica.name)

    async with replica_set(tmp_path, recipe(weights(tmp_path)), on_drained=on_drained) as found:
        replica = await asleep(found)
        await found.stop(replica.name, "no more of its model may sleep")
        assert replica.phase is Phase.GONE and heard == ["m/0"]


async def test_one_that_has_slept_through_a_roll_is_ended_rather_than_woken(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        replica = await asleep(found)
        found.set_version("m", weights(tmp_path, "v2"))
        with pytest.raises(Conflict, match="another version"):
            found.wake(replica.name, "somebody asks")
        await until(lambda: replica.phase is Phase.GONE)


async def test_one_that_is_ended_while_it_sleeps_holds_nothing_again(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        replica = await asleep(found)
        ending = found.stop(replica.name, "no more of its model may sleep")
        assert found.held() == set() and found.views() == []
        await ending


async def test_one_that_was_restarted_often_is_not_stuck_when_it_sleeps(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        (replica,) = await ready(found)
        for incarnation in (2, 3):
            assert replica.pid is not None
            os.kill(replica.pid, signal.SIGKILL)
            await until(lambda incarnation=incarnation: replica.starts == incarnation and replica.ready)
        await asleep(found)
        assert not replica.stuck
        found.wake(replica.name, "somebody asks")
        assert not replica.stuck
        await until(lambda: replica.ready)


async def test_one_that_dies_while_it_wakes_is_started_anew_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        replica = await asleep(found)
        answer = asyncio.Event()

        async def late_refusal(root: str, path: bytes, within_s: float) -> bool:
            await answer.wait()
            return False

        monkeypatch.setattr(replica, "_post", late_refusal)
        found.wake(replica.name, "somebody asks")
        assert replica.pid is not None
        os.kill(replica.pid, signal.SIGKILL)
        await until(lambda: replica.starts == 2 and replica.ready)
        pid = replica.pid
        answer.set()
        await asyncio.sleep(0.5)
        assert replica.ready and replica.pid == pid


async def test_a_roll_gives_a_sleepers_device_to_nobody(tmp_path: Path) -> None:
    """It was draining when the roll began."""
    old, new = weights(tmp_path, "v1"), weights(tmp_path, "v2", load_s=1.0)
    served = recipe(old, min_replicas=2, max_replicas=2)
    async with replica_set(tmp_path, served, devices=3) as found:
        _, other = await ready(found)
        found.keeps_minimum = False
        home = other.devices[0].id
        found.note_use({other.name: ReplicaLoadSample(people=1)})
        found.sleep(other.name, "nobody asks")

        async def kept(model: str, version: object) -> None:
            return None

        state = Rolls(found, kept).begin("m", new)
        await asyncio.sleep(0.3)
        found.note_use({})
        await until(lambda: other.phase is Phase.ASLEEP)
        found.held_elsewhere = lambda: {home}  # a job has it
        while state.under_way:
            assert not [view for view in found.views() if view.id != other.name and home in view.devices]
            await asyncio.sleep(0.02)
        assert state.state == "done" and other.phase is Phase.GONE
