"""Processes of this machine, each behind a shim of its own (`fleet.shim`).

So none outlives what started it.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from tidemill.fleet import shim
from tidemill.fleet.backend import CannotStart, Device, Node, Process, ProcessEnd, ProcessSpec
from tidemill.fleet.device_visibility import visible_devices

NODE = "local"
HOST = "127.0.0.1"
_LOG_BYTES = 16 * 1024 * 1024
START_WITHIN_S = 30.0
"""A shim that has said nothing by then is given up; it needs 0.05 s."""
_CLOSE_GRACE_S = 3.0
MARK = "TIDEMILL_PROCESS"
"""The mark in the environment of everything that is started: `OWNER:TOKEN`, by which strays are found again."""
SHIM = (sys.executable, "-I", "-S", str(Path(shim.__file__)))
SWEPT_WITHIN_S = 5.0
_SHIM_ENV = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
IDLE_OOM_SCORE = 800

log = structlog.get_logger()


class _Word(msgspec.Struct):
    """What a shim says."""

    say: str
    pid: int = 0
    port: int | None = None
    at: float = 0.0
    code: int | None = None
    why: str = ""


_decode_word = msgspec.json.Decoder(_Word).decode


class LocalProcess:
    """See `fleet.backend.Process`."""

    host = HOST

    def __init__(self, launch: ProcessSpec, child: asyncio.subprocess.Process, mark: str) -> None:
        self._launch = launch
        self._child = child
        self._mark = mark
        self._pid: int | None = None
        self._port: int | None = None
        self._started_at = time.time()
        self._ended: asyncio.Future[ProcessEnd] = asyncio.get_running_loop().create_future()
        self._watch: asyncio.Task[None] | None = None

    @property
    def launch(self) -> ProcessSpec:
        return self._launch

    @property
    def pid(self) -> int | None:
        """The command's; None once it has ended."""
        return None if self._ended.done() else self._pid

    @property
    def port(self) -> int | None:
        return self._port

    @property
    def started_at(self) -> float:
        return self._started_at

    async def begin(self, order: Mapping[str, Any]) -> None:
        """Have the shim start the command. Raises CannotStart."""
        self._tell(msgspec.json.encode(order))
        try:
            async with asyncio.timeout(START_WITHIN_S):
                word = await self._hear()
        except TimeoutError:
            word = None
        except asyncio.CancelledError:
            self._give_up()
            raise
        if word is None or word.say != "started":
            why = word.why if word is not None and word.say == "cannot" else "its shim does not answer"
            self._give_up()
            await self._child.wait()
            raise CannotStart(f"{self._launch.name} cannot be started: {why}.")
        self._pid, self._port, self._started_at = word.pid, word.port, word.at
        self._watch = asyncio.create_task(self._watch_end())

    async def wait(self) -> ProcessEnd:
        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float, signal: str | None = None) -> ProcessEnd:
        self._tell(f"stop {signal or self._launch.stop_signal} {max(grace_s, 0.0)!r}".encode())
        return await self.wait()

    def kill(self) -> None:
        self._tell(b"kill")

    async def _hear(self) -> _Word | None:
        assert self._child.stdout is not None
        while line := await self._child.stdout.readline():
            with contextlib.suppress(msgspec.DecodeError):
                return _decode_word(line)
        return None

    def _tell(self, line: bytes) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self._child.stdin.write(line + b"\n")

    async def _watch_end(self) -> None:
        word = await self._hear()
        await self._child.wait()
        if word is not None and word.say == "ended":
            ended = ProcessEnd(word.code, word.at, word.why)
        else:  # the shim itself was killed, and the kernel has killed the command with it
            ended = ProcessEnd(-signal.SIGKILL, time.time(), "killed")
            await asyncio.to_thread(sweep, lambda mark: mark == self._mark)
            if self._launch.end_file is not None:
                with contextlib.suppress(OSError):
                    shim.write_whole(str(self._launch.end_file), msgspec.json.encode(ended))
        self._close_pipe()
        self._ended.set_result(ended)

    def _give_up(self) -> None:
        self._close_pipe()
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()
        self._ended.set_result(ProcessEnd(None, time.time(), "not started"))

    def _close_pipe(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self._child.stdin.close()


class LocalBackend:
    """See `fleet.backend.Backend`."""

    kind = "local"

    def __init__(
        self, devices: Sequence[Device], *, owner: str, secret: Collection[str] = (), log_bytes: int = _LOG_BYTES
    ) -> None:
        """`owner` tells this platform's processes from another's on the machine.

        It stays the same over restarts; `secret` are variables of this process's environment that no command gets to
        see.
        """
        self.devices = tuple(devices)
        self._owner = owner
        self._secret = frozenset(secret)
        self._log_bytes = log_bytes
        self._processes: set[LocalProcess] = set()
        self._kept: set[asyncio.Task[None]] = set()
        self._orphans: dict[int, frozenset[str]] = {}
        """Commands of an earlier process of this platform whose shims are still ending them, and their devices."""

    async def open(self) -> None:
        """Kill what an earlier process of this platform has left behind without a shim."""
        self._orphans = await asyncio.to_thread(orphans, self._owner)
        shims = frozenset(self._orphans)
        strays = await asyncio.to_thread(sweep, lambda mark: mark.rpartition(":")[0] == self._owner, shims)
        if strays:
            log.warning("processes of an earlier run were left behind; they are killed", count=strays)

    async def nodes(self) -> Sequence[Node]:
        return (Node(NODE, HOST, self.devices),)

    async def start(self, launches: Sequence[ProcessSpec]) -> Sequence[Process]:
        """Start all of them or none. Raises CannotStart."""
        for launch in launches:
            self._check(launch)
        await self._wait_for_orphans({device.id for launch in launches for device in launch.devices})
        outcomes = await asyncio.gather(*(self._start(launch) for launch in launches), return_exceptions=True)
        failed = [each for each in outcomes if isinstance(each, BaseException)]
        started = [each for each in outcomes if not isinstance(each, BaseException)]
        if failed:
            for process in started:
                process.kill()
            await asyncio.gather(*(process.wait() for process in started))
            raise failed[0]
        return started

    async def close(self) -> None:
        """End everything that was started."""
        await asyncio.gather(*(process.stop(_CLOSE_GRACE_S) for process in list(self._processes)))

    def _check(self, launch: ProcessSpec) -> None:
        wrong = {device.node for device in launch.devices} - {NODE}
        if launch.node not in ("", NODE) or wrong:
            where = launch.node or min(wrong)
            raise CannotStart(f"{launch.name} cannot be started: there is no node {where!r} here.")

    async def _start(self, launch: ProcessSpec) -> LocalProcess:
        token = secrets.token_hex(8)
        mark = f"{self._owner}:{token}"
        devices = ",".join(device.id for device in launch.devices)
        try:
            child = await asyncio.create_subprocess_exec(
                *SHIM,
                mark,
                launch.name,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                # Seen in the list of processes and by `orphans`; the command's own environment is in the order.
                env={**_SHIM_ENV, "TIDEMILL_SHIM": mark, "TIDEMILL_DEVICES": devices},
            )
        except OSError as error:
            raise CannotStart(f"{launch.name} cannot be started: {error.strerror}.") from error
        process = LocalProcess(launch, child, mark)
        await process.begin(self._order(launch, mark, devices))
        self._processes.add(process)
        kept = asyncio.create_task(self._forget(process))
        self._kept.add(kept)
        kept.add_done_callback(self._kept.discard)
        return process

    async def _forget(self, process: LocalProcess) -> None:
        await process.wait()
        self._processes.discard(process)

    def _order(self, launch: ProcessSpec, mark: str, devices: str) -> dict[str, Any]:
        inherited = {name: value for name, value in os.environ.items() if not self._is_secret(name)}
        visible = visible_devices(launch.devices)
        cores = sorted({device.index for device in launch.devices if device.kind == "cpu"})
        return {
            "argv": launch.argv,
            "env": {**inherited, **visible, "TIDEMILL_DEVICES": devices, **launch.env, MARK: mark},
            "cwd": str(launch.cwd) if launch.cwd is not None else None,
            "log": str(launch.log) if launch.log is not None else None,
            "log_bytes": self._log_bytes,
            "host": HOST,
            "cores": cores,
            "idle": launch.idle_class,
            "oom_score_adj": max(launch.oom_score_adj, IDLE_OOM_SCORE if launch.idle_class else 0),
            "end_file": str(launch.end_file) if launch.end_file is not None else None,
            "stop_signal": launch.stop_signal,
            "orphan_grace_s": launch.orphan_grace_s,
        }

    def _is_secret(self, name: str) -> bool:
        return name in self._secret or name.startswith("TIDEMILL_")

    async def _wait_for_orphans(self, devices: set[str]) -> None:
        """Until what an earlier process ran on these devices has gone.

        Two on one device would not fit its memory.
        """
        while True:
            self._orphans = {pid: held for pid, held in self._orphans.items() if alive(pid)}
            if not any(held & devices for held in self._orphans.values()):
                return
            await asyncio.sleep(0.05)


def orphans(owner: str) -> dict[int, frozenset[str]]:
    """The shims of an earlier process of this platform, by process id, and the devices that they hold."""
    found = {}
    for pid, environment in _environments():
        mark = environment.get(b"TIDEMILL_SHIM", b"").decode(errors="replace")
        if mark.rpartition(":")[0] == owner:
            found[pid] = frozenset(environment.get(b"TIDEMILL_DEVICES", b"").decode(errors="replace").split(","))
    return found


def sweep(of_mark: Callable[[str], bool], spared: Collection[int] = ()) -> int:
    """Kill the processes with such a mark, but not what descends from the `spared`, and see them gone.

    Gives how many there were.
    """
    killed: set[int] = set()
    while True:
        marked = [
            pid
            for pid, environment in _environments()
            if MARK.encode() in environment and of_mark(environment[MARK.encode()].decode(errors="replace"))
        ]
        looked_after = {pid for each in spared for pid in shim.descendants(each)}  # after that: they may be forking
        strays = set(marked) - looked_after
        if not strays - killed:
            break
        for pid in strays:
            shim.send(pid, signal.SIGKILL)
        killed |= strays
    until = time.monotonic() + SWEPT_WITHIN_S
    while any(alive(pid) for pid in killed) and time.monotonic() < until:
        time.sleep(0.01)
    return len(killed)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return False


def _environments() -> list[tuple[int, dict[bytes, bytes]]]:
    """The processes of this user and what they were started with."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{entry.name}/environ").read_bytes().split(b"\0")
                found.append((int(entry.name), dict(word.partition(b"=")[::2] for word in words if b"=" in word)))
    return found
