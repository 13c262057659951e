"""The shim: a small process that starts, watches and ends a command for the platform.

    python shim.py < {"argv": ["/usr/bin/env"], ...}

The first line of its standard input is an `Order` in JSON (see `ORDER` below); then come lines `stop SIGNAL GRACE_S`
and `kill`. The end of standard input means that the platform has died: the command is then stopped as well, within
the order's grace for orphans. It says on standard output, a JSON object a line, that the command was started, that it
cannot be, and how it ended; the end is also written to the end file, so that it is known after the platform has died.

Everything that the command has started is ended with it, also what has left its process group: the shim is the
subreaper of its descendants (prctl(2), PR_SET_CHILD_SUBREAPER). When the shim itself is killed, the kernel kills the
command (PR_SET_PDEATHSIG), and `fleet.local` sweeps up the rest by the mark in its environment.

Only the standard library, and little of it: there is one shim for each replica and job, 10 MB and 40 ms.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

ORDER: dict[str, Any] = {
    "argv": [],
    "env": {},  # the whole environment
    "cwd": None,
    "log": None,  # standard output and error go there; nowhere without it
    "log_bytes": 16 * 1024 * 1024,  # then the file is moved to `.1`, and begun anew
    "host": "127.0.0.1",  # what {host} becomes; {port} becomes one that is free there
    "cores": [],  # pinned to them
    "idle": False,  # SCHED_IDLE
    "oom_score_adj": 100,
    "end_file": None,
    "stop_signal": "TERM",
    "orphan_grace_s": 5.0,
}
"""The keys of an order, and what they are when it leaves them out."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LEFTOVER_GRACE_S = 2.0
"""What processes get that the command has left behind at its own end."""
GIVE_UP_AFTER_S = 15.0
"""A process that SIGKILL does not end hangs in the kernel (state D); the end is told without it."""
_LOOK_EVERY_S = 1.0
"""How often the size of the log is looked at."""

_libc = ctypes.CDLL(None, use_errno=True)


class ShimRefused(Exception):
    """The command cannot be started; the text says why."""


