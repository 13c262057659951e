"""The idle class between sessions: what is started there leaves a contended core to whoever else wants it."""

import asyncio
import os
import sys
import time
from pathlib import Path

from tidemill.fleet.backend import Device, ProcessSpec
from tidemill.fleet.local import LocalBackend

SPIN = """
import pathlib, sys, time
here, other, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
here.touch()
while not other.exists():
    time.sleep(0.01)
began, end = time.process_time(), max(here.stat().st_mtime, other.stat().st_mtime) + seconds
while time.time() < end:
    pass
print(time.process_time() - began, flush=True)
"""
"""Two of them begin and end together."""


async def test_a_process_of_the_idle_class_gets_what_another_session_leaves(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    device = Device("local/0", "local", core, "cpu")
    backend = LocalBackend((device,), owner=f"test-{os.getpid()}-{time.monotonic_ns()}")
    await backend.open()
    try:
        launches = [
            ProcessSpec(
                name=name,
                argv=(sys.executable, "-c", SPIN, str(tmp_path / f"{name}.up"), str(tmp_path / f"{other}.up"), "3"),
                devices=(device,),
                log=tmp_path / name,
                idle_class=name == "idle",
            )
            for name, other in (("idle", "people"), ("people", "idle"))
        ]
        started = await backend.start(launches)
        await asyncio.gather(*(process.wait() for process in started))
        used = {name: float((tmp_path / name).read_text().split()[-1]) for name in ("idle", "people")}
        assert used["people"] > 5 * used["idle"], used
    finally:
        await backend.close()
