"""What the runner tells the tide, what the tide tells the runner, and the order of lines."""

import asyncio
from itertools import groupby

from tests.work.conftest import Mill, answered, line
from tidemill.tides.routing import POLICY
from tidemill.work.batches.attempt import LineAnswer, LineCall
from tidemill.work.batches.backlog import MAX_BACKLOG_PARTS, MIN_DONE, _most_urgent
from tidemill.work.batches.lines import BEGINNING, beginning_of
from tidemill.work.batches.slack import TideSlack

SYSTEM = "You are a miller who weighs grain. " * 40


async def test_the_work_that_is_left_falls_as_lines_are_done(mill: Mill) -> None:
    held = asyncio.Event()

    async def plane(call: LineCall) -> LineAnswer:
        await held.wait()
        return answered()

    first = mill.submit([line(f"a{number}") for number in range(20)], expires_in_s=600)
    later = mill.submit([line("b0")])
    async with mill.run(plane) as running:
        await running.until(lambda: len(running.runner._active) == 2)
        (backlog,) = running.runner.backlogs()
        assert backlog.model == "mock"
        (work, deadline), (_, last) = backlog.parts
        assert last == mill.batch(later).expires_at.timestamp()
        assert deadline == mill.batch(first).expires_at.timestamp()
        least = POLICY.decode_weight * POLICY.expected_output
        assert work / 20 >= least, "before any is done, a line is taken to have an answer of the usual length"
        held.set()
        await running.until(lambda: not running.runner.backlogs())


async def test_what_lines_take_is_learned_from_those_that_are_done(mill: Mill) -> None:
    served = 0

    async def plane(call: LineCall) -> LineAnswer:
        nonlocal served
        served += 1
        if served > MIN_DONE + 2:
            await asyncio.sleep(60)
        return answered()

    mill.submit([line(f"a{number}") for number in range(30)])
    async with mill.run(plane) as running:
        await running.until(lambda: served >= MIN_DONE + 6)
        (backlog,) = running.runner.backlogs()
        ((work, _),) = backlog.parts
        done = MIN_DONE + 2
        assert work == (30 - done) * (3 - 1 + 2 * POLICY.decode_weight), "as `answered` says"


def test_batches_beyond_counting_are_added_to_the_last() -> None:
    parts = [(1.0, float(deadline)) for deadline in range(3 * MAX_BACKLOG_PARTS)]
    found = _most_urgent(list(reversed(parts)))
    assert len(found) == MAX_BACKLOG_PARTS and sum(work for work, _ in found) == len(parts)
    assert found[:-1] == tuple(parts[: MAX_BACKLOG_PARTS - 1])
    assert found[-1] == (2.0 * MAX_BACKLOG_PARTS + 1, float(MAX_BACKLOG_PARTS - 1)), "due with the first of them"


def test_the_tide_has_the_last_word_where_it_has_one() -> None:
    slack = TideSlack()
    slack.parallel = {"a": 4, "b": 4}
    slack.waiting = {"a": 1, "b": 1}
    slack.allowed = {"a": 7}
    assert (slack.slots("a"), slack.slots("b")) == (7, 0)
    slack.allowed = {}
    slack.waiting = {}
    assert (slack.slots("a"), slack.slots("b")) == (4, 4)


async def test_the_runner_takes_up_more_lines_when_it_may(mill: Mill) -> None:
    slack = TideSlack()
    mill.slack = slack
    slack.allowed = {"mock": 0}

    async def slow(call: LineCall) -> LineAnswer:
        await asyncio.sleep(0.02)
        return answered()

    batch_id = mill.submit([line(f"a{number}") for number in range(20)])
    async with mill.run(slow) as running:
        await running.started(batch_id)
        await asyncio.sleep(0.1)
        assert running.calls == []
        slack.allowed = {"mock": 6}
        running.runner.wake()
        await running.ended(batch_id)
        assert running.most == 6


async def test_lines_that_begin_alike_are_sent_one_after_the_other(mill: Mill) -> None:
    mill.slack.parallel = {"mock": 1}
    lines = [
        line(
            f"{number:03}",
            messages=[
                {"role": "system", "content": f"{number % 3} {SYSTEM}"},
                {"role": "user", "content": "x" * BEGINNING + str(number)},
            ],
        )
        for number in range(30)
    ]
    batch_id = mill.submit([line("short"), *lines])
    sent: list[int] = []

    async def plane(call: LineCall) -> LineAnswer:
        sent.append(int(call.request_id.rpartition("_")[2]) - 2)
        return answered()

    async with mill.run(plane) as running:
        await running.ended(batch_id)
    assert sent[0] == -1, "one that is like no other keeps its place"
    kinds = [number % 3 for number in sent[1:]]
    assert [kind for kind, _ in groupby(kinds)] == [0, 1, 2], "each beginning is computed once"
    for kind in range(3):
        own = [number for number in sent[1:] if number % 3 == kind]
        assert own == sorted(own), "and within it, as in the file"


def test_a_short_prompt_has_no_beginning_to_share() -> None:
    assert beginning_of(b'{"custom_id": "a", "body": {"messages": []}}') == 0
    assert beginning_of(b'{"custom_id": "a", "body": {}}') == 0
    long = b'"messages": [' + b"x" * 2 * BEGINNING
    assert beginning_of(b'{"custom_id": "1", ' + long) == beginning_of(b'{"custom_id": "22", ' + long) != 0
