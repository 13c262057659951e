"""Keeping gateway processes alive: with children that only act, so that each may die at the moment of choice."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tidemill.app import gateways as gateways_module
from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.gateways import FIRST_STARTS, Gateways
from tidemill.app.worker import GatewayCommand, GatewayReport
from tidemill.errors import Conflict, Unavailable

RESTART_AFTER_S = 0.05


class Actor:
    """A child that says what it is given, hears what it is told, and ends when it is told to stop, or killed."""

    def __init__(self, lines: list[GatewayReport], *, lasts: bool) -> None:
        self._over = asyncio.Event()
        self._reports = lines
        self.heard: list[Any] = []
        self.killed = False
        if not lasts:
            self._over.set()

    @property
    def alive(self) -> bool:
        return not self._over.is_set()

    pid = 1

    async def reports(self, kind: type[GatewayReport]) -> AsyncIterator[GatewayReport]:
        for each in self._reports:
            yield each
        await self._over.wait()

    def tell(self, command: Any) -> None:
        self.heard.append(command)
        if isinstance(command, GatewayCommand) and command.do == "stop":
            self._over.set()

    async def wait(self) -> int:
        await self._over.wait()
        return 0

    async def end(self, within_s: float = 1.0) -> None:
        self._over.set()

    def kill(self) -> None:
        self.killed = True
        self._over.set()

    def commands(self) -> list[str]:
        return [command.do for command in self.heard[1:]]


LISTENING = GatewayReport(say="listening")


class Stage:
    """Starts an actor for each child; the last plan serves for all later ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.plans: list[Callable[[], Actor]] = [lambda: Actor([LISTENING], lasts=True)]
        self.actors: list[Actor] = []
        self.delay_s = 0.0
        monkeypatch.setattr(gateways_module, "start_child", self.start_child)
        monkeypatch.setattr(gateways_module, "RESTART_AFTER_S", RESTART_AFTER_S)
        self.data = DataDir(tmp_path)
        self.data.meter.mkdir(parents=True)
        (tmp_path / "logs").mkdir()

    async def start_child(self, name: str, module: str, arguments: Any, log_fd: int, **more: Any) -> Actor:
        os.close(log_fd)
        await asyncio.sleep(self.delay_s)
        plan = self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]
        self.actors.append(plan())
        return self.actors[-1]

    def gateways(self, workers: int = 1) -> Gateways:
        return Gateways(
            Config(),
            Path(),
            self.data,
            port=8080,
            workers=workers,
            store_url="sqlite://",
            internal_token="x",
            specs=list,
            ended=lambda: None,
            load_changed=lambda *load: None,
        )

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not true():
                await asyncio.sleep(0.005)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    return Stage(monkeypatch, tmp_path)


async def test_they_start_and_stop(stage: Stage) -> None:
    gateways = stage.gateways(workers=3)
    await gateways.start()
    assert [process.listening for process in gateways.processes] == [True] * 3
    assert await gateways.stop(1.0)
    assert len(stage.actors) == 3 and not any(actor.alive for actor in stage.actors)


async def test_one_that_dies_is_started_again_with_an_id_of_its_own(stage: Stage) -> None:
    gateways = stage.gateways()
    await gateways.start()
    stage.actors[0].kill()
    await stage.until(lambda: len(stage.actors) == 2 and gateways.processes[0].listening)
    ids = {actor.heard[0].worker_id for actor in stage.actors}
    assert len(ids) == 2
    assert await gateways.stop(1.0)


async def test_a_stop_right_after_a_death_starts_no_other_one(stage: Stage) -> None:
    """The dead one cannot hear of the stop; the next one must not be born, or the platform never ends."""
    gateways = stage.gateways()
    await gateways.start()
    stage.actors[0].kill()
    await stage.until(lambda: not gateways.processes[0].listening)
    async with asyncio.timeout(2):
        await gateways.stop(1.0)
    assert not any(actor.alive for actor in stage.actors)
    await asyncio.sleep(2 * RESTART_AFTER_S)
    assert len(stage.actors) == 1


