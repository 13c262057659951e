"""Devices of a machine: found by the vendors' own tools, or declared.

On a machine with none, the slots of its CPU.

Each tool's output is read by a pure function that is tested on recorded output (tests/fleet/test_devices.py). None of
them was run on such a device by us: where a figure looks wrong, declare the devices in `[nodes.local]`.
"""

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from tidemill.fleet.backend import Device

TOOL_WITHIN_S = 20.0
"""A tool that takes longer hangs with its driver; the machine then has no such devices for us."""
MIB = 2**20

log = structlog.get_logger()


class FoundDevice(NamedTuple):
    """What a tool tells of a device."""

    number: int
    name: str
    memory_bytes: int


class DeclaredDevices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[nodes.NAME.devices]]`: devices of one kind."""

    kind: str
    """A kind of the catalogue, or `cpu`."""
    count: int = 1
    memory_gib: float = 0.0
    """Of each; 0: what the catalogue says, of a CPU slot its share of the machine's memory."""


def read_nvidia(text: str) -> list[FoundDevice]:
    """`nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader,nounits`: memory in MiB.

    Raises ValueError for anything else.
    """
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    return [FoundDevice(int(index), name, _mib(memory)) for index, name, memory in rows]


def read_ascend(text: str) -> list[FoundDevice]:
    """Devices in the table of `npu-smi info`.

    It has two lines a chip, the first with its name, the second with its HBM in MB.

    A card may carry two chips (910C); what processes see counts the chips.
    """
    found: list[FoundDevice] = []
    name = ""
    for line in text.splitlines():
        cells = [cell.split() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3 or not cells[0] or not cells[0][0].isdigit():
            continue
        if re.match(r"[0-9a-fA-F]{4}:", "".join(cells[1][:1])):
            sizes = re.findall(r"(\d+)\s*/\s*(\d+)", line.split("|")[3])
            found.append(FoundDevice(len(found), f"Ascend {name}", int(sizes[-1][1]) * MIB if sizes else 0))
        elif len(cells[0]) >= 2:
            name = cells[0][1]
    return found


def read_rocm(text: str) -> list[FoundDevice]:
    """`rocm-smi --showproductname --showmeminfo vram --json`; Hygon's `hy-smi` is made after it.

    Raises ValueError for anything else.
    """
    start = text.find("{")  # both print warnings before it
    if start < 0:
        raise ValueError("there is no JSON")
    cards: dict[str, Any] = msgspec.json.decode(text[start:])
    found = []
    for card, fields in cards.items():
        number = re.fullmatch(r"card(\d+)", card)
        if number is None or not isinstance(fields, dict):
            continue
        name = next((str(value) for key, value in fields.items() if key.lower() == "card series"), "")
        inside = re.search(r"\[(.+)\]", name)  # `Navi 21 [Radeon RX 6800]`
        memory = 0
        for key, value in fields.items():
            unit = re.fullmatch(r"vram total memory \((b|mib)\)", key.lower())
            if unit is not None and str(value).strip().isdigit():
                memory = int(value) * (MIB if unit[1] == "mib" else 1)
        found.append(FoundDevice(int(number[1]), inside[1] if inside else name, memory))
    return sorted(found)


class _Tool(NamedTuple):
    command: tuple[str, ...]
    read: Callable[[str], list[FoundDevice]]
    limited_by: str
    """The variable with which an operator leaves this process only some of the devices."""


_ROCM = ("--showproductname", "--showmeminfo", "vram", "--json")
_TOOLS = (
    _Tool(
        ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"),
        read_nvidia,
        "CUDA_VISIBLE_DEVICES",
    ),
    _Tool(("npu-smi", "info"), read_ascend, "ASCEND_RT_VISIBLE_DEVICES"),
    _Tool(("hy-smi", *_ROCM), read_rocm, "HIP_VISIBLE_DEVICES"),
    _Tool(("rocm-smi", *_ROCM), read_rocm, "HIP_VISIBLE_DEVICES"),
)


def discover(node: str, kind_of: Callable[[str, int], str] | None = None) -> tuple[Device, ...]:
    """The devices of this machine.

    Accelerators where there are any, else the cores that this process may use.

    `kind_of` gives the kind of a device by its name and memory. Runs the vendors' tools; not for the event loop.
    """
    kind_of = kind_of or slug
    for tool in _TOOLS:
        program = shutil.which(tool.command[0])
        if program is None:
            continue
        found = _ask(program, tool)
        if found:
            return tuple(
                Device(f"{node}/{place}", node, each.number, kind_of(each.name, each.memory_bytes), each.memory_bytes)
                for place, each in enumerate(_allowed(found, os.environ.get(tool.limited_by)))
            )
    return cpu_slots(node)


def _ask(program: str, tool: _Tool) -> list[FoundDevice]:
    try:
        done = subprocess.run(
            [program, *tool.command[1:]], capture_output=True, text=True, errors="replace", timeout=TOOL_WITHIN_S
        )
        if done.returncode == 0:
            return tool.read(done.stdout)
        reason = (done.stderr or done.stdout).strip()[:200]
    except subprocess.TimeoutExpired:
        reason = f"it does not answer within {TOOL_WITHIN_S:g} s"
    except (OSError, ValueError, msgspec.DecodeError) as error:
        reason = str(error)
    log.warning("a tool that lists devices fails; there are none of its kind", tool=tool.command[0], reason=reason)
    return []


def _allowed(found: Sequence[FoundDevice], given: str | None) -> Sequence[FoundDevice]:
    """Those that the operator leaves to this process, when its environment names some by number."""
    words = [word.strip() for word in given.split(",")] if given else []
    if not words or not all(word.isdigit() for word in words):
        return found
    return [each for each in found if str(each.number) in words]


def cpu_slots(node: str, count: int | None = None, memory_bytes: int = 0, first: int = 0) -> tuple[Device, ...]:
    """Slots of this machine's CPU.

    One for each core that this process may use, or `count` that share them in turn.

    `memory_bytes` of each; 0: its share of the machine's memory.
    """
    cores = sorted(os.sched_getaffinity(0))
    number = len(cores) if count is None else count
    memory = memory_bytes or machine_memory() // max(number, 1)
    return tuple(
        Device(f"{node}/{first + index}", node, cores[index % len(cores)], "cpu", memory) for index in range(number)
    )


def declared(node: str, entries: Sequence[DeclaredDevices], memory_of: Mapping[str, int] = {}) -> tuple[Device, ...]:
    """Devices as the configuration declares them; `memory_of` a kind, in bytes, where it does not say."""
    devices: list[Device] = []
    numbers: dict[str, int] = {}
    for entry in entries:
        memory = int(entry.memory_gib * 2**30)
        if entry.kind == "cpu":
            devices += cpu_slots(node, entry.count, memory, first=len(devices))
            continue
        for _ in range(entry.count):
            index = numbers.get("accelerator", 0)
            numbers["accelerator"] = index + 1
            memory_bytes = memory or memory_of.get(entry.kind, 0)
            devices.append(Device(f"{node}/{len(devices)}", node, index, entry.kind, memory_bytes))
    return tuple(devices)


def slug(name: str, memory_bytes: int = 0) -> str:
    """A kind's name from what a tool calls a device: `NVIDIA GeForce RTX 4090` is `rtx-4090`."""
    words = re.findall(r"[a-z0-9]+(?:\.[0-9]+)?", name.lower())
    return "-".join(word for word in words if word not in _VENDORS) or "unknown"


_VENDORS = {"nvidia", "geforce", "tesla", "amd", "instinct", "radeon", "hygon", "corporation", "huawei"}


def machine_memory() -> int:
    """This machine's memory in bytes, within what its control group allows."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            total = min(total, int(Path(path).read_text()))
    return total


def _mib(text: str) -> int:
    """`81559`, in MiB; `[N/A]` on a device that shares the machine's memory."""
    return int(text) * MIB if text.isdigit() else 0
