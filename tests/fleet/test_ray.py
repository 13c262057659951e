"""The Ray backend on a real cluster of several nodes in this machine; nodes, the bridge and commands are killed."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.fleet.fleets import ready, recipe, replica_set, until, weights
from tests.fleet.processes import gone, launch, pid_in, python, said, shell
from tests.support.platform import wait_until
from tests.support.ray_cluster import Cluster
from tests.support.requirements import need_module
from tidemill.errors import Unavailable
from tidemill.fleet.backend import CannotStart, Device
from tidemill.fleet.ray import RayBackend, devices_of, unique_names
from tidemill.fleet.ray_messages import RayNode
from tidemill.tides.state import Phase

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_module("ray", "Ray", "make test")
    cluster = Cluster()
    yield cluster
    cluster.shut_down()


@asynccontextmanager
async def joined(cluster: Cluster, path: Path) -> AsyncIterator[RayBackend]:
    path.mkdir(exist_ok=True)
    backend = RayBackend(cluster.address, log_fd=lambda: os.open(path / "bridge.log", os.O_WRONLY | os.O_CREAT))
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


def on(node: str, *indices: int) -> tuple[Device, ...]:
    return tuple(Device(f"{node}/{index}", node, index, "cpu") for index in indices or (0,))


async def test_its_nodes_and_devices(cluster: Cluster, tmp_path: Path) -> None:
    async with joined(cluster, tmp_path) as ray:
        nodes = {node.name: node for node in await ray.nodes() if node.devices}
        assert set(nodes) == {"east", "west"}
        assert [device.id for device in nodes["east"].devices] == ["east/0", "east/1"]
        assert all(device.kind == "cpu" and device.memory_bytes > 0 for device in nodes["west"].devices)


async def test_a_command_runs_where_it_was_sent_and_tells_its_end(cluster: Cluster, tmp_path: Path) -> None:
    show = python(
        "print('port', sys.argv[1], os.environ['TIDEMILL_DEVICES'], os.environ['MINE'], flush=True)",
        "print(len(os.sched_getaffinity(0)), 'TIDEMILL_ADMIN_TOKEN' in os.environ)",
        "sys.exit(3)",
    )
    async with joined(cluster, tmp_path) as ray:
        order = launch(tmp_path / "logs", (*show, "{port}"), devices=on("west", 0), env={"MINE": "x"})
        (process,) = await ray.start([order])
        ended = await process.wait()
        assert (ended.code, ended.why) == (3, "exited")
        assert process.pid is None and process.host == cluster._cluster.address.split(":")[0]
        text = (tmp_path / "logs" / "log").read_text()
        assert f"port {process.port} west/0 x\n1 False\n" in text
        assert (tmp_path / "logs" / "end.json").exists()


async def test_what_ignores_its_signal_is_killed_after_its_grace(cluster: Cluster, tmp_path: Path) -> None:
    deaf = python("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('deaf', flush=True)", "time.sleep(600)")
    async with joined(cluster, tmp_path) as ray:
        (process,) = await ray.start([launch(tmp_path, deaf, devices=on("east"))])
        wait_until(said(tmp_path, "deaf"))
        ended = await process.stop(0.3)
        assert (ended.code, ended.why) == (-signal.SIGKILL, "killed")
        (process,) = await ray.start([launch(tmp_path, shell("sleep 600"), devices=on("east"))])
        process.kill()
        assert (await process.wait()).code == -signal.SIGKILL


async def test_a_gang_starts_as_a_whole_or_not_at_all(cluster: Cluster, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    fine = launch(tmp_path, shell(f"echo $$ > {pid}; sleep 600"), devices=on("east"))
    async with joined(cluster, tmp_path) as ray:
        with pytest.raises(CannotStart, match="there is no program '/no/such'"):
            await ray.start([fine, launch(tmp_path, ("/no/such",), devices=on("west"))])
        if pid.exists():  # it had begun before the other was refused
            wait_until(gone(pid_in(pid)))
        pid.unlink(missing_ok=True)
        gang = await ray.start([fine, launch(tmp_path, shell("sleep 600"), devices=on("west"))])
        assert len(gang) == 2
        gang[0].kill()
        assert (await gang[0].wait()).code == -signal.SIGKILL
        assert gang[1].pid is not None
        assert (await gang[1].stop(1.0)).why == "stopped"
        with pytest.raises(CannotStart, match="there is no node 'north'"):
            await ray.start([launch(tmp_path, shell("true"), devices=on("north"))])


async def test_devices_that_somebody_else_on_the_cluster_holds(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray sets a gang's devices aside, so two users of one cluster never share them; two platforms stand for them."""
    async with joined(cluster, tmp_path / "a") as one, joined(cluster, tmp_path / "b") as other:
        order = launch(tmp_path, shell("sleep 600"), devices=on("east", 0, 1))
        (holder,) = await one.start([order])
        with pytest.raises(CannotStart, match="the devices there are in use"):
            await other.start([order])
        await holder.stop(1.0)
        (process,) = await other.start([order])
        process.kill()
        await process.wait()


