"""Replicas that sleep and wake, as processes that are started like vLLM."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from fleet.fleets import ready, recipe, replica_set, until, weights
from tidemill.app.asking import post
from tidemill.engines import vllm
from tidemill.errors import Conflict
from tidemill.fleet.replica import Replica, Use
from tidemill.fleet.replicas import ReplicaSet
from tidemill.tides.state import Phase


async def asleep(found: ReplicaSet) -> Replica:
    (replica,) = await ready(found)
    found.keeps_minimum = False
    found.sleep(replica.name, "nobody asks")
    assert replica.phase is Phase.DRAINING and found.held() == {"local/0"}
    await until(lambda: replica.phase is Phase.ASLEEP)
    return replica


async def test_one_that_sleeps_holds_no_device_and_wakes_as_the_same_process(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        replica = await asleep(found)
        pid, life = replica.pid, replica.life
        assert found.held() == set() and not replica.ready
        (view,) = found.views()
        assert (view.phase, view.devices) == (Phase.ASLEEP, ("local/0",))
        found.wake(replica.name, "somebody asks")
        assert replica.phase is Phase.WARMING and found.held() == {"local/0"}
        await until(lambda: replica.ready)
        assert (replica.pid, replica.life, replica.starts) == (pid, life, 1)
        whys = [step.why for step in found.history("m")][-4:]
        assert whys[:2] == ["nobody asks", "nobody asks"] and "it wakes: somebody asks" in whys[2]
        assert "it woke in" in whys[3]


async def test_it_ends_what_it_works_on_before_it_sleeps(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path))) as found:
        (replica,) = await ready(found)
        found.keeps_minimum = False
        found.note_use({"m/0": Use(people=1)})
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


async def test_it_is_stopped_while_it_sleeps_and_its_last_words_are_heard(tmp_path: Path) -> None:
    heard: list[str] = []

    async def last_words(replica: Replica) -> None:
        heard.append(replica.name)

    async with replica_set(tmp_path, recipe(weights(tmp_path)), last_words=last_words) as found:
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
