"""Rolling to another version, with real processes: nobody notices, and what does not start is taken back."""

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.fleet.fleets import ready, recipe, replica_set, until, weights
from tidemill.errors import Conflict, NotFound
from tidemill.fleet.backend import Device
from tidemill.fleet.local import LocalBackend
from tidemill.fleet.recipe import WeightsVersion
from tidemill.fleet.replicas import ReplicaSet
from tidemill.fleet.roll import Rolls, RollState
from tidemill.tides.state import Phase


class Kept(dict[str, WeightsVersion]):
    async def __call__(self, model: str, version: WeightsVersion) -> None:
        self[model] = version


class Crowd:
    """Clients that ask all the time, each of a replica that is ready, as the gateways would choose."""

    def __init__(self, found: ReplicaSet, clients: int = 8) -> None:
        self._found = found
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stop = False
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(clients)]

    async def _ask(self, number: int) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        async with httpx.AsyncClient(timeout=30) as client:
            while not self._stop:
                there = [each for each in self._found.of("m") if each.ready]
                if not there:
                    self.failures.append("no replica is ready")
                    await asyncio.sleep(0.05)
                    continue
                url = there[number % len(there)].base_url
                try:
                    answer = await client.post(f"{url}/chat/completions", json=body)
                    self.answers[answer.json()["choices"][0]["message"]["content"].split()[0]] += 1
                except (httpx.HTTPError, ValueError) as error:
                    self.failures.append(repr(error))

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


async def over(state: RollState) -> None:
    await until(lambda: not state.under_way, 60.0)


@pytest.mark.parametrize(("replicas", "devices"), [(1, 2), (2, 3), (2, 2)])
async def test_nobody_notices(tmp_path: Path, replicas: int, devices: int) -> None:
    """On free devices, and where there are none, one after the other in place."""
    old, new = weights(tmp_path, "v1", word="old ", interval_ms=5.0), weights(tmp_path, "v2", word="new ", load_s=0.3)
    served = recipe(old, min_replicas=replicas, max_replicas=replicas)
    async with replica_set(tmp_path, served, devices=devices) as found:
        await ready(found)
        kept = Kept()
        rolls = Rolls(found, kept)
        crowd = Crowd(found)
        await asyncio.sleep(0.3)
        state = rolls.begin("m", new)
        with pytest.raises(Conflict, match="already"):
            rolls.begin("m", old)
        most = 0
        while state.under_way:
            most = max(most, len(found.of("m")))
            counted = [each for each in found.views() if each.phase is not Phase.DRAINING]
            assert len(counted) <= replicas, "the plan sees no more replicas than there are to be"
            holders = [device for each in found.views() for device in each.devices]
            assert most <= replicas + 1 and len(set(holders)) <= devices
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await crowd.stop()
        assert (state.state, state.done, state.of) == ("done", replicas, replicas), state.why
        assert crowd.failures == []
        assert crowd.answers["old"] > 0 and crowd.answers["new"] > 0
        assert [each.version for each in found.of("m")] == [new] * replicas
        assert kept == {"m": new} and found.version("m") == new
        assert found.start("m", ["local/0"]) and found.of("m")[-1].version == new
        with pytest.raises(Conflict, match="already runs this version"):
            rolls.begin("m", new)


async def test_beside_on_the_same_cores(tmp_path: Path) -> None:
    """On a CPU the new one needs no free slots."""
    old, new = weights(tmp_path, "v1", word="old "), weights(tmp_path, "v2", word="new ")
    backend = LocalBackend([Device("local/0", "local", 0, "cpu")], owner=f"roll-{tmp_path.name}")
    async with replica_set(tmp_path, recipe(old), backend=backend) as found:
        await ready(found)
        crowd = Crowd(found)
        state = Rolls(found, Kept()).begin("m", new)
        await over(state)
        await crowd.stop()
        assert state.state == "done" and crowd.failures == []
        assert [(each.name, each.devices[0].id) for each in found.of("m")] == [("m/1", "local/0")]


@pytest.mark.parametrize("devices", [3, 2])
async def test_a_version_that_does_not_start_is_taken_back(tmp_path: Path, devices: int) -> None:
    old, bad = weights(tmp_path, "v1", word="old "), weights(tmp_path, "v2", fails="no such tensor")
    served = recipe(old, min_replicas=2, max_replicas=2)
    async with replica_set(tmp_path, served, devices=devices) as found:
        await ready(found)
        kept = Kept()
        crowd = Crowd(found)
        state = Rolls(found, kept).begin("m", bad)
        await over(state)
        await crowd.stop()
        assert state.state == "taken back"
        assert "its process ended with code 1" in state.why
        assert crowd.failures == [] and kept == {}
        assert found.version("m") == old
        await ready(found)
        assert [each.version for each in found.of("m")] == [old, old]


async def test_half_way_back(tmp_path: Path) -> None:
    """The second replica does not start: the first is taken back too."""
    old, new = weights(tmp_path, "v1", word="old "), weights(tmp_path, "v2", word="new ")
    served = recipe(old, min_replicas=2, max_replicas=2)
    async with replica_set(tmp_path, served, devices=3) as found:
        await ready(found)
        crowd = Crowd(found)
        state = Rolls(found, Kept()).begin("m", new)
        await until(lambda: state.done == 1)
        weights(tmp_path, "v2", fails="disk error")
        await over(state)
        await crowd.stop()
        assert (state.state, state.done) == ("taken back", 0) and crowd.failures == []
        assert [each.version for each in found.of("m") if each.ready] == [old, old]
        assert crowd.answers["new"] > 0


async def test_what_cannot_be_rolled(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path)), devices=1) as found:
        await ready(found)
        rolls = Rolls(found, Kept())
        with pytest.raises(Conflict, match="one replica, and there are no free devices"):
            rolls.begin("m", weights(tmp_path, "v2"))
        with pytest.raises(NotFound, match="'x'"):
            rolls.begin("x", WeightsVersion())
        assert rolls.states() == []


async def test_one_that_never_started_is_rolled_to_one_that_does(tmp_path: Path) -> None:
    async with replica_set(tmp_path, recipe(weights(tmp_path, fails="corrupt")), devices=1) as found:
        (broken,) = found.of("m")
        await until(lambda: broken.failures > 0)
        state = Rolls(found, Kept()).begin("m", weights(tmp_path, "v2"))
        await over(state)
        assert state.state == "done"
        (replica,) = found.of("m")
        assert replica.ready and replica.version.name == "v2"


async def test_a_model_that_sleeps_is_rolled_once_the_version_was_seen_to_start(tmp_path: Path) -> None:
    asleep = recipe(weights(tmp_path), min_replicas=0)
    async with replica_set(tmp_path, asleep, devices=1) as found:
        rolls, kept = Rolls(found, Kept()), found.version("m")
        bad = rolls.begin("m", weights(tmp_path, "v2", fails="corrupt"))
        await over(bad)
        assert bad.state == "taken back" and found.version("m") == kept and found.views() == []
        good = rolls.begin("m", weights(tmp_path, "v3"))
        await over(good)
        assert (good.state, good.done, good.of) == ("done", 1, 1) and found.version("m").name == "v3"
        assert [each.phase for each in found.views()] == [Phase.READY]
        await found.stop("m/0", "nobody asks")
        found.held_elsewhere = lambda: {"local/0"}
        with pytest.raises(Conflict, match="no free devices to try"):
            rolls.begin("m", weights(tmp_path, "v4"))
