"""Child processes: started, spoken to by a pipe that also tells them when their parent dies, ended in order."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence

KILL_AFTER_S = 10.0


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

    async def line(self) -> bytes:
        """The next line of its standard output; b"" once that has ended."""
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    def tell(self, line: bytes) -> None:
        """Write a line to its standard input; nothing happens when it is gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(line + b"\n")

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
    """Start `python -m module`; its standard error, and what it prints in C, goes to `log_fd`, which is closed.

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
            limit=16 * 1024 * 1024,
        )
    finally:
        os.close(log_fd)
    return Child(name, process)
