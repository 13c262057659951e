"""Child processes that speak JSON lines, both sides; a real child echoes what it is told."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Literal

import msgspec

from tidemill.child_protocol import Child, Commands, finish_within, report, start_child

WITHIN_S = 20.0


class Command(msgspec.Struct):
    do: Literal["say", "stop"]
    text: str = ""
    grace_s: float = 0.0


class Report(msgspec.Struct):
    text: str


async def echo() -> None:
    """The child: says what it is told, each time after a line that is no report."""
    commands = await Commands.open()
    while (command := await commands.next(Command)) is not None and command.do == "say":
        os.write(1, b"Segmentation fault\n")
        report(Report(command.text))


async def started(tmp_path: Path, module: str = __name__) -> Child:
    log_fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    return await start_child("echo", module, [], log_fd)


async def test_what_a_parent_says_is_heard_and_what_is_no_report_does_no_harm(tmp_path: Path) -> None:
    async with asyncio.timeout(WITHIN_S):
        child = await started(tmp_path)
        for text in ("one", "two"):
            child.tell(Command("say", text))
        child.tell(Command("stop"))
        assert [each.text async for each in child.reports(Report)] == ["one", "two"]
        assert await child.wait() == 0 and not child.alive
        child.tell(Command("say", "to nobody"))


async def test_a_child_goes_with_its_parent(tmp_path: Path) -> None:
    async with asyncio.timeout(WITHIN_S):
        child = await started(tmp_path)
        await child.end()  # it closes standard input, as a death would
        assert not child.alive


class Pipe:
    """A parent's end of the commands."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader()
        self.commands = Commands(self._reader)

    def say(self, command: Command) -> None:
        self._reader.feed_data(msgspec.json.encode(command) + b"\n")

    def die(self) -> None:
        self._reader.feed_eof()


async def test_a_command_is_waited_for_until_something_else_is_done() -> None:
    pipe, other = Pipe(), asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(pipe.commands.next(Command, until=other))
    await asyncio.sleep(0)
    other.set_result(None)
    assert await waiting is None
    pipe.say(Command("say", "still there"))
    assert await pipe.commands.next(Command) == Command("say", "still there"), "no line was lost"
    pipe.die()
    assert await pipe.commands.next(Command) is None


async def test_open_work_ends_by_itself() -> None:
    pipe, work = Pipe(), asyncio.get_running_loop().create_future()
    finishing = asyncio.create_task(finish_within(work, pipe.commands, Command, orphan_grace_s=60.0))
    pipe.say(Command("say", "which is no stop"))
    await asyncio.sleep(0.01)
    assert not finishing.done()
    work.set_result(None)
    async with asyncio.timeout(WITHIN_S):
        await finishing


async def test_a_second_stop_or_a_death_ends_open_work_sooner() -> None:
    for die in (False, True):
        pipe, work = Pipe(), asyncio.get_running_loop().create_future()
        if die:
            pipe.die()
        else:
            pipe.say(Command("stop", grace_s=0.0))
        async with asyncio.timeout(WITHIN_S):
            await finish_within(work, pipe.commands, Command, orphan_grace_s=0.0 if die else 60.0)
        assert not work.done(), "it is the caller's to cut off"


if __name__ == "__main__":
    asyncio.run(echo())
    sys.exit(0)
