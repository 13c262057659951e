"""Devices: what the vendors' tools print is read as it is, and what is declared is taken."""

import os
from pathlib import Path

import pytest

from tidemill.fleet.device_kinds import kind_of
from tidemill.fleet.device_visibility import visible_devices
from tidemill.fleet.devices import (
    DeclaredDevices,
    FoundDevice,
    cpu_slots,
    declared,
    discover,
    read_ascend,
    read_nvidia,
    read_rocm,
    slug,
)

GIB = 2**30

NVIDIA = """0, NVIDIA H800, 81559
1, NVIDIA H800, 81559
2, NVIDIA GB10, [N/A]
"""

# npu-smi 25.2.0, from Project-HAMi/HAMi-WebUI issue 47.
ASCEND = """+------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4-1             | OK            | 91.3        33                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3197 / 65536         |
+===========================+===============+====================================================+
| 1     910B4-1             | OK            | 88.1        32                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3197 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
"""
# A 910C carries two chips; the form of its lines as the one above, the names as CANN prints them.
ASCEND_TWO_CHIPS = """| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     Ascend910           | OK            | 158.3       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3117 / 65536         |
+------------------------------------------------------------------------------------------------+
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2885 / 65536         |
+===========================+===============+====================================================+
"""

# rocm-smi, from marimo-team/marimo issue 9237; the second card from mudler/LocalAI pull request 7761.
ROCM = """WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status
{
  "card1": {
    "VRAM Total Memory (B)": "17163091968",
    "VRAM Total Used Memory (B)": "692142080",
    "Card Series": "Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]"
  },
  "card0": {
    "GPU use (%)": "0",
    "VRAM Total Memory (B)": "21458059264",
    "VRAM Total Used Memory (B)": "27856896",
    "Card Series": "Radeon RX 7900 XT",
    "Card Model": "0x744c"
  },
  "system": {"Driver version": "6.1"}
}
"""


def test_nvidia() -> None:
    assert read_nvidia(NVIDIA) == [
        FoundDevice(0, "NVIDIA H800", 81559 * 2**20),
        FoundDevice(1, "NVIDIA H800", 81559 * 2**20),
        FoundDevice(2, "NVIDIA GB10", 0),
    ]
    assert read_nvidia("") == []
    with pytest.raises(ValueError):
        read_nvidia("No devices were found\n")


def test_ascend() -> None:
    assert read_ascend(ASCEND) == [FoundDevice(index, "Ascend 910B4-1", 64 * GIB) for index in (0, 1)]
    assert read_ascend(ASCEND_TWO_CHIPS) == [FoundDevice(index, "Ascend Ascend910", 64 * GIB) for index in (0, 1)]
    assert read_ascend("dcmi module initialize failed. ret is -8005\n") == []


def test_rocm_and_hygon() -> None:
    assert read_rocm(ROCM) == [
        FoundDevice(0, "Radeon RX 7900 XT", 21458059264),
        FoundDevice(1, "Radeon RX 6800/6800 XT / 6900 XT", 17163091968),
    ]
    hygon = '{"card0": {"Card Series": "K100_AI", "vram Total Memory (MiB)": "65520"}}'
    assert read_rocm(hygon) == [FoundDevice(0, "K100_AI", 65520 * 2**20)]
    for text in ("", "Driver not initialized", "{"):
        with pytest.raises(ValueError):
            read_rocm(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H800", "h800"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("Ascend 910B4-1", "ascend-910b4-1"),
        ("AMD Instinct MI300X", "mi300x"),
        ("***", "unknown"),
    ],
)
def test_kinds_are_named_after_devices(name: str, kind: str) -> None:
    assert slug(name) == kind


def tool(path: Path, name: str, script: str) -> None:
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


def test_tools_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool of each vendor that is there, until one knows devices."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    cores = len(os.sched_getaffinity(0))
    assert [device.kind for device in discover("local")] == ["cpu"] * cores
    tool(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed' >&2; exit 9")
    assert [device.kind for device in discover("local")] == ["cpu"] * cores
    (tmp_path / "table").write_text(ASCEND)
    tool(tmp_path, "npu-smi", f'[ "$1" = info ] && cat {tmp_path}/table')
    devices = discover("n", lambda name, memory: f"{name}:{memory // GIB}")
    assert [(d.id, d.node, d.index, d.kind, d.memory_bytes) for d in devices] == [
        ("n/0", "n", 0, "Ascend 910B4-1:64", 64 * GIB),
        ("n/1", "n", 1, "Ascend 910B4-1:64", 64 * GIB),
    ]
    assert visible_devices(discover("n")) == {"ASCEND_RT_VISIBLE_DEVICES": "0,1"}
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    (left,) = discover("n")
    assert (left.id, left.index) == ("n/0", 1)
    tool(tmp_path, "nvidia-smi", "printf '0, NVIDIA H20, 97871\\n'")
    assert [device.kind for device in discover("n")] == ["h20"]


def test_declared() -> None:
    cores = sorted(os.sched_getaffinity(0))
    devices = declared(
        "n",
        [DeclaredDevices("h800-sxm", 2), DeclaredDevices("l40s", 1, memory_gib=48), DeclaredDevices("cpu", 3)],
        {"h800-sxm": 80 * GIB},
    )
    assert [(d.id, d.index, d.kind) for d in devices] == [
        ("n/0", 0, "h800-sxm"),
        ("n/1", 1, "h800-sxm"),
        ("n/2", 2, "l40s"),
        *((f"n/{3 + i}", cores[i % len(cores)], "cpu") for i in range(3)),
    ]
    assert [d.memory_bytes for d in devices[:3]] == [80 * GIB, 80 * GIB, 48 * GIB]
    assert devices[3].memory_bytes * 3 <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_a_process_sees() -> None:
    slots = cpu_slots("n")
    gpus = declared("n", [DeclaredDevices("h20", 8)])
    assert visible_devices([]) == {}
    assert visible_devices(slots) == {"CUDA_VISIBLE_DEVICES": ""}
    assert visible_devices([gpus[5], gpus[2], *slots]) == {"CUDA_VISIBLE_DEVICES": "5,2"}


@pytest.mark.parametrize(
    ("name", "mib", "kind"),
    [
        ("NVIDIA H800", 81559, "h800-sxm"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-sxm-40"),
        ("NVIDIA A100-SXM4-80GB", 81920, "a100-sxm-80"),
        ("NVIDIA H20", 97871, "h20"),
        ("NVIDIA H200", 143771, "h200-sxm"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090"),
        ("NVIDIA L40", 46068, "l40"),
        ("Ascend 910B4-1", 65536, "ascend-910b"),
        ("K100_AI", 65520, "hygon-k100-ai"),
        ("Tesla T4", 15360, "t4"),
    ],
)
def test_the_catalogue_knows_what_tools_call_a_device(name: str, mib: int, kind: str) -> None:
    assert kind_of(name, mib * 2**20) == kind
