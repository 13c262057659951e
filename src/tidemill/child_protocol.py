"""Child processes that speak JSON lines.

How a parent starts and hears them, and how a child hears its parent.

Standard input carries commands and standard output reports, one msgspec struct a line. The end of standard input is the
parent's death: a child then lets what is open finish for a moment, and goes. What a child prints otherwise goes to its
log. (`fleet.shim` must not import anything, and has a protocol of its own.)
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
import structlog

KILL_AFTER_S = 10.0
MAX_LINE_BYTES = 16 * 2**20
"""The longest line that either side reads."""

log = structlog.get_logger()
T = TypeVar("T")

# The parent's side


class Child:
    """A running child process in a session of its own, so that Ctrl-C reaches the supervisor alone."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def reports(self, kind: type[T]) -> AsyncIterator[T]:
        """What it says, until its standard output ends. A line that is no report is logged and passed over."""
        assert self._process.stdout is not None
        decode = msgspec.json.Decoder(kind).decode
        while line := await self._process.stdout.readline():
            try:
                report = decode(line)
            except msgspec.DecodeError:
                log.warning("a child process has sent an invalid report", child=self.name, line=line[:200])
            else:
                yield report

    def tell(self, command: msgspec.Struct) -> None:
        """Write a command to its standard input; nothing happens when it is gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self, within_s: float = KILL_AFTER_S) -> None:
        """Close its standard input, which asks it to go; kill it when it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.close()
        try:
            async with asyncio.timeout(within_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


async def start_child(
    name: str, module: str, arguments: Sequence[str], log_fd: int, *, env: Mapping[str, str] | None = None
) -> Child:
    """Start `python -m module`.

    Its standard error, and what it prints in C, goes to `log_fd`, which is closed.

    `env` comes on top of this process's environment.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log_fd,
            start_new_session=True,
            env={**os.environ, **(env or {})},
            limit=MAX_LINE_BYTES,
        )
    finally:
        os.close(log_fd)
    return Child(name, process)


# The child's side


class StopCommand(Protocol):
    """A command, as far as `finish_within` looks at it: "stop", and for how long open work may go on."""

    @property
    def do(self) -> str: ...
    @property
    def grace_s(self) -> float: ...


C = TypeVar("C", bound=StopCommand)


class Commands:
    """The lines that the parent writes, one after the other."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    @classmethod
    async def open(cls) -> "Commands":
        """Those of this process's standard input."""
        reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        return cls(reader)

    async def next(self, kind: type[T], *, until: "asyncio.Future[Any] | None" = None) -> T | None:
        """The next command; None when the parent is gone, or when `until` is done first."""
        line = asyncio.ensure_future(self._reader.readline())
        await asyncio.wait([line] if until is None else [line, until], return_when=asyncio.FIRST_COMPLETED)
        if not line.done():
            line.cancel()
            await asyncio.wait([line])
            return None
        text = line.result()
        return msgspec.json.decode(text, type=kind) if text else None


async def finish_within(
    work: "asyncio.Future[Any]", commands: Commands, kind: type[C], *, orphan_grace_s: float
) -> None:
    """Wait for `work`, which keeps to its grace period itself.

    For less when the parent says stop once more, or is gone (then `orphan_grace_s`). It may not be done afterwards.
    """
    while not work.done():
        command = await commands.next(kind, until=work)
        if command is None and work.done():
            return
        if command is None or command.do == "stop":
            await asyncio.wait([work], timeout=orphan_grace_s if command is None else command.grace_s)
            return


def report(said: msgspec.Struct, fd: int = 1) -> None:
    """Write a line to the parent. A parent that is gone is noticed elsewhere."""
    with contextlib.suppress(OSError):
        os.write(fd, msgspec.json.encode(said) + b"\n")
