"""Replicas that fail: who is asked next, what is billed, and what the client is told."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.fleet import (
    Fleet,
    dead_port,
    dies_at_once,
    dies_in_the_middle,
    either,
    models,
    refuses,
    replicas,
    stream_slowly,
    whole,
)
from tests.support.plane import Plane
from tests.support.upstream import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Asked,
    Caller,
    Script,
    Upstream,
    event,
    finish,
    role,
    usage,
    word,
)
from tests.support.waiting import until
from tidemill.gateway.proxy.retry import MAX_ATTEMPTS
from tidemill.gateway.routing.circuit_breaker import FAILING_AFTER, UNREACHABLE_AFTER
from tidemill.gateway.routing.replica import RoutedReplica
from tidemill.tides.routing import ReplicaHealth

OWN = {"owned": True}
"""An engine of one's own that speaks OpenAI's language: it may be asked again, as nobody bills it."""


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, stack)


async def of(fleet: Fleet, *scripts: Script, **changes: object) -> tuple[Plane, list[Upstream]]:
    engines = await fleet.engines(*scripts)
    return await fleet.plane(models("mock", *(engine.port for engine in engines), **changes)), engines


def replica(plane: Plane, index: int, name: str = "mock") -> RoutedReplica:
    return plane.routes.by_name[name].replicas[index]


def now() -> float:
    return asyncio.get_running_loop().time()


# A connection that cannot be made


async def test_a_replica_that_is_gone_is_passed_by(fleet: Fleet) -> None:
    (engine,) = await fleet.engines(whole)
    plane = await fleet.plane(models("mock", dead_port(), engine.port))
    for _ in range(10):
        assert (await plane.ask()).status == 200
    records = await plane.settled()
    assert [each.opened.replica for each in records] == ["mock/1"] * 10, "one record each, and it names who served"
    assert {each.status for each in records} == {"ok"}
    assert replica(plane, 0).health(now(), None) is ReplicaHealth.DOWN
    assert len(engine.asked) == 10


async def test_a_stream_too(fleet: Fleet) -> None:
    (engine,) = await fleet.engines(either)
    plane = await fleet.plane(models("mock", dead_port(), engine.port))
    answer = await plane.ask(stream=True)
    assert answer.text == "ab"
    assert (await plane.record()).completion == 2


async def test_when_nobody_is_left_the_error_says_when_to_come_back(fleet: Fleet) -> None:
    plane = await fleet.plane(models("mock", dead_port(), dead_port()))
    answers = [await plane.ask() for _ in range(UNREACHABLE_AFTER + 2)]
    assert {answer.status for answer in answers} == {503}
    assert answers[0].error["code"] == "unavailable"
    last = answers[-1]
    assert last.error["code"] == "model_not_ready" and "cannot be reached" in last.error["message"]
    assert int(last.headers["retry-after"]) >= 1
    records = await plane.settled()
    assert len(records) == UNREACHABLE_AFTER, "what is refused at the door leaves no record"
    assert {(each.status, each.charge) for each in records} == {("engine_lost", 0)}


async def test_one_that_comes_back_is_found(fleet: Fleet) -> None:
    (engine,) = await fleet.engines(whole)
    port = engine.port
    plane = await fleet.plane(models("mock", port))
    await engine.stop()
    while (await plane.ask()).error["code"] != "model_not_ready":
        pass
    back = Upstream(whole)
    back._server = await asyncio.start_server(back._serve, "127.0.0.1", port)
    deadline = time.monotonic() + 5
    while (await plane.ask()).status != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert replica(plane, 0).breaker.calm
    await back.stop()


async def test_a_probe_of_the_supervisor_ends_the_wait(fleet: Fleet) -> None:
    (engine,) = await fleet.engines(whole)
    plane = await fleet.plane(models("mock", engine.port))
    for _ in range(10):
        replica(plane, 0).breaker.unreachable(now())
    assert (await plane.ask()).status == 503
    for ready in (False, True):
        plane.routes.update([models("mock", engine.port, replicas=replicas("mock", engine.port, ready=ready))])
    assert (await plane.ask()).status == 200


async def test_a_model_that_starts_says_so(fleet: Fleet) -> None:
    port = dead_port()
    spec = models("mock", port, engine="llamacpp", owned=True, replicas=replicas("mock", port, ready=False))
    plane = await fleet.plane(spec)
    answer = await plane.ask()
    assert answer.status == 503 and "is starting" in answer.error["message"]
    assert await plane.settled() == []


# Refusals


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_replica_sends_the_request_on(fleet: Fleet, status: int) -> None:
    plane, (busy, free) = await of(fleet, refuses(status, b"retry-after: 7\r\n"), either)
    for stream in (False, True, False):
        assert (await plane.ask(stream=stream)).status == 200
    assert len(busy.asked) == 1, "and is left alone for as long as it said"
    assert len(free.asked) == 3
    records = await plane.settled()
    assert [each.opened.replica for each in records] == ["mock/1"] * 3
    assert {each.status for each in records} == {"ok"}


async def test_when_all_are_busy_the_client_hears_so(fleet: Fleet) -> None:
    plane, engines = await of(fleet, refuses(429, b"retry-after: 7\r\n"), refuses(429, b"retry-after: 9\r\n"))
    answer = await plane.ask()
    assert answer.status == 429 and answer.headers["retry-after"] in ("7", "9")
    assert answer.error["type"] == "rate_limit_error"
    assert [len(engine.asked) for engine in engines] == [1, 1]
    # While they say so, one of them is asked, and no more: a crowd of retries helps nobody.
    assert (await plane.ask()).status == 429
    assert sum(len(engine.asked) for engine in engines) == 3
    records = await plane.settled()
    assert [(each.status, each.charge) for each in records] == [("engine_error", 0)] * 2


@pytest.mark.parametrize("text", [b"", b"soon", b"-5", b"nan", b"0", b"1e400", b"9" * 400])
async def test_an_absurd_retry_after_does_no_harm(fleet: Fleet, text: bytes) -> None:
    plane, _ = await of(fleet, refuses(503, b"retry-after: %b\r\n" % text))
    answer = await plane.ask()
    assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_refusal_for_a_fault_of_the_request_is_final(fleet: Fleet, status: int) -> None:
    plane, engines = await of(fleet, refuses(status), refuses(status))
    for _ in range(2 * FAILING_AFTER):
        assert (await plane.ask()).status == status
    assert sum(len(engine.asked) for engine in engines) == 2 * FAILING_AFTER
    assert all(replica(plane, index).breaker.calm for index in (0, 1)), "nor does it speak against the replica"


async def test_a_failing_upstream_is_not_asked_twice_but_avoided_afterwards(fleet: Fleet) -> None:
    """An answer of 500 may have cost something upstream; after some, others are asked first."""
    plane, (ill, well) = await of(fleet, refuses(500), whole)
    statuses = [(await plane.ask()).status for _ in range(20)]
    assert statuses.count(502) == FAILING_AFTER
    assert statuses[-10:] == [200] * 10
    assert (len(ill.asked), len(well.asked)) == (FAILING_AFTER, 20 - FAILING_AFTER)


async def test_a_failing_upstream_that_is_alone_is_still_asked(fleet: Fleet) -> None:
    plane, (ill,) = await of(fleet, refuses(500))
    for _ in range(10):
        assert (await plane.ask()).status == 502
    assert len(ill.asked) == 10
    ill.script = whole
    assert (await plane.ask()).status == 200
    assert replica(plane, 0).breaker.calm


async def test_a_failing_upstream_leads_to_the_fallback(fleet: Fleet) -> None:
    ill, other = await fleet.engines(refuses(500), whole)
    plane = await fleet.plane(models("mock", ill.port, fallbacks=("other",)), models("other", other.port))
    statuses = [(await plane.ask()).status for _ in range(10)]
    assert statuses == [502] * FAILING_AFTER + [200] * (10 - FAILING_AFTER)


# Answers that break off


async def test_an_own_engine_that_dies_before_its_answer_is_replaced(fleet: Fleet) -> None:
    plane, (dead, well) = await of(fleet, dies_at_once, either, **OWN)
    answer = await plane.ask(stream=True)
    assert answer.text == "ab"
    record = await plane.record()
    assert (record.opened.replica, record.status, record.prompt, record.completion) == ("mock/1", "ok", 100, 2)
    assert (len(dead.asked), len(well.asked)) == (1, 1)


async def test_also_between_its_head_and_its_first_token(fleet: Fleet) -> None:
    """vLLM sends its head at once, and works on the prompt then."""

    async def head_only(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        await asyncio.sleep(0.05)
        caller.reset()

    plane, _ = await of(fleet, head_only, either, **OWN)
    answer = await plane.ask(stream=True)
    assert answer.status == 200 and answer.text == "ab"
    record = await plane.record()
    assert (record.opened.replica, record.charge) == ("mock/1", 100 * 1000 + 2 * 2000)


async def test_an_own_engine_that_dies_in_a_stream_ends_it_with_an_error(fleet: Fleet) -> None:
    plane, (_, well) = await of(fleet, dies_in_the_middle, either, **OWN)
    answer = await plane.ask(stream=True)
    assert answer.status == 200
    assert answer.chunks[-1]["error"]["code"] == "engine_lost"
    assert len(well.asked) == 0, "what was sent cannot be taken back"
    record = await plane.record()
    assert (record.opened.replica, record.status) == ("mock/0", "engine_lost")


async def test_an_upstream_that_took_the_request_is_not_asked_twice(fleet: Fleet) -> None:
    """It may have produced, and bills, an answer."""
    plane, (dead, well) = await of(fleet, dies_at_once, either)
    assert (await plane.ask()).status == 502
    assert (len(dead.asked), len(well.asked)) == (1, 0)
    assert (await plane.record()).charge == 0


async def test_a_request_that_kills_engines_does_not_go_through_all_of_them(fleet: Fleet) -> None:
    plane, engines = await of(fleet, *[dies_at_once] * 5, **OWN)
    assert (await plane.ask()).status == 502
    assert sum(len(engine.asked) for engine in engines) == 2
    assert len(await plane.settled()) == 1


async def test_refusals_are_passed_on_within_a_bound(fleet: Fleet) -> None:
    plane, engines = await of(fleet, *[refuses(503)] * (MAX_ATTEMPTS + 2))
    assert (await plane.ask()).status == 503
    assert sum(len(engine.asked) for engine in engines) == MAX_ATTEMPTS


async def test_a_whole_answer_that_broke_off_is_billed_once(fleet: Fleet) -> None:
    """An own engine streams to the gateway also for a client that wants one piece; that one has been sent nothing."""

    def tokens(count: int, *, dies: bool) -> Script:
        async def script(asked: Asked, caller: Caller) -> None:
            assert asked.json["stream"] is True
            await caller.send(STREAM_HEAD)
            for index in range(1, count + 1):
                timings = {"cache_n": 0, "prompt_n": 100, "predicted_n": index}
                text = {"choices": [{"index": 0, "delta": {"content": "w"}, "finish_reason": None}], "id": "c1"}
                await caller.chunk(event({**text, "timings": timings}).replace(b", ", b",").replace(b": ", b":"))
                await asyncio.sleep(0.005)
            if dies:
                caller.reset()
                return
            for each in (finish(), usage(100, count), DONE):
                await caller.chunk(each)
            await caller.send(LAST_CHUNK)

        return script

    plane, _ = await of(fleet, tokens(30, dies=True), tokens(7, dies=False), engine="llamacpp", **OWN)
    answer = await plane.ask()
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 7
    record = await plane.record()
    assert (record.prompt, record.completion, record.status) == (100, 7, "ok")
    assert record.opened.replica == "mock/1"
    assert record.charge == 100 * 1000 + 7 * 2000
    assert record.device_ns > 150_000_000, "the time of the lost attempt is in the record, too"


async def test_an_error_event_speaks_against_the_replica(fleet: Fleet) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(role(), word("x"), event({"error": {"message": "dead", "code": 500}}), DONE)

    plane, (ill, well) = await of(fleet, script, either)
    for _ in range(3 * FAILING_AFTER):
        await plane.ask(stream=True)
    assert len(ill.asked) == FAILING_AFTER
    assert len(well.asked) == 2 * FAILING_AFTER


# Time


async def test_the_time_to_the_first_token_is_for_all_attempts(fleet: Fleet) -> None:
    async def slow_then_refuses(asked: Asked, caller: Caller) -> None:
        await asyncio.sleep(2.0)
        await caller.whole({"error": {"message": "busy"}}, 503)

    async def silent(asked: Asked, caller: Caller) -> None:
        await asyncio.sleep(30)

    plane, engines = await of(fleet, slow_then_refuses, silent, ttft_timeout_seconds=4.0)
    began = time.monotonic()
    answer = await plane.ask()
    assert answer.status == 502 and "stopped sending" in answer.error["message"]
    assert 3.9 < time.monotonic() - began < 5.9, "not four seconds for each"
    assert [len(engine.asked) for engine in engines] == [1, 1]
    assert len(await plane.settled()) == 1


async def test_an_own_engine_that_is_too_slow_is_not_asked_again(fleet: Fleet) -> None:
    async def silent(asked: Asked, caller: Caller) -> None:
        await asyncio.sleep(30)

    plane, (one, other) = await of(fleet, silent, either, ttft_timeout_seconds=0.5, **OWN)
    began = time.monotonic()
    assert (await plane.ask()).status == 502
    assert time.monotonic() - began < 1.2
    assert (len(one.asked), len(other.asked)) == (1, 0)


async def test_silence_within_an_answer_ends_it(fleet: Fleet) -> None:
    async def stalls(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        await caller.chunk(word("x"))
        await asyncio.sleep(30)

    plane, (_, other) = await of(fleet, stalls, either, idle_timeout_seconds=0.4, **OWN)
    answer = await plane.ask(stream=True)
    assert answer.chunks[-1]["error"]["code"] == "engine_lost"
    assert other.asked == []


async def test_a_client_that_leaves_is_not_looked_after(fleet: Fleet) -> None:
    """It left while the first engine was asked; the second never hears of it."""

    async def refuses_late(asked: Asked, caller: Caller) -> None:
        await asyncio.sleep(0.4)
        await caller.whole({"error": {"message": "busy"}}, 503)

    plane, (first, other) = await of(fleet, refuses_late, either)
    line = await plane.line()
    await line.send(plane.request())
    await until(lambda: first.asked)
    line.close()
    records = await plane.settled()
    assert len(records) == 1 and records[0].charge == 0
    assert other.asked == []


# A replica that dies under load


@pytest.mark.parametrize("owned", [True, False])
async def test_a_replica_dies_in_the_middle_of_streams(fleet: Fleet, owned: bool) -> None:
    """Its streams end with an error event, what they had is billed, new requests go to the other; one record each."""
    plane, (dying, well) = await of(fleet, stream_slowly, stream_slowly, owned=owned)
    asks = [asyncio.create_task(plane.ask(stream=True, max_tokens=200)) for _ in range(20)]
    await asyncio.sleep(0.6)
    assert len(dying.asked) >= 6 and len(well.asked) >= 6
    on_it = len(dying.asked)
    assert dying._server is not None
    dying._server.close()
    for task in list(dying._tasks):
        task.cancel()
    late = [asyncio.create_task(plane.ask(stream=True, max_tokens=200)) for _ in range(10)]
    answers = await asyncio.gather(*asks)
    broken = [answer for answer in answers if "error" in answer.chunks[-1]]
    assert len(broken) == on_it
    assert all(len(answer.chunks) < 203 for answer in broken)
    assert all(len(answer.text) == 400 for answer in await asyncio.gather(*late)), "the late ones are whole"
    records = await plane.settled()
    assert len(records) == 30
    lost = [each for each in records if each.status == "engine_lost"]
    assert len(lost) == on_it and {each.opened.replica for each in lost} == {"mock/0"}
    assert all(0 < each.completion < 200 for each in lost)
    assert sum(each.status == "ok" for each in records) == 30 - on_it
