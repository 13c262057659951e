"""The local backend with real processes: how they are started, what ends them, and that nothing is left of them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import pytest

from tests.fleet.processes import CORES, backend, gone, launch, pid_in, python, said, shell, slot
from tests.support.platform import wait_until
from tidemill.fleet.backend import CannotStart, ProcessEnd, ProcessSpec
from tidemill.fleet.local import orphans


def end_of(path: Path) -> ProcessEnd:
    return msgspec.json.decode((path / "end.json").read_bytes(), type=ProcessEnd)


async def test_a_command_runs_and_its_end_is_written_down(tmp_path: Path) -> None:
    async with backend("t1") as local:
        before = time.time()
        (process,) = await local.start([launch(tmp_path, shell("echo out; echo err >&2; exit 3"))])
        ended = await process.wait()
        assert (ended.code, ended.why) == (3, "exited") and ended.at >= before
        assert end_of(tmp_path) == ended == await process.wait() == await process.stop(1.0)
        assert (tmp_path / "log").read_text() == "out\nerr\n"
        assert process.pid is None
        process.kill()  # at any time, also now


async def test_what_it_finds_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", "y")
    monkeypatch.setenv("KEPT", "z")
    show = python(
        "print(*[os.environ.get(n) for n in ('A_SECRET', 'TIDEMILL_ADMIN_TOKEN', 'KEPT', 'MINE')])",
        "print(os.environ['TIDEMILL_DEVICES'], repr(os.environ['CUDA_VISIBLE_DEVICES']))",
        "print(os.getcwd(), os.sched_getaffinity(0), os.sched_getscheduler(0) == os.SCHED_IDLE)",
        "print(open('/proc/self/oom_score_adj').read().strip(), repr(sys.stdin.read()), os.getsid(0) == os.getpid())",
        "print(sys.argv[1:])",
    )
    work = tmp_path / "work"
    work.mkdir()
    asked = launch(
        tmp_path,
        (*show, '{"at": "{host}:{port}"}', "{port}"),
        env={"MINE": "m"},
        devices=(slot(),),
        cwd=work,
        idle_class=True,
    )
    async with backend("t2", secret=["A_SECRET"]) as local:
        (process,) = await local.start([asked])
        assert (await process.wait()).code == 0
    port = process.port
    assert port is not None and process.host == "127.0.0.1"
    assert (tmp_path / "log").read_text().splitlines() == [
        "None None z m",
        "local/0 ''",
        f"{work} {{{CORES[0]}}} True",
        "800 '' True",
        f"""['{{"at": "127.0.0.1:{port}"}}', '{port}']""",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"argv": ("no-such-program", "x")}, "no program 'no-such-program'"),
        ({"argv": ("./here.sh",)}, "no program './here.sh'"),
        ({"argv": ()}, "no command"),
        ({"cwd": Path("/no/such/place")}, "no directory /no/such/place"),
        ({"log": Path("/no/such/place/log")}, "/no/such/place/log cannot be written: No such file"),
        ({"node": "far"}, "no node 'far'"),
        ({"devices": (msgspec.structs.replace(slot(), index=9_999),)}, "cores 9999"),
    ],
)
async def test_what_cannot_be_started_says_why(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    async with backend("t3") as local:
        with pytest.raises(CannotStart) as refused:
            await local.start([msgspec.structs.replace(launch(tmp_path, shell("true")), **changes)])
        assert words in str(refused.value) and "test/0" in str(refused.value)
        assert orphans("t3") == {}


async def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(b"\x7fELFnonsense")
    (tmp_path / "broken").chmod(0o755)
    async with backend("t4") as local:
        with pytest.raises(CannotStart, match=r"cannot be started: Exec format error"):
            await local.start([launch(tmp_path, ("./broken",), cwd=tmp_path)])


async def test_a_gang_starts_together_or_not_at_all(tmp_path: Path) -> None:
    async with backend("t5") as local:
        mark = tmp_path / "pid"
        well = launch(tmp_path, shell(f"echo $$ > {mark}; exec sleep 1000"))
        with pytest.raises(CannotStart):
            await local.start([well, launch(tmp_path, ("no-such-program",))])
        if mark.exists() and mark.read_text():  # it may have been ended before it wrote
            assert gone(int(mark.read_text()))()
        both = await local.start([well, launch(tmp_path, shell("exec sleep 1000"), name="test/1")])
        assert len({process.pid for process in both}) == 2


async def test_one_that_heeds_the_signal_ends_in_its_own_way(tmp_path: Path) -> None:
    script = python(
        "def saved(*_): print('saved'); sys.exit(7)",
        "signal.signal(signal.SIGUSR1, saved)",
        "print('up', flush=True)",
        "while True: time.sleep(1)",
    )
    async with backend("t6") as local:
        (process,) = await local.start([launch(tmp_path, script, stop_signal="USR1")])
        await asyncio.to_thread(wait_until, said(tmp_path, "up"))
        ended = await process.stop(30.0)
        assert (ended.code, ended.why) == (7, "stopped")
        assert said(tmp_path, "saved")()


async def test_one_that_ignores_the_signal_is_killed_after_its_grace(tmp_path: Path) -> None:
    script = python("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('up', flush=True)", "time.sleep(1000)")
    async with backend("t7") as local:
        (process,) = await local.start([launch(tmp_path, script)])
        await asyncio.to_thread(wait_until, said(tmp_path, "up"))
        began = time.monotonic()
        first = asyncio.create_task(process.stop(0.5))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(process.stop(1000.0), 60)  # the first deadline counts
        assert time.monotonic() - began >= 0.5
        ended = await first
        assert (ended.code, ended.why) == (-signal.SIGKILL, "killed")


async def test_one_that_is_suspended_hears_of_its_end_too(tmp_path: Path) -> None:
    script = "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done"
    async with backend("t8") as local:
        (process,) = await local.start([launch(tmp_path, shell(script))])
        await asyncio.to_thread(wait_until, said(tmp_path, "up"))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        ended = await asyncio.wait_for(process.stop(600.0), 60)
        assert (ended.code, ended.why) == (9, "stopped")


async def test_the_first_process_may_end_before_the_one_that_saves(tmp_path: Path) -> None:
    """A shell dies of the signal at once; the training below it gets its grace to write a checkpoint."""
    inner = "import signal,sys,time\ndef f(*_):\n time.sleep(0.7); print('saved', flush=True); sys.exit(0)\n"
    inner += "signal.signal(signal.SIGTERM, f); print('up', flush=True)\nwhile True: time.sleep(1)"
    (tmp_path / "inner.py").write_text(inner)
    async with backend("t9") as local:
        (process,) = await local.start([launch(tmp_path, shell(f"{sys.executable} {tmp_path}/inner.py; true"))])
        await asyncio.to_thread(wait_until, said(tmp_path, "up"))
        assert (await process.stop(30.0)).why == "stopped"
        assert said(tmp_path, "saved")()


async def test_what_left_its_group_goes_with_it(tmp_path: Path) -> None:
    """A daemon in a session of its own, that ignores signals, is killed: after a stop, a kill, and a natural end."""
    daemon = f"trap '' TERM HUP; echo \\$\\$ > {tmp_path}/daemon; sleep 1000"
    for end in ("stop", "kill", "exit"):
        (tmp_path / "daemon").unlink(missing_ok=True)
        rest = "exit 5" if end == "exit" else "sleep 1000"
        script = f'setsid sh -c "{daemon}" & while ! [ -s {tmp_path}/daemon ]; do sleep 0.02; done; {rest}'
        async with backend("t10") as local:
            (process,) = await local.start([launch(tmp_path, shell(script))])
            pid = await asyncio.to_thread(pid_in, tmp_path / "daemon")
            if end == "stop":
                await process.stop(0.3)
            elif end == "kill":
                process.kill()
            ended = await process.wait()
            assert gone(pid)(), end
            assert (ended.code, ended.why) == {
                "stop": (-signal.SIGTERM, "stopped"),
                "kill": (-signal.SIGKILL, "killed"),
                "exit": (5, "exited"),
            }[end]


async def test_the_shim_is_killed(tmp_path: Path) -> None:
    """Then the command goes as well, and what it has started, and its end is known."""
    script = f"setsid sleep 1000 & echo $! > {tmp_path}/daemon; sleep 1000"
    async with backend("t11") as local:
        (process,) = await local.start([launch(tmp_path, shell(script))])
        pid = process.pid
        daemon = await asyncio.to_thread(pid_in, tmp_path / "daemon")
        (shim,) = orphans("t11")
        os.kill(shim, signal.SIGKILL)
        ended = await process.wait()
        assert (ended.code, ended.why) == (-signal.SIGKILL, "killed") == (end_of(tmp_path).code, end_of(tmp_path).why)
        assert pid is not None
        await asyncio.to_thread(wait_until, gone(pid, daemon))


async def test_the_log_is_bounded_and_goes_on(tmp_path: Path) -> None:
    script = python(
        "for i in range(40):",
        "    print(str(i) * 500, flush=True)",
        "    time.sleep(0.1)",
    )
    async with backend("t12", log_bytes=8_000) as local:
        (process,) = await local.start([launch(tmp_path, script)])
        await process.wait()
        (process,) = await local.start([launch(tmp_path, shell("echo again"))])
        await process.wait()
    kept, before = (tmp_path / "log").read_text(), (tmp_path / "log.1").read_text()
    assert (before + kept).endswith("39" * 500 + "\nagain\n"), "appended, by the next one too"
    assert "\0" not in kept, "without a hole where it was cut"
    assert len(kept) < 30_000 and 8_000 < len(before) < 30_000


PARENT = """
import asyncio, sys
from pathlib import Path
import msgspec
from tidemill.fleet.backend import ProcessSpec
from tidemill.fleet.local import LocalBackend

