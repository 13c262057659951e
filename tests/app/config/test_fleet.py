"""What the configuration says of the fleet: what is taken, what it becomes, and how what is wrong is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tidemill.app.config.load import load_config
from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.fleet import Fleet, max_concurrent
from tidemill.app.nodes import find_devices
from tidemill.app.recipes import recipes_of
from tidemill.errors import ConfigError
from tidemill.fleet.backend import Device
from tidemill.fleet.recipe import Recipe, WeightsVersion
from tidemill.tides.state import Objective

CORES = len(os.sched_getaffinity(0))
LOCAL = '[models.l]\nengine = "llamacpp"\n'
VLLM = '[models.v]\nengine = "vllm"\n'
UPSTREAM = '[models.x]\nengine = "openai"\nbase_url = "http://x/v1"\n'


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "tidemill.toml"
    path.write_text(text)
    return load_config(path)


def recipe(tmp_path: Path, text: str) -> Recipe:
    (found,) = recipes_of(read(tmp_path, text), tmp_path).values()
    return found


def slots(count: int) -> tuple[Device, ...]:
    return tuple(Device(f"local/{index}", "local", index, "cpu") for index in range(count))


def line(recipe: Recipe, devices: int) -> dict[str, Any]:
    """What llama.cpp's child is told."""
    argv = recipe.command(recipe.version, slots(devices), None).argv
    found: dict[str, Any] = json.loads(argv[-1].replace("{port}", "1"))
    return found


def test_llama_cpp_without_a_word_has_all_cores(tmp_path: Path) -> None:
    plain = recipe(tmp_path, LOCAL)
    assert (plain.min_replicas, plain.max_replicas, plain.devices) == (1, 1, None)
    assert line(plain, 2)["threads"] == 0, "llama.cpp's own choice"
    assert line(recipe(tmp_path, LOCAL + "replicas = 2\n"), 1)["threads"] == 1
    assert line(recipe(tmp_path, LOCAL + "devices = 3\n"), 3)["threads"] == 3
    assert line(recipe(tmp_path, LOCAL + "devices = 3\nthreads = 2\n"), 3)["threads"] == 2
    assert "{port}" in plain.command(plain.version, (), None).argv[-1]


@pytest.mark.parametrize(
    ("keys", "bounds"),
    [
        ("", (1, 1)),
        ("replicas = 3", (3, 3)),
        ("min_replicas = 0", (0, 1)),
        ("max_replicas = 4", (1, 4)),
        ("min_replicas = 2\nmax_replicas = 4", (2, 4)),
        ("min_replicas = 5", (5, 5)),
        ("replicas = 2\nmin_replicas = 0", (0, 2)),
    ],
)
def test_how_many_replicas(tmp_path: Path, keys: str, bounds: tuple[int, int]) -> None:
    found = recipe(tmp_path, LOCAL + keys + "\n")
    assert (found.min_replicas, found.max_replicas) == bounds


def test_who_may_sleep_is_started_so(tmp_path: Path) -> None:
    found = recipe(tmp_path, VLLM + "sleepers = 1\n")
    command = found.command(found.version, (), None)
    assert "--enable-sleep-mode" in command.argv and command.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--enable-sleep-mode" not in recipe(tmp_path, VLLM).command(found.version, (), None).argv