async def test_a_stop_while_the_next_one_is_being_born_ends_it(stage: Stage) -> None:
    gateways = stage.gateways()
    await gateways.start()
    stage.delay_s = 0.1
    stage.actors[0].kill()
    await asyncio.sleep(RESTART_AFTER_S + 0.05)
    async with asyncio.timeout(2):
        await gateways.stop(1.0)
    assert len(stage.actors) == 2 and not stage.actors[1].alive
    assert stage.actors[1].heard == []


async def test_one_that_does_not_stop_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    gateways = stage.gateways()
    await gateways.start()
    monkeypatch.setattr(stage.actors[0], "tell", lambda command: None)
    async with asyncio.timeout(5):
        await gateways.stop(-9.9)  # ten seconds more are its own grace
    assert stage.actors[0].killed


async def test_one_that_never_listens_is_given_up(stage: Stage) -> None:
    stage.plans = [lambda: Actor([], lasts=False)]
    gateways = stage.gateways()
    async with asyncio.timeout(5):
        with pytest.raises(Unavailable, match="The gateway did not start") as refused:
            await gateways.start()
    assert "gateway-0.log" in refused.value.hint
    assert len(stage.actors) == FIRST_STARTS
    async with asyncio.timeout(2):
        await gateways.stop(0.0)


async def test_a_port_that_is_taken_is_said(stage: Stage) -> None:
    stage.plans = [lambda: Actor([GatewayReport(say="failed", message="Address already in use")], lasts=False)]
    gateways = stage.gateways()
    with pytest.raises(Conflict, match="Cannot listen on port 8080: Address already in use"):
        await gateways.start()
    async with asyncio.timeout(2):
        await gateways.stop(0.0)


async def test_one_that_cannot_be_started_now_is_started_later(stage: Stage) -> None:
    """No process, or no room for its log: later there may be."""

    def no_process() -> Actor:
        raise OSError(11, "Resource temporarily unavailable")

    stage.plans = [no_process, *stage.plans]
    gateways = stage.gateways()
    async with asyncio.timeout(2):
        await gateways.start()
    assert await gateways.stop(1.0)


async def test_a_fault_that_nobody_has_foreseen_ends_the_start(stage: Stage) -> None:
    def broken() -> Actor:
        raise ZeroDivisionError

    stage.plans = [broken]
    gateways = stage.gateways()
    async with asyncio.timeout(2):
        with pytest.raises(ZeroDivisionError):
            await gateways.start()
        await gateways.stop(0.0)


async def test_a_change_is_announced_to_those_that_listen(stage: Stage) -> None:
    gateways = stage.gateways(workers=2)
    await gateways.start()

    def answer(actor: Actor) -> Callable[[GatewayCommand], None]:
        def tell(command: GatewayCommand) -> None:
            actor.heard.append(command)
            ticket = command.ticket
            gateways.processes[0]._hear(GatewayReport(say="refreshed", ticket=ticket))
            gateways.processes[1]._hear(GatewayReport(say="refreshed", ticket=ticket))

        return tell

    told = [actor.tell for actor in stage.actors]
    for actor in stage.actors:
        actor.tell = answer(actor)  # type: ignore[method-assign,assignment]
    async with asyncio.timeout(1):
        await gateways.refresh()
    assert all(actor.commands()[-1] == "refresh" for actor in stage.actors)
    for actor, tell in zip(stage.actors, told, strict=True):
        actor.tell = tell  # type: ignore[method-assign]
    assert await gateways.stop(1.0)


async def test_a_change_waits_for_nobody_who_is_dead(stage: Stage) -> None:
    gateways = stage.gateways()
    await gateways.start()
    asking = asyncio.create_task(gateways.refresh())
    await asyncio.sleep(0.01)
    stage.actors[0].kill()
    async with asyncio.timeout(1):
        await asking
    assert await gateways.stop(1.0)


async def test_requests_that_were_cut_off_are_told(stage: Stage) -> None:
    gateways = stage.gateways()
    await gateways.start()
    gateways.processes[0]._hear(GatewayReport(say="stopped", all_finished=False))
    assert not await gateways.stop(1.0)
