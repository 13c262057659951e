"""A replica over several nodes: one process on each, which start, serve and end together."""

import os
import signal
from pathlib import Path

from tests.fleet.fleets import FarBackend, ready, recipe, replica_set, until, weights
from tidemill.fleet.replica import Replica
from tidemill.tides.state import Phase


def far(path: Path, *nodes: str) -> FarBackend:
    return FarBackend(*nodes, owner=f"fleet-{path.name}")


def pids(replica: Replica) -> list[int]:
    found = [process.pid for process in replica._processes.running]
    assert None not in found
    return [pid for pid in found if pid is not None]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_one_process_on_each_node_and_the_head_is_spoken_to(tmp_path: Path) -> None:
    spread = recipe(weights(tmp_path), devices=4)
    async with replica_set(tmp_path, spread, backend=far(tmp_path, "a", "b", "c")) as found:
        (replica,) = await ready(found)
        assert [device.id for device in replica.devices] == ["a/0", "a/1", "b/0", "b/1"]
        assert [process.launch.node for process in replica._processes.running] == ["a", "b"]
        head, other = (tmp_path / f"engine-m-0{rank}.log" for rank in ("", ".1"))
        assert "'--node-rank': '0'" in head.read_text() and "'--headless'" not in head.read_text()
        assert "'--node-rank': '1'" in other.read_text() and "'--headless'" in other.read_text()
        assert found.held() == {"a/0", "a/1", "b/0", "b/1"}
        processes = pids(replica)
        await found.stop("m/0", "enough")
        assert not any(alive(pid) for pid in processes)


async def test_when_one_of_them_dies_all_are_started_anew(tmp_path: Path) -> None:
    spread = recipe(weights(tmp_path), devices=4)
    async with replica_set(tmp_path, spread, backend=far(tmp_path, "a", "b")) as found:
        (replica,) = await ready(found)
        before = pids(replica)
        os.kill(before[1], signal.SIGKILL)
        await until(lambda: replica.starts == 2 and replica.ready)
        assert not any(alive(pid) for pid in before)
        assert not set(before) & set(pids(replica))


async def test_when_one_node_is_lost_the_rest_is_ended_before_its_devices_are_free(tmp_path: Path) -> None:
    backend = far(tmp_path, "a", "b", "c")
    spread = recipe(weights(tmp_path), devices=4)
    async with replica_set(tmp_path, spread, backend=backend) as found:
        (replica,) = await ready(found)
        before = pids(replica)
        backend.lost["b"] = "pulled out"
        await until(lambda: replica.phase is Phase.GONE)
        assert not alive(before[0])
        assert any("node b is lost: pulled out" in step.why for step in found.history("m"))
        (successor,) = await ready(found)
        assert {device.node for device in successor.devices} == {"a", "c"}


async def test_where_one_node_is_large_enough_or_the_engine_cannot_it_is_on_one(tmp_path: Path) -> None:
    narrow = recipe(weights(tmp_path), devices=4, spans=False)
    pair = recipe(weights(tmp_path), model="pair", devices=2)
    async with replica_set(tmp_path, narrow, pair, backend=far(tmp_path, "a", "b")) as found:
        await until(lambda: found.replicas["pair/0"].ready)
        assert {device.node for device in found.replicas["pair/0"].devices} == {"a"}
        assert "no 4 free devices" in found.replicas["m/0"].why and not found.replicas["m/0"].devices