class Shim:
    """One command, from its start to its end."""

    def __init__(self, order: dict[str, Any], heard: bytes = b"") -> None:
        """`heard` has come behind the order already."""
        self._order = {**ORDER, **order}
        self._pid = 0
        self._code: int | None = None
        self._why = "exited"
        self._deadline: float | None = None
        """When what is left is killed (monotonic); None: nobody has asked it to go."""
        self._killed_at: float | None = None
        self._input = heard

    def run(self) -> int:
        """Start the command and stay until all of it is gone. Returns its exit code as a shell would."""
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wakeup, on_signal = os.pipe()
        for fd in (wakeup, on_signal):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(on_signal, warn_on_full_buffer=False)
        for each in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(each, self._on_signal)
        for each in (signal.SIGINT, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        try:
            argv, port = self._fill_in()
            self._pid = self._start(argv)
        except ShimRefused as refused:
            say({"say": "cannot", "why": str(refused)})
            return 127
        say({"say": "started", "pid": self._pid, "port": port, "at": time.time()})
        self._take(b"")
        poll = select.poll()
        poll.register(0, select.POLLIN | select.POLLHUP)
        poll.register(wakeup, select.POLLIN)
        while True:
            for fd, _ in poll.poll(self._pause_s() * 1000):
                if fd == wakeup:
                    os.read(wakeup, 512)
                elif not self._hear():
                    poll.unregister(0)
            self._reap()
            self._bound_log()
            if self._code is not None and not self._leftovers():
                break
            self._enforce()
        return self._finish()

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:  # somebody ends the shim itself: that is meant for the command
            self._stop(self._order["stop_signal"], self._order["orphan_grace_s"])

    def _pause_s(self) -> float:
        if self._killed_at is not None:
            return 0.02
        if self._deadline is not None:
            return max(0.0, min(self._deadline - time.monotonic(), 0.05 if self._code is not None else _LOOK_EVERY_S))
        return _LOOK_EVERY_S

    # Starting

    def _fill_in(self) -> tuple[list[str], int | None]:
        order = self._order
        argv = [str(word) for word in order["argv"]]
        if not argv:
            raise ShimRefused("there is no command")
        port = None
        if any("{port}" in word for word in argv):
            try:
                with socket.socket() as probe:
                    probe.bind((order["host"], 0))
                    port = probe.getsockname()[1]
            except OSError as error:
                raise ShimRefused(f"no port is free on {order['host']}: {error.strerror}") from error
        argv = [word.replace("{port}", str(port)).replace("{host}", order["host"]) for word in argv]
        return argv, port

    def _start(self, argv: list[str]) -> int:
        order = self._order
        if order["cwd"] and not os.path.isdir(order["cwd"]):  # noqa: PTH112
            raise ShimRefused(f"there is no directory {order['cwd']}")
        name = argv[0]
        if "/" in name:
            name = os.path.abspath(os.path.join(order["cwd"] or ".", name))  # noqa: PTH100, PTH118
        program = shutil.which(name, path=order["env"].get("PATH", os.defpath))
        if program is None:
            raise ShimRefused(f"there is no program {argv[0]!r}")
        missing = sorted(set(order["cores"]) - os.sched_getaffinity(0))
        if missing:
            raise ShimRefused(f"this process may not use the cores {', '.join(map(str, missing))}")
        log = os.open(os.devnull, os.O_WRONLY)
        if order["log"]:
            try:
                log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            except OSError as error:
                raise ShimRefused(f"the log {order['log']} cannot be written: {error.strerror}") from error
        failed, fails = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            raise ShimRefused(f"no process can be made: {error.strerror}") from error
        if pid == 0:
            self._become(program, argv, log, fails)
        os.close(log)
        os.close(fails)
        with os.fdopen(failed, "rb") as pipe:
            reason = pipe.read()  # ends with nothing when exec succeeds, as the pipe is closed by it
        if reason:
            os.waitpid(pid, 0)
            raise ShimRefused(f"{argv[0]} cannot be started: {reason.decode(errors='replace')}")
        return pid

    def _become(self, program: str, argv: list[str], log: int, fails: int) -> None:
        """In the child: turn into the command. Does not return."""
        order = self._order
        try:
            signal.set_wakeup_fd(-1)
            for each in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(each, signal.SIG_DFL)
            os.setsid()
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if order["cores"]:
                os.sched_setaffinity(0, order["cores"])
            if order["idle"]:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
                _lower_session()
            _raise_oom_score(order["oom_score_adj"])
            if order["cwd"]:
                os.chdir(order["cwd"])
            os.execve(program, argv, order["env"])
        except OSError as error:
            os.write(fails, (error.strerror or str(error)).encode())
        except BaseException as error:
            os.write(fails, repr(error).encode())
        os._exit(127)

    # Ending

    def _hear(self) -> bool:
        """Read what the platform says; False once it is gone."""
        try:
            data = os.read(0, 65536)
        except OSError:
            data = b""
        if not data:
            if self._deadline is None:
                self._stop(self._order["stop_signal"], self._order["orphan_grace_s"])
            return False
        self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        *lines, self._input = (self._input + data).split(b"\n")
        for line in lines:
            words = line.decode(errors="replace").split()
            if words[:1] == ["kill"]:
                self._deadline = 0.0
            elif words[:1] == ["stop"] and len(words) == 3:
                self._stop(words[1], float(words[2]))

    def _stop(self, name: str, grace_s: float) -> None:
        """Signal all of it; the first deadline counts, however often it is asked."""
        until = time.monotonic() + max(grace_s, 0.0)
        self._deadline = until if self._deadline is None else min(self._deadline, until)
        if self._code is None:
            self._why = "stopped"
        number = getattr(signal, f"SIG{name.removeprefix('SIG')}", signal.SIGTERM)
        self._signal_all(number)
        self._signal_all(signal.SIGCONT)  # one that was suspended would never hear of it

    def _signal_all(self, number: int) -> None:
        """The process group in one go, so that no member sees another end before it hears of it.

        Then the others.
        """
        leftovers = self._leftovers()
        others = [pid for pid in leftovers if group_of(pid) != self._pid]
        if self._code is None or len(others) < len(leftovers):
            send(-self._pid, number)
        for pid in others:
            send(pid, number)

    def _enforce(self) -> None:
        """Kill what is left once the grace is over."""
        now = time.monotonic()
        if self._deadline is None:
            if self._code is not None:
                self._deadline = now + LEFTOVER_GRACE_S
                self._signal_all(signal.SIGTERM)
            return
        if now < self._deadline:
            return
        if self._killed_at is None:
            self._killed_at = now
            if self._code is None:
                self._why = "killed"
        self._signal_all(signal.SIGKILL)
        if now - self._killed_at > GIVE_UP_AFTER_S:
            self._code = -signal.SIGKILL if self._code is None else self._code
            self._why = "killed, but it hangs in the kernel"

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._code = os.waitstatus_to_exitcode(status)

    def _leftovers(self) -> list[int]:
        """All living descendants but the command itself while that has not ended."""
        if self._killed_at is not None and time.monotonic() - self._killed_at > GIVE_UP_AFTER_S:
            return []
        return [pid for pid in descendants(os.getpid()) if pid != self._pid or self._code is not None]

    def _finish(self) -> int:
        assert self._code is not None
        ended = {"code": self._code, "at": time.time(), "why": self._why}
        if self._order["end_file"]:
            for _ in range(5):
                try:
                    write_whole(self._order["end_file"], json.dumps(ended).encode())
                    break
                except OSError as error:  # a full disk may have room again
                    complain(f"the exit cannot be recorded: {error}")
                    time.sleep(0.2)
        say({"say": "ended", **ended})
        return self._code if self._code >= 0 else 128 - self._code

    def _bound_log(self) -> None:
        """Move a log that has grown too long aside. It is copied and cut, as the command holds the file open."""
        path = self._order["log"]
        if not path:
            return
        try:
            if os.stat(path).st_size > self._order["log_bytes"]:  # noqa: PTH116
                shutil.copyfile(path, f"{path}.1")
                os.truncate(path, 0)
        except OSError as error:
            complain(f"the log cannot be truncated: {error}")


def descendants(root: int) -> list[int]:
    """The living processes below `root`; zombies are not among them."""
    children: dict[int, list[int]] = {}
    dead = set()
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except (OSError, ValueError):
                continue
            children.setdefault(int(parent), []).append(int(name))
            if state in (b"Z", b"X"):
                dead.add(int(name))
    found, below = [], [root]
    while below:
        for pid in children.get(below.pop(), ()):
            below.append(pid)
            if pid not in dead:
                found.append(pid)
    return found


def group_of(pid: int) -> int:
    """A process's group; 0 when it is gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def send(pid: int, number: int) -> None:
    """Signal a process (or a group, by its negative id); nothing happens when it is gone."""
    with suppress(OSError):
        os.kill(pid, number)


def write_whole(path: str, data: bytes) -> None:
    """Write a file and have it on disk, whole or not at all."""
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, path)  # noqa: PTH104
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY)  # noqa: PTH120
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def say(what: dict[str, Any]) -> None:
    """A line to the platform; a platform that is gone is noticed elsewhere."""
    with suppress(OSError):
        os.write(1, json.dumps(what).encode() + b"\n")


def complain(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"shim: {text}\n".encode())


def _lower_session() -> None:
    """Give this session the least weight, 1.4% of a core.

    Where sessions share the processor as wholes (sched_autogroup, as on most desktops and many servers), a class counts
    within its session only, and this one is a session of its own.
    """
    with suppress(OSError):  # this kernel has none
        fd = os.open("/proc/self/autogroup", os.O_WRONLY)
        os.write(fd, b"19")
        os.close(fd)


def _raise_oom_score(score: int) -> None:
    """Of several processes the kernel shall rather kill this one, when memory runs out."""
    # Not permitted below what it was given; then it stays as it is.
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write(str(score))


def read_order() -> tuple[dict[str, Any] | None, bytes]:
    """The first line of standard input, and what came behind it."""
    data = b""
    while b"\n" not in data:
        more = os.read(0, 65536)
        if not more:
            return None, b""
        data += more
    line, _, rest = data.partition(b"\n")
    return json.loads(line), rest


def main() -> int:
    order, rest = read_order()
    if order is None:  # the platform died before it had said what to do
        return 0
    return Shim(order, rest).run()


if __name__ == "__main__":
    sys.exit(main())