async def main():
    backend = LocalBackend([], owner=sys.argv[1])
    path = lambda kind, text: kind(text)
    await backend.start([msgspec.json.decode(each, type=ProcessSpec, dec_hook=path) for each in sys.argv[2:]])
    print("started", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def parent_of(owner: str, *launches: ProcessSpec) -> "subprocess.Popen[str]":
    """A process that runs a backend and starts these."""
    orders = [msgspec.json.encode(each, enc_hook=str).decode() for each in launches]
    command = [sys.executable, "-c", textwrap.dedent(PARENT), owner, *orders]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def test_the_platform_is_killed(tmp_path: Path) -> None:
    """What heeds the signal may save within the grace for orphans; nothing outlives it."""
    (tmp_path / "stubborn").mkdir()
    good = launch(
        tmp_path, shell(f"trap 'echo saved; exit 4' TERM; echo $$ > {tmp_path}/good; while :; do sleep 0.05; done")
    )
    bad = launch(
        tmp_path / "stubborn",
        shell(f"trap '' TERM; setsid sleep 1000 & echo $$ > {tmp_path}/bad; while :; do sleep 0.05; done"),
        orphan_grace_s=1.0,
    )
    parent = parent_of("t13", good, bad)
    pids = [pid_in(tmp_path / name) for name in ("good", "bad")]
    parent.kill()
    parent.wait()
    wait_until(gone(pids[0]), 5.0)
    wait_until(lambda: not orphans("t13"), 10.0)
    assert gone(*pids)()
    assert said(tmp_path, "saved")()
    assert json.loads((tmp_path / "end.json").read_text())["code"] == 4
    assert json.loads((tmp_path / "stubborn/end.json").read_text())["why"] == "killed"


async def test_the_next_life_waits_for_the_devices_and_sweeps_up(tmp_path: Path) -> None:
    """An orphan that still saves keeps its devices; what has lost its shim is killed at once."""
    saving = launch(
        tmp_path,
        shell(f"trap '' TERM; echo $$ > {tmp_path}/saving; while :; do sleep 0.05; done"),
        devices=(slot(),),
        orphan_grace_s=1.5,
    )
    stray = launch(tmp_path, shell(f"setsid sleep 1000 & echo $! > {tmp_path}/stray; sleep 1000"), name="stray")
    parent = parent_of("t14", saving, stray)
    saver, daemon = (pid_in(tmp_path / name) for name in ("saving", "stray"))
    shims = orphans("t14")
    parent.kill()
    parent.wait()
    for pid, devices in shims.items():
        if "local/0" not in devices:
            os.kill(pid, signal.SIGKILL)
    async with backend("t14") as local:
        assert gone(daemon)() and not gone(saver)()
        (process,) = await local.start([launch(tmp_path, ("true",), devices=(slot(),))])
        assert gone(saver)()
        await process.wait()


async def test_closing_ends_everything(tmp_path: Path) -> None:
    async with backend("t15") as local:
        processes = await local.start([launch(tmp_path, ("sleep", "1000"), name=f"s/{i}") for i in range(3)])
        pids = [process.pid or 0 for process in processes]
    assert gone(*pids)() and orphans("t15") == {}
