"""Real commands for the tests of backends: small shell and Python scripts, and looks at what is left of them."""

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.platform import wait_until
from tidemill.fleet.backend import Device, ProcessSpec
from tidemill.fleet.local import LocalBackend, alive

CORES = sorted(os.sched_getaffinity(0))


def python(*lines: str) -> tuple[str, ...]:
    return (sys.executable, "-c", "\n".join(("import os, signal, subprocess, sys, time", *lines)))


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


def launch(path: Path, argv: tuple[str, ...], /, **changes: Any) -> ProcessSpec:
    return ProcessSpec(
        **{"name": "test/0", "argv": argv, "log": path / "log", "end_file": path / "end.json", **changes}
    )


def slot(index: int = 0) -> Device:
    """A CPU slot of this machine."""
    return Device(f"local/{index}", "local", CORES[index % len(CORES)], "cpu")


@asynccontextmanager
async def backend(owner: str, **options: Any) -> AsyncIterator[LocalBackend]:
    local = LocalBackend([slot()], owner=owner, **options)
    await local.open()
    try:
        yield local
    finally:
        await local.close()


def said(path: Path, word: str) -> Callable[[], bool]:
    """Whether the log has that word."""
    return lambda: (path / "log").exists() and word in (path / "log").read_text()


def pid_in(path: Path) -> int:
    """The process id that a script has written to a file."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def gone(*pids: int) -> Callable[[], bool]:
    return lambda: not any(alive(pid) for pid in pids)
