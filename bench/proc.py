"""Processes as the benchmark sees them: processor time and memory of a whole tree, servers, ports.

Linux only: reads /proc and the processor-time clocks of other processes.
"""

import http.client
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

CPUCLOCK_SCHED = 2  # <linux/posix-timers.h>: time on a processor, in nanoseconds, all threads
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KIB_PER_PAGE = os.sysconf("SC_PAGE_SIZE") // 1024


class ProcessTime(NamedTuple):
    pid: int
    command: str
    cpu_us: float  # user and system time since the process began, with that of children it has reaped


class Memory(NamedTuple):
    """Of a process, or of a tree of them. Socket buffers in the kernel are in neither figure."""

    rss_kib: int
    pss_kib: int  # shared pages divided by their sharers; the honest sum over a tree


def tree(root: int) -> list[int]:
    """The process and all its descendants that live now, the root first."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat_fields(int(entry.name))
            if fields is not None:
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(parents.get(pid, []))
    return found


def cpu_times(root: int) -> list[ProcessTime]:
    """Processor time of each process of the tree. Two calls, subtracted by `cpu_between`, bound a span."""
    return [time_of for pid in tree(root) if (time_of := _cpu_time(pid)) is not None]


def cpu_between(before: Sequence[ProcessTime], after: Sequence[ProcessTime]) -> list[ProcessTime]:
    """What each process used. One that died in between is in its parent's figure."""
    began = {p.pid: p.cpu_us for p in before}
    return [ProcessTime(p.pid, p.command, p.cpu_us - began.get(p.pid, 0.0)) for p in after]


def memory(root: int) -> Memory:
    each = [memory_of(pid) for pid in tree(root)]
    return Memory(sum(one.rss_kib for one in each), sum(one.pss_kib for one in each))


def memory_of(pid: int) -> Memory:
    """Of one process; nothing of one that is gone."""
    try:
        rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * KIB_PER_PAGE
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return Memory(0, 0)
    return Memory(rss, sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")))


def command_of(pid: int) -> str:
    """The command line; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on: state, ppid, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _cpu_time(pid: int) -> ProcessTime | None:
    fields = _stat_fields(pid)
    if fields is None:
        return None
    reaped_us = (int(fields[13]) + int(fields[14])) / TICKS_PER_S * 1e6  # cutime, cstime
    try:
        own_us = time.clock_gettime_ns((~pid << 3) | CPUCLOCK_SCHED) / 1000
    except OSError:
        return None
    return ProcessTime(pid, command_of(pid), own_us + reaped_us)


class MachineTime(NamedTuple):
    """Processor seconds since some start, over all processors."""

    ours: float  # this process and the children it has waited for
    busy: float  # everybody
    stolen: float  # taken by the host for other machines
    wall: float

    def since(self, before: "MachineTime") -> "MachineTime":
        return MachineTime(*(mine - theirs for mine, theirs in zip(self, before, strict=True)))


def machine_time() -> MachineTime:
    """Read where all children have ended, else their time counts as somebody else's."""
    user, nice, system, _, _, irq, softirq, steal = (
        int(ticks) / TICKS_PER_S for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ours = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return MachineTime(ours, user + nice + system + irq + softirq, steal, time.perf_counter())


class Server:
    """A server process in a session of its own, its output in a log file. Stops with all it started."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        self.started_at = time.perf_counter()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def log_tail(self, characters: int = 1500) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def stop(self, patience_s: float = 8.0) -> None:
        """SIGTERM, then SIGKILL for whatever is left of it and of the processes below it."""
        below = [(pid, _start_tick(pid)) for pid in tree(self.pid)[1:]]
        if self.running():
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid, started in below:
            if started is not None and _start_tick(pid) == started:  # the same process, not a new one of its id
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.stop()


def _start_tick(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[19]) if fields is not None else None


def free_port() -> int:
    """A port that nobody listens on, below the range from which clients' ports are taken."""
    for port in random.sample(range(20_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 20000 and 32000")


def raise_open_files() -> int:
    """The limit of open files up to what is allowed; children inherit it. Returns the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def http_post(port: int, path: str, body: bytes, key: str = "", timeout_s: float = 5.0) -> tuple[int, bytes]:
    """One request on a connection of its own. Raises OSError or HTTPException when it doesn't get through."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def wait_answering(server: Server, port: int, path: str, body: bytes, key: Path | str, timeout_s: float) -> float:
    """Waits until a real request is answered with 200; returns seconds since the server was started.

    `key` may be a file that the server is still to write. Raises RuntimeError with the log's end.
    """
    last = "no key yet"
    while time.perf_counter() - server.started_at < timeout_s:
        if not server.running():
            raise RuntimeError(f"{server.command[0]} ended:\n{server.log_tail()}")
        try:
            text = key if isinstance(key, str) else key.read_text().strip()
            if text or isinstance(key, str):
                status, answer = http_post(port, path, body, text)
                if status == 200:
                    return time.perf_counter() - server.started_at
                last = f"status {status} {answer[:200].decode(errors='replace')}"
        except (OSError, http.client.HTTPException) as wrong:
            last = f"{type(wrong).__name__}: {wrong}"
        time.sleep(0.01)
    problem = f"{server.command[0]} not ready in {timeout_s:g} s ({last})"
    raise RuntimeError(f"{problem}:\n{server.log_tail()}")
