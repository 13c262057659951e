"""Answers that say what they cost, where the operator wants it: the amount of the record, on whatever way they went."""

import asyncio
from typing import Any

import pytest

from tests.support.data_plane import Start
from tests.support.fleet import either
from tests.support.plane import Plane
from tests.support.upstream import Asked, Caller, role, word
from tests.support.wire import Answer, post
from tidemill.ledger.money import format_amount

MARK = "x-tidemill-charge"


async def charge_of(plane: Plane) -> str:
    return f"{format_amount((await plane.settled())[-1].charge)} USD"


def comment_of(answer: Answer) -> str:
    """The amount in a stream's comment, of which there is one, and it is before the end."""
    text = answer.body.decode()
    assert text.count(f": {MARK}: ") == 1
    return text.partition(f": {MARK}: ")[2].partition("\n\n")[0]


@pytest.mark.parametrize("engine", ["openai", "llamacpp"])
@pytest.mark.parametrize("path", ["chat/completions", "messages", "responses"])
async def test_whole_and_streamed_in_every_api(start: Start, engine: str, path: str) -> None:
    plane, _ = await start(either, engine=engine, owned=engine == "llamacpp")
    plane.meter.tells_charge = True
    text: dict[str, Any] = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 50}
    if path == "responses":
        text = {"input": "one two three"}
    for stream in (False, True) if engine == "openai" else (True,):  # a whole answer is collected from a stream
        answer = await plane.send(post(f"/v1/{path}", {"model": "mock", "stream": stream, **text}, plane.key))
        assert answer.status == 200, answer.body
        assert (comment_of(answer) if stream else answer.headers[MARK]) == await charge_of(plane)
        assert (MARK in answer.headers) is not stream


async def test_a_stream_that_breaks_off_says_what_it_cost_all_the_same(start: Start) -> None:
    async def breaks_off(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("one"), word("two"), end=False)
        await asyncio.sleep(0.05)
        caller.reset()

    plane, _ = await start(breaks_off)
    plane.meter.tells_charge = True
    answer = await plane.ask(stream=True)
    (record,) = await plane.settled()
    assert record.status == "engine_lost" and record.charge > 0
    assert comment_of(answer) == f"{format_amount(record.charge)} USD"


async def test_nothing_is_told_unless_it_is_switched_on_nor_with_refusals(start: Start) -> None:
    plane, _ = await start(either)
    assert MARK not in (await plane.ask()).headers
    assert MARK not in (await plane.ask(stream=True)).body.decode()
    plane.meter.tells_charge = True
    assert MARK not in (await plane.ask(model="none")).headers
