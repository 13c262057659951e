"""Hedging: who is asked twice, who answers, and that it is billed once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.fleet import Fleet, either, models
from tests.support.plane import Plane
from tests.support.upstream import STREAM_HEAD, Asked, Caller, Upstream, role, word
from tidemill.gateway.routing.models import HEDGE_BURST
from tidemill.ledger.usage import RequestStatus
from tidemill.meter.live import TooManyOpen

HEDGED: dict[str, Any] = {"owned": True, "hedge_seconds": 0.15}


class Turns:
    """Engines in a row: the first request of all is done by the first script, and so on; the last one stays."""

    def __init__(self, *scripts: Any) -> None:
        self.scripts = list(scripts)
        self.ports: list[int] = []
        """Where the requests came in, in their order."""
        self.left = 0
        """Requests that were hung up on."""

    async def __call__(self, asked: Asked, caller: Caller) -> None:
        self.ports.append(caller._writer.get_extra_info("sockname")[1])
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            await script(asked, caller)
            if script is silent:
                await caller.hangs_up()
                self.left += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left += 1


async def silent(asked: Asked, caller: Caller) -> None:
    """Takes the request, and says nothing beyond the head."""
    await caller.send(STREAM_HEAD)


async def dies_late(asked: Asked, caller: Caller) -> None:
    await asyncio.sleep(0.3)
    caller.reset()


async def late(asked: Asked, caller: Caller) -> None:
    await asyncio.sleep(0.4)
    await either(asked, caller)


def after(seconds: float) -> Any:
    async def script(asked: Asked, caller: Caller) -> None:
        await asyncio.sleep(seconds)
        await either(asked, caller)

    return script


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, stack)


async def of(fleet: Fleet, turns: Turns, **changes: Any) -> tuple[Plane, list[Upstream]]:
    engines = await fleet.engines(turns, turns)
    return await fleet.plane(models("mock", *(each.port for each in engines), **{**HEDGED, **changes})), engines


def hedges(plane: Plane) -> tuple[int, int]:
    figures = plane.meter.metrics.figures(plane.leasing, plane.log)
    return figures.hedges.get("mock", 0), figures.hedges_won.get("mock", 0)


def in_flight(plane: Plane) -> list[int]:
    return [replica.in_flight + replica.clock.active for replica in plane.routes.by_name["mock"].replicas]


async def test_the_second_answers_where_the_first_is_silent_and_it_is_billed_once(fleet: Fleet) -> None:
    turns = Turns(silent, either)
    plane, engines = await of(fleet, turns)
    answer = await plane.ask(stream=True)
    assert answer.status == 200 and answer.text == "ab"
    assert [len(engine.asked) for engine in engines] == [1, 1]
    (record,) = await plane.settled()
    assert (record.prompt, record.completion, record.status) == (100, 2, RequestStatus.OK)
    assert record.opened.replica == f"mock/{[engine.port for engine in engines].index(turns.ports[1])}"
    assert turns.left == 1, "the first one was hung up on"
    assert hedges(plane) == (1, 1) and in_flight(plane) == [0, 0]


async def test_the_first_answers_where_it_was_only_late_and_the_second_is_let_go(fleet: Fleet) -> None:
    turns = Turns(after(0.3), silent)
    plane, engines = await of(fleet, turns)
    assert (await plane.ask(stream=True)).text == "ab"
    assert [len(engine.asked) for engine in engines] == [1, 1]
    assert len(await plane.settled()) == 1
    assert hedges(plane) == (1, 0) and in_flight(plane) == [0, 0]
    await asyncio.sleep(0.05)
    assert turns.left == 1


async def test_one_in_time_is_asked_once(fleet: Fleet) -> None:
    plane, engines = await of(fleet, Turns(either))
    for _ in range(4):
        assert (await plane.ask(stream=True)).text == "ab"
    assert sum(len(engine.asked) for engine in engines) == 4 and hedges(plane) == (0, 0)


@pytest.mark.parametrize("changes", [{"hedge_seconds": None}, {"owned": False}])
async def test_without_it_and_for_an_upstream_that_bills_nobody_is_asked_twice(fleet: Fleet, changes: Any) -> None:
    plane, engines = await of(fleet, Turns(after(0.4), either), **changes)
    assert (await plane.ask(stream=True)).status == 200
    assert sum(len(engine.asked) for engine in engines) == 1


async def test_a_whole_answer_of_an_engine_that_gives_it_in_one_piece_is_not_late(fleet: Fleet) -> None:
    plane, engines = await of(fleet, Turns(after(0.4), either))
    assert (await plane.ask()).status == 200
    assert sum(len(engine.asked) for engine in engines) == 1


async def test_a_first_that_dies_in_the_race_leaves_it_to_the_second(fleet: Fleet) -> None:
    plane, engines = await of(fleet, Turns(dies_late, after(0.4)))
    assert (await plane.ask(stream=True)).text == "ab"
    assert [len(engine.asked) for engine in engines] == [1, 1] and len(await plane.settled()) == 1


async def test_a_second_that_refuses_leaves_it_to_the_first(fleet: Fleet) -> None:
    async def busy(asked: Asked, caller: Caller) -> None:
        await caller.whole({"error": {"message": "There is no room here now."}}, 503)

    plane, _ = await of(fleet, Turns(after(0.4), busy))
    assert (await plane.ask(stream=True)).text == "ab"
    assert len(await plane.settled()) == 1 and in_flight(plane) == [0, 0]


async def test_when_both_die_the_request_is_tried_once_more(fleet: Fleet) -> None:
    plane, engines = await of(fleet, Turns(dies_late, dies_late, either))
    assert (await plane.ask(stream=True)).text == "ab"
    assert sum(len(engine.asked) for engine in engines) == 3
    assert len(await plane.settled()) == 1 and in_flight(plane) == [0, 0]


async def test_a_client_that_leaves_in_the_race_ends_both(fleet: Fleet) -> None:
    turns = Turns(silent)
    plane, engines = await of(fleet, turns)
    asking = asyncio.create_task(plane.ask(stream=True))
    async with asyncio.timeout(60):
        while sum(len(engine.asked) for engine in engines) < 2:
            await asyncio.sleep(0.01)
    asking.cancel()
    (record,) = await plane.settled()
    assert (record.status, record.completion, record.charge) == (RequestStatus.CLIENT_CLOSED, 0, 0)
    async with asyncio.timeout(60):
        while turns.left < 2:
            await asyncio.sleep(0.01)
    assert in_flight(plane) == [0, 0]


async def test_when_everything_is_slow_only_few_are_asked_twice(fleet: Fleet) -> None:
    plane, engines = await of(fleet, Turns(after(0.3)), hedge_seconds=0.05)
    count = 30
    answers = await asyncio.gather(*(plane.ask(stream=True) for _ in range(count)))
    assert all(answer.text == "ab" for answer in answers)
    asked = sum(len(engine.asked) for engine in engines)
    assert HEDGE_BURST <= asked - count <= HEDGE_BURST + count / 20
    assert len(await plane.settled()) == count and in_flight(plane) == [0, 0]


async def test_a_replica_without_room_is_not_asked_as_well(fleet: Fleet) -> None:
    plane, engines = await of(fleet, Turns(after(0.5), after(0.5), either), slots=1)
    answers = await asyncio.gather(plane.ask(stream=True), plane.ask(stream=True))
    assert [answer.text for answer in answers] == ["ab", "ab"]
    assert sum(len(engine.asked) for engine in engines) == 2


async def test_text_goes_only_once_whoever_speaks(fleet: Fleet) -> None:
    async def speaks_at_once_then_waits(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        await caller.chunk(word("x"))
        await asyncio.sleep(0.4)
        await caller.chunk(b"data: [DONE]\n\n")
        await caller.send(b"0\r\n\r\n")

    plane, engines = await of(fleet, Turns(speaks_at_once_then_waits, either))
    assert (await plane.ask(stream=True)).text == "x", "it had begun in time"
    assert sum(len(engine.asked) for engine in engines) == 1


async def test_a_client_that_leaves_after_the_first_has_died_pays_for_nothing(fleet: Fleet) -> None:
    sent: list[int] = []

    async def late_and_long(asked: Asked, caller: Caller) -> None:
        await asyncio.sleep(0.8)
        await caller.send(STREAM_HEAD)
        await caller.chunk(role())
        for index in range(100):
            await caller.chunk(word("w "))
            sent.append(index)
            await asyncio.sleep(0.01)

    plane, engines = await of(fleet, Turns(dies_late, late_and_long))
    asking = asyncio.create_task(plane.ask(stream=True))
    await asyncio.sleep(0.5)
    assert sum(len(engine.asked) for engine in engines) == 2
    asking.cancel()
    (record,) = await plane.settled()
    assert (record.status, record.charge, sent) == (RequestStatus.CLIENT_CLOSED, 0, [])
    assert in_flight(plane) == [0, 0]


async def test_where_there_is_no_room_to_note_the_move_the_first_answers(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane, _ = await of(fleet, Turns(after(0.6), either))
    opened: list[object] = []
    real = plane.live.open

    def open_once(*arguments: Any) -> int:
        opened.append(arguments)
        if len(opened) > 1:
            raise TooManyOpen("There is no room.")
        return real(*arguments)

    monkeypatch.setattr(plane.live, "open", open_once)
    assert (await plane.ask(stream=True)).text == "ab"
    assert len(opened) == 2 and len(await plane.settled()) == 1
    assert hedges(plane) == (1, 0) and in_flight(plane) == [0, 0]