async def test_a_bridge_that_is_killed_takes_its_commands_along_and_comes_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    order = launch(tmp_path, shell(f"echo $$ > {pid}; exec sleep 600"), devices=on("east"), orphan_grace_s=0.5)
    async with joined(cluster, tmp_path) as ray:
        (process,) = await ray.start([order])
        command = pid_in(pid)
        assert ray._child is not None
        os.kill(ray._child.pid, signal.SIGKILL)
        ended = await process.wait()
        assert ended.code is None and "connection" in ended.why
        assert not any(node.up for node in await ray.nodes())
        with pytest.raises(CannotStart, match="connection to the Ray cluster was lost"):
            await ray.start([order])
        await asyncio.to_thread(wait_until, gone(command), 30.0)
        async with asyncio.timeout(30):
            await ray._joined.wait()
        (process,) = await ray.start([launch(tmp_path, shell("exit 4"), devices=on("east"))])
        assert (await process.wait()).code == 4


async def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_module("ray", "Ray", "make test")
    monkeypatch.setattr("tidemill.fleet.ray.OPEN_WITHIN_S", 1.0)
    ray = RayBackend("127.0.0.1:1", log_fd=lambda: os.open(os.devnull, os.O_WRONLY))
    with pytest.raises(Unavailable, match=r"The Ray cluster at 127.0.0.1:1 cannot be joined"):
        await ray.open()


async def test_a_node_that_is_lost_ends_what_ran_there_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    cluster.nodes["south"] = cluster.add("south")
    (tmp_path / "south").mkdir()
    pid = tmp_path / "south" / "pid"
    script = f"echo $$ > {pid}; exec sleep 600"
    async with joined(cluster, tmp_path) as ray:
        lost, kept = await ray.start(
            [
                launch(tmp_path / "south", shell(script), devices=on("south"), orphan_grace_s=0.5),
                launch(tmp_path, shell("sleep 600"), devices=on("east")),
            ]
        )
        command = pid_in(pid)
        await asyncio.to_thread(cluster.lose, "south")
        async with asyncio.timeout(60):
            ended = await lost.wait()
        assert (ended.code, ended.why) == (None, "node lost")
        await asyncio.to_thread(wait_until, gone(command), 10.0)
        assert kept.pid is not None

        async def down() -> bool:
            return any(node.name == "south" and not node.up for node in await ray.nodes())

        async with asyncio.timeout(60):
            while not await down():
                await asyncio.sleep(0.2)
        with pytest.raises(CannotStart, match="the node 'south' is lost"):
            await ray.start([launch(tmp_path, shell("true"), devices=on("south"))])
        assert (await kept.stop(1.0)).why == "stopped"


async def test_a_replica_over_two_nodes_of_which_one_is_lost(cluster: Cluster, tmp_path: Path) -> None:
    cluster.nodes["south"] = cluster.add("south")
    ray = RayBackend(cluster.address, log_fd=lambda: os.open(tmp_path / "bridge.log", os.O_WRONLY | os.O_CREAT))
    spread = recipe(weights(tmp_path), devices=4, min_replicas=0)
    async with replica_set(tmp_path, spread, backend=ray) as found:
        await until(lambda: {node.name for node in found.nodes if node.devices} >= {"east", "south"})
        found.start("m", ["east/0", "east/1", "south/0", "south/1"])
        (replica,) = await ready(found)
        head, other = replica._processes.running
        assert (head.launch.node, other.launch.node) == ("east", "south")
        assert "'--node-rank': '1'" in (tmp_path / "engine-m-0.1.log").read_text()
        await asyncio.to_thread(cluster.lose, "south")
        await until(lambda: replica.phase is Phase.GONE, 60.0)
        assert (await head.wait()).code == -signal.SIGKILL
        assert (await other.wait()).code is None
        (again,) = await ray.start([launch(tmp_path, shell("exit 0"), devices=on("east", 0, 1))])
        assert (await again.wait()).code == 0, "the devices of the node that is left are free"


def test_devices_by_what_ray_knows_of_a_node() -> None:
    gpu = RayNode("a1", "10.0.0.1", "10.0.0.1", True, {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0})
    assert [device.kind for device in devices_of(gpu, "n1")] == ["h100"] * 8
    npu = RayNode("a2", "n", "10.0.0.2", True, {"CPU": 64.0, "NPU": 2.0}, {"tidemill.kind": "ascend-910b"})
    assert [(device.id, device.kind) for device in devices_of(npu, "n2")] == [
        ("n2/0", "ascend-910b"),
        ("n2/1", "ascend-910b"),
    ]
    head = RayNode("a3", "h", "10.0.0.3", True, {"memory": 1e9})
    assert devices_of(head, "h") == ()
    twins = [gpu, RayNode("b1b2b3b4", "10.0.0.1", "10.0.0.1", True, {})]
    assert unique_names(twins) == {"a1": "10.0.0.1-a1", "b1b2b3b4": "10.0.0.1-b1b2b3"}