def test_vllm_and_sglang_are_started_as_the_keys_say(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    text = (
        VLLM
        + 'path = "weights"\nversion = "2026-11"\nkinds = ["H800", "h20"]\ncontext = 32768\nmax_replicas = 4\n'
        + '[models.v.launch]\ntp = 4\npp = 2\nmax_sequences = 128\nkv_cache_dtype = "fp8_e4m3"\nmemory_share = 0.92\n'
        + 'extra_args = ["--enforce-eager"]\n[models.v.launch.env]\nNCCL_DEBUG = "WARN"\n'
    )
    found = recipe(tmp_path, text)
    assert (found.devices, found.kinds, found.version) == (
        8,
        ("h800-sxm", "h20"),
        WeightsVersion("2026-11", str(tmp_path / "weights")),
    )
    command = found.command(found.version, (), None)
    words = " ".join(command.argv)
    assert command.argv[:4] == ("vllm", "serve", str(tmp_path / "weights"), "--served-model-name")
    for part in (
        "--host {host} --port {port}",
        "--tensor-parallel-size 4",
        "--pipeline-parallel-size 2",
        "--max-model-len 32768",
        "--max-num-seqs 128",
        "--gpu-memory-utilization 0.92",
        "--scheduling-policy priority",
        "--enforce-eager",
    ):
        assert part in words
    assert command.env["NCCL_DEBUG"] == "WARN"
    spec = Fleet(read(tmp_path, text), tmp_path, DataDir(tmp_path / "d"), lambda: None).specs()[0]
    assert (spec.slots, spec.max_concurrent, spec.owned, spec.priority_scheduling) == (128, 128, True, True)
    hub = recipe(tmp_path, '[models.v]\nengine = "sglang"\npath = "Qwen/Qwen3-32B"\n[models.v.launch]\ndp = 2\n')
    assert (hub.devices, hub.version.path) == (2, "Qwen/Qwen3-32B")
    assert hub.command(hub.version, (), None).argv[:3] == ("python", "-m", "sglang.launch_server")
    named = recipe(tmp_path, '[models."deepseek-ai/DeepSeek-R1"]\nengine = "vllm"\n')
    assert named.version.path == "deepseek-ai/DeepSeek-R1" and named.devices == 1


def test_objectives_and_bounds_reach_the_gateways(tmp_path: Path) -> None:
    text = LOCAL + "min_replicas = 0\nwake_seconds = 9\n[models.l.objective]\nttft_seconds = 0.5\npercentile = 0.9\n"
    config = read(tmp_path, text + UPSTREAM)
    own, upstream = Fleet(config, tmp_path, DataDir(tmp_path / "data"), lambda: None).specs()
    assert own.objective == Objective(0.5, 0.1, 0.9)
    assert (own.wakes, own.wake_seconds, own.replicas) == (True, 9.0, ())
    assert (upstream.wakes, upstream.slots) == (False, None)
    model = config.models["l"]
    assert [max_concurrent(model, ready=ready) for ready in (0, 1, 3)] == [8, 8, 24]


def test_devices_are_declared_or_found(tmp_path: Path) -> None:
    assert [device.kind for device in find_devices(read(tmp_path, LOCAL))] == ["cpu"] * CORES
    text = '[nodes.local]\ndevices = [{ kind = "H800", count = 8 }, { kind = "cpu", count = 4, memory_gib = 2 }]\n'
    devices = find_devices(read(tmp_path, text))
    assert [device.kind for device in devices] == ["h800-sxm"] * 8 + ["cpu"] * 4
    assert devices[0].memory_bytes == 81559 * 2**20 and devices[-1].memory_bytes == 2 * 2**30
    for wrong, words in (
        ('[nodes.local]\ndevices = [{ kind = "h900" }]\n', ["nodes.local.devices", "h900", "Did you mean"]),
        (LOCAL + 'kinds = ["rtx-4900"]\n', ["models.l.kinds", "rtx-4900", "rtx-4090", "Found on this machine: cpu"]),
    ):
        with pytest.raises(ConfigError) as refused:
            find_devices(read(tmp_path, wrong))
        for word in words:
            assert word in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LOCAL + "devices = 0\n", ["models.l.devices must be from 1 to 4096, not 0"]),
        (LOCAL + "min_replicas = -1\n", ["models.l.min_replicas", "from 0 to 64"]),
        (LOCAL + "min_replicas = 3\nmax_replicas = 2\n", ["models.l.max_replicas must be from 3 to 64, not 2"]),
        (LOCAL + "min_replicas = 0\nmax_replicas = 0\n", ["models.l.max_replicas must be from 1 to 64, not 0"]),
        (LOCAL + "sleepers = 1\n", ["models.l.sleepers", "vllm and sglang"]),
        (VLLM + "sleepers = -1\n", ["models.v.sleepers", "from 0"]),
        (VLLM + 'sleepers = 1\n[fleet]\nbackend = "ray"\n', ["models.v.sleepers", "Ray keeps the devices"]),
        (LOCAL + 'filler = "below"\n', ["models.l.filler", "beside, inside"]),
        (LOCAL + "wake_seconds = 0\n", ["models.l.wake_seconds", "from 1 to 3600"]),
        (LOCAL + "scale_down_seconds = -1\n", ["models.l.scale_down_seconds"]),
        (LOCAL + "priority = 5000\n", ["models.l.priority"]),
        (LOCAL + "min_replica = 1\n", ["unknown key models.l.min_replica", "models.l.min_replicas?"]),
        (LOCAL + "[models.l.objective]\nttft = 1\n", ["models.l.objective.ttft", "Known keys: ttft_seconds"]),
        (LOCAL + "[models.l.objective]\nttft_seconds = 0\n", ["models.l.objective.ttft_seconds"]),
        (LOCAL + "[models.l.objective]\npercentile = 95\n", ["models.l.objective.percentile", "0.95"]),
        (LOCAL + "[models.l.launch]\ntp = 2\n", ["models.l.launch", "vllm and sglang"]),
        (UPSTREAM + "devices = 1\n", ["models.x.devices", 'not supported with engine = "openai"']),
        (UPSTREAM + "min_replicas = 0\n", ["models.x.min_replicas"]),
        (VLLM + 'base_url = "http://x"\n', ["models.v.base_url", 'not supported with engine = "vllm"']),
        (VLLM + "devices = 3\n[models.v.launch]\ntp = 2\n", ["models.v.devices is 3", "tp x pp x dp is 2"]),
        (VLLM + "[models.v.launch]\ntp = 0\n", ["models.v.launch.tp must be from 1"]),
        (VLLM + "[models.v.launch]\nmemory_share = 1.5\n", ["models.v.launch.memory_share"]),
        (VLLM + "[models.v.launch]\ntpp = 2\n", ["unknown key models.v.launch.tpp", "models.v.launch.tp?"]),
        (VLLM + '[models.v.launch]\ndtype = "float8"\n', ["models.v.launch.dtype", "auto, bfloat16, float16"]),
        ("[fleet]\nhealth_seconds = 1\n", ["fleet.health_seconds must be from 2 to 3600, not 1"]),
        ("[fleet]\nhealth = 1\n", ["unknown key fleet.health"]),
        ("[nodes.local]\ndevice = []\n", ["unknown key nodes.local.device", "nodes.local.devices?"]),
        ('[nodes.local]\ndevices = [{ kind = "cpu", counts = 1 }]\n', ["nodes.local.devices.counts"]),
        (
            '[nodes.local]\ndevices = [{ kind = "cpu", count = 0 }]\n',
            ["nodes.local.devices.count must be from 1"],
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    for word in words:
        assert word in str(refused.value), refused.value


def test_extra_arguments_say_nothing_twice(tmp_path: Path) -> None:
    config = read(tmp_path, VLLM + '[models.v.launch]\nextra_args = ["--tensor-parallel-size", "2"]\n')
    with pytest.raises(ConfigError, match=r"models\.v\.launch\.extra_args: --tensor-parallel-size is set by `tp`"):
        recipes_of(config, tmp_path)
