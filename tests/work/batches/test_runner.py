"""The batch runner: what it runs when, what it records, and what a kill at any moment leaves."""

import asyncio
import errno
import importlib
import json
import os
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import OperationalError

from tests.work.conftest import CHAT, Mill, answered, fine, line
from tidemill.errors import Unavailable
from tidemill.store import batches as batches_store
from tidemill.store.batches import BatchStatus
from tidemill.store.files import find_file
from tidemill.work.batches import runner as batch_module
from tidemill.work.batches.attempt import MAX_LOST, LineAnswer, LineCall, LineDone, NoAnswer
from tidemill.work.batches.results import OUTPUT, LineResponse, Results


def number_of(call: LineCall) -> int:
    return int(call.request_id.rpartition("_")[2])


async def test_all_lines_of_a_batch(mill: Mill) -> None:
    batch_id = mill.submit([line(f"r{number}") for number in range(20)])
    async with mill.run(fine) as running:
        batch = await running.ended(batch_id)
    assert batch.status is BatchStatus.COMPLETED and batch.total == 20 and batch.model == "mock"
    assert (batch.counts.completed, batch.counts.failed) == (20, 0)
    assert (batch.counts.input_tokens, batch.counts.cached_tokens, batch.counts.output_tokens) == (60, 20, 40)
    output = mill.entries(batch.output_file_id)
    assert set(output) == {f"r{number}" for number in range(20)} and batch.error_file_id is None
    assert output["r0"] == {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_1",
        "custom_id": "r0",
        "response": {"status_code": 200, "request_id": f"{batch_id}_1", "body": json.loads(answered().body)},
        "error": None,
    }
    first = LineCall(
        path=CHAT, body=b'{"model": "mock"}', tenant_id=mill.tenant_id, key_id="key_1", request_id=f"{batch_id}_1"
    )
    assert running.calls.count(first) == 1  # the lines in work at a time come in any order
    assert not mill.blobs.batch_directory(batch_id).exists()
    with mill.store.read() as connection:
        file = find_file(
            connection, tenant_id=mill.tenant_id, file_id=batch.output_file_id or "", now=datetime.now(UTC)
        )
    assert file.purpose == "batch_output" and file.bytes == mill.blobs.path(file.file_id).stat().st_size


async def test_no_more_lines_than_slots_and_none_while_somebody_waits(mill: Mill) -> None:
    async def slow(call: LineCall) -> LineAnswer:
        await asyncio.sleep(0.02)
        return answered()

    mill.slack.waiting = {"mock": 1}
    batch_id = mill.submit([line(f"r{number}") for number in range(20)])
    async with mill.run(slow) as running:
        await running.started(batch_id)
        await asyncio.sleep(0.1)
        assert running.calls == []
        mill.slack.waiting = {}
        await running.ended(batch_id)
        assert running.most == 4


async def test_the_most_urgent_batch_goes_first(mill: Mill) -> None:
    mill.slack.parallel = {"mock": 1}
    late = mill.submit([line(f"r{number}") for number in range(5)])
    urgent = mill.submit([line(f"r{number}") for number in range(5)], expires_in_s=600)
    mill.slack.waiting = {"mock": 1}
    async with mill.run(fine) as running:
        await running.started(late)
        await running.started(urgent)
        await running.until(lambda: len(running.runner._active) == 2)
        mill.slack.waiting = {}
        await running.ended(late)
    assert [call.request_id.rpartition("_")[0] for call in running.calls] == [urgent] * 5 + [late] * 5


async def test_two_models_do_not_wait_for_each_other(mill: Mill) -> None:
    held = asyncio.Event()

    async def plane(call: LineCall) -> LineAnswer:
        if json.loads(call.body)["model"] == "mock":
            await held.wait()
        return answered()

    batch_id = mill.submit([line("a"), line("b"), line("c"), line("d"), line("e"), line("f", model="alias")])
    other = mill.submit([line(f"o{number}", model="alias") for number in range(3)])
    async with mill.run(plane) as running:
        running.runner._names = lambda: {"mock": "mock", "alias": "other"}
        await running.ended(other)
        assert not mill.batch(batch_id).finished
        held.set()
        batch = await running.ended(batch_id)
    assert batch.counts.completed == 6 and batch.model is None


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_for_now_is_no_result(mill: Mill, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    asked: Counter[int] = Counter()

    async def plane(call: LineCall) -> LineAnswer:
        asked[number_of(call)] += 1
        return answered() if asked[number_of(call)] > 8 else answered(status, {"error": {"message": "busy"}})

    batch_id = mill.submit([line("a")])
    mill.slack.parallel = {"mock": 1}
    monkeypatch.setattr(batch_module, "LONGEST_WAIT_S", 0.05)
    async with mill.run(plane) as running:
        batch = await running.ended(batch_id)
    assert asked[1] == 9 and batch.counts.completed == 1


async def test_a_tenant_that_is_refused_rests_and_others_do_not(mill: Mill) -> None:
    async def plane(call: LineCall) -> LineAnswer:
        await asyncio.sleep(0)
        return answered(429, {}, retry_after_s=60.0)

    batch_id = mill.submit([line(f"r{number}") for number in range(500)])
    async with mill.run(plane) as running:
        await running.started(batch_id)
        await asyncio.sleep(0.3)
        assert 1 <= len(running.calls) <= 4  # those that were in flight together, and no more


async def test_retry_after_is_kept(mill: Mill) -> None:
    times: list[float] = []

    async def plane(call: LineCall) -> LineAnswer:
        times.append(asyncio.get_running_loop().time())
        return answered() if len(times) > 1 else answered(429, {}, retry_after_s=0.4)

    batch_id = mill.submit([line("a")])
    async with mill.run(plane) as running:
        await running.ended(batch_id)
    assert times[1] - times[0] >= 0.4


@pytest.mark.parametrize("way", ["lost", "status"])
async def test_a_poison_line_fails_alone(mill: Mill, way: str) -> None:
    """Whatever was in flight with the line that kills its engine is lost with it, and still gets an answer."""
    mill.slack.parallel = {"mock": 10}
    alive = asyncio.Event()

    async def plane(call: LineCall) -> LineAnswer:
        nonlocal alive
        mine = alive
        if number_of(call) == 7:
            await asyncio.sleep(0.01)
            alive.set()
            alive = asyncio.Event()
        try:
            async with asyncio.timeout(0.03):
                await mine.wait()
        except TimeoutError:
            return answered()
        if way == "status":
            return answered(502, {"error": {"message": "The engine was lost."}})
        raise NoAnswer("The engine closed the connection.", sent=True)

    batch_id = mill.submit([line(f"r{number}") for number in range(1, 101)])
    async with mill.run(plane) as running:
        batch = await running.ended(batch_id)
    assert (batch.status, batch.counts.completed, batch.counts.failed) == (BatchStatus.COMPLETED, 99, 1)
    (poison,) = mill.entries(batch.error_file_id).values()
    assert poison["custom_id"] == "r7"
    attempts = Counter(map(number_of, running.calls))
    assert attempts[7] == MAX_LOST and max(attempts.values()) <= MAX_LOST


async def test_a_gateway_that_is_not_there_costs_no_attempts(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def plane(call: LineCall) -> LineAnswer:
        nonlocal asked
        asked += 1
        if asked < 10:
            raise NoAnswer("refused", sent=False)
        return answered()

    monkeypatch.setattr(batch_module, "LONGEST_WAIT_S", 0.05)
    batch_id = mill.submit([line("a")])
    async with mill.run(plane) as running:
        assert (await running.ended(batch_id)).counts.completed == 1


async def test_errors_and_answers_that_are_none(mill: Mill) -> None:
    async def plane(call: LineCall) -> LineAnswer:
        match number_of(call):
            case 1:
                return answered(400, {"error": {"message": "no", "code": "context_length_exceeded"}})
            case 2:
                return LineAnswer(200, b"<html>")
            case 3:
                return LineAnswer(404, b"not found\xff")
            case _:
                return LineAnswer(200, b'{\r\n "id":\n "c"\n}')

    batch_id = mill.submit([line("bad"), line("html"), line("text"), line("pretty"), line("stream", stream=True)])
    async with mill.run(plane) as running:
        batch = await running.ended(batch_id)
    errors = mill.entries(batch.error_file_id)
    assert errors["bad"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert errors["html"]["response"] is None and errors["html"]["error"]["code"] == "invalid_answer"
    assert errors["text"]["response"]["status_code"] == 404
    assert errors["stream"]["response"]["body"]["error"]["param"] == "stream"
    assert mill.entries(batch.output_file_id)["pretty"]["response"]["body"] == {"id": "c"}
    assert len(running.calls) == 4  # the stream was not even asked for


async def test_a_balance_that_parallel_lines_hold_is_asked_again(mill: Mill) -> None:
    in_flight = 0

    async def plane(call: LineCall) -> LineAnswer:
        nonlocal in_flight
        in_flight += 1
        try:
            await asyncio.sleep(0.01)
            return answered() if in_flight == 1 else answered(402, {"error": {"code": "insufficient_quota"}})
        finally:
            in_flight -= 1

    batch_id = mill.submit([line(f"r{number}") for number in range(6)])
    async with mill.run(plane) as running:
        batch = await running.ended(batch_id)
    assert batch.counts.completed >= 1 and batch.counts.completed + batch.counts.failed == 6


async def test_cancelling_lets_what_is_in_flight_end(mill: Mill) -> None:
    release = asyncio.Event()

    async def plane(call: LineCall) -> LineAnswer:
        await release.wait()
        return answered()

    batch_id = mill.submit([line(f"r{number}") for number in range(50)])
    async with mill.run(plane) as running:
        await running.until(lambda: len(running.calls) == 4)
        mill.cancel(batch_id)
        await asyncio.sleep(0.2)
        assert len(running.calls) == 4 and mill.batch(batch_id).status is BatchStatus.CANCELLING
        release.set()
        batch = await running.ended(batch_id)
    assert batch.status is BatchStatus.CANCELLED and batch.counts.completed == 4 and batch.counts.failed == 46
    errors = mill.entries(batch.error_file_id)
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    assert not set(errors) & set(mill.entries(batch.output_file_id))


async def test_a_line_that_never_ends_does_not_keep_a_batch_from_its_end(
    mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "BATCH_FINISH_S", 0.2)

    async def never(call: LineCall) -> LineAnswer:
        await asyncio.Event().wait()
        raise AssertionError

    batch_id = mill.submit([line("a"), line("b")])
    async with mill.run(never) as running:
        await running.until(lambda: len(running.calls) == 2)
        mill.expire(batch_id)
        mill_batch = running.runner._active[batch_id]
        mill_batch.batch = mill.batch(batch_id)
        batch = await running.ended(batch_id)
    assert batch.status is BatchStatus.EXPIRED and batch.counts.failed == 2
    assert {each["error"]["code"] for each in mill.entries(batch.error_file_id).values()} == {"batch_expired"}


async def test_a_batch_cancelled_before_anything_was_looked_at(mill: Mill) -> None:
    batch_id = mill.submit([line("a")])
    mill.cancel(batch_id)
    async with mill.run(fine) as running:
        batch = await running.ended(batch_id)
    assert batch.status is BatchStatus.CANCELLED and running.calls == []
    assert batch.output_file_id is None and batch.error_file_id is None


async def test_a_stop_records_what_still_ends_and_another_runner_goes_on(mill: Mill) -> None:
    async def slow(call: LineCall) -> LineAnswer:
        await asyncio.sleep(0.2 if number_of(call) % 2 else 30)
        return answered()

    batch_id = mill.submit([line(f"r{number}") for number in range(1, 5)])
    async with mill.run(slow) as running:
        await running.until(lambda: len(running.calls) == 4)
    assert mill.batch(batch_id).counts.completed == 2
    async with mill.run(fine) as again:
        batch = await again.ended(batch_id)
    assert {number_of(call) for call in again.calls} == {2, 4}
    assert batch.counts.completed == 4 and len(mill.entries(batch.output_file_id)) == 4
    assert (batch.counts.input_tokens, batch.counts.output_tokens) == (12, 8)  # of both runners


async def test_a_torn_result_is_run_again(mill: Mill) -> None:
    batch_id = mill.submit([line(f"r{number}") for number in range(1, 5)])
    active = mill.lifecycle().take(mill.batch(batch_id), {"mock": "mock"})
    assert active is not None
    directory = active.results.directory
    async with mill.run(fine) as running:
        await running.ended(batch_id)
    whole = mill.blobs.path(mill.batch(batch_id).output_file_id or "").read_bytes().splitlines(keepends=True)
    for torn in (whole[0] + whole[1][:-1], whole[0] + whole[1][:20], whole[0] + b"\0" * 100, whole[0] + b"\xff\n"):
        directory.mkdir(exist_ok=True)
        (directory / OUTPUT).write_bytes(torn)
        results = Results(directory)
        assert len(results.done) == 1 and results.counts.completed == 1
        assert (directory / OUTPUT).read_bytes() == whole[0]
        results.close()


class Killed(BaseException):
    pass


STEPS = [
    ("tidemill.work.batches.lifecycle.start_batch", "after"),
    ("tidemill.work.batches.lifecycle.seal_batch", "before"),
    ("tidemill.work.batches.lifecycle.seal_batch", "after"),
    ("tidemill.store.blobs.BlobStore.adopt", "before"),
    ("tidemill.store.blobs.BlobStore.adopt", "after"),
    ("tidemill.work.batches.lifecycle.finish_batch", "after"),
    ("tidemill.store.blobs.BlobStore.remove_batch_directory", "before"),
]


@pytest.mark.parametrize(("step", "when"), STEPS)
@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("durable", [True, False])
async def test_a_kill_between_any_two_steps(
    mill: Mill, monkeypatch: pytest.MonkeyPatch, step: str, when: str, cancelled: bool, durable: bool
) -> None:
    """The life of a batch is broken off at a step, whose own transaction is committed or not, and begun anew."""
    batch_id = mill.submit([line("a"), line("b", stream=True)])
    names = {"mock": "mock"}
    lifecycle = mill.lifecycle()
    module, _, name = step.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, kind = module.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    real = getattr(owner, name)

    def broken(*args: Any, **more: Any) -> Any:
        if when == "after":
            real(*args, **more)
            if durable and hasattr(args[0], "commit"):
                args[0].commit()
        raise Killed

    def live() -> None:
        active = lifecycle.take(mill.batch(batch_id), names)
        if active is None:
            return
        if cancelled and mill.batch(batch_id).status is BatchStatus.IN_PROGRESS:
            mill.cancel(batch_id)
        if cancelled:
            active.close_as(BatchStatus.CANCELLED, 1.0)
        else:
            for place, done in ((0, _done(200)), (1, _done(400))):
                if active.index.numbers[place] not in active.results.done:
                    active.record(place, "ab"[place], done)
        lifecycle.put_away(active)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        with pytest.raises(Killed):
            live()
    lifecycle.sweep(orphans=True)
    live()
    if not mill.batch(batch_id).finished:
        live()
    lifecycle.sweep(orphans=True)
    batch = mill.batch(batch_id)
    assert batch.status is (BatchStatus.CANCELLED if cancelled else BatchStatus.COMPLETED)
    output, errors = mill.entries(batch.output_file_id), mill.entries(batch.error_file_id)
    assert sorted([*output, *errors]) == ["a", "b"]
    assert (batch.counts.completed, batch.counts.failed) == (len(output), len(errors))


def _done(status: int) -> Any:
    return LineDone(LineResponse(status, "batch_x_1", msgspec.Raw(b"{}")))


async def test_a_full_disk_loses_no_result(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    full = True

    def no_room(fd: int, data: Any) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    batch_id = mill.submit([line(f"r{number}") for number in range(40)])
    monkeypatch.setattr("tidemill.work.batches.results.os.write", no_room)
    async with mill.run(fine) as running:
        await running.until(lambda: running.runner._full)
        await asyncio.sleep(0.3)
        assert len(running.calls) <= 8  # nothing is begun that cannot be recorded
        full = False
        batch = await running.ended(batch_id)
    assert batch.counts.completed == 40 and len(running.calls) == 40


async def test_a_store_that_does_not_answer_for_a_while(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mill.store.write
    down = False

    def write() -> Any:
        if down:
            raise Unavailable("The database does not answer.") from OperationalError("", {}, Exception())
        return real()

    monkeypatch.setattr(mill.store, "write", write)
    batch_id = mill.submit([line(f"r{number}") for number in range(10)])
    mill.slack.waiting = {"mock": 1}
    async with mill.run(fine) as running:
        await running.started(batch_id)
        down = True
        mill.slack.waiting = {}
        await running.until(lambda: len(running.calls) == 10)
        await asyncio.sleep(0.2)
        assert mill.batch(batch_id).status is BatchStatus.IN_PROGRESS
        down = False
        assert (await running.ended(batch_id)).counts.completed == 10


async def test_a_wrong_file(mill: Mill) -> None:
    batch_id = mill.submit([line("a"), "{", line("a"), line("b", model="unknown")])
    gone = mill.submit([line("a")])
    mill.blobs.path(mill.batch(gone).input_file_id).unlink()
    async with mill.run(fine) as running:
        batch = await running.ended(batch_id)
        assert [(error.line, error.code) for error in batch.errors] == [
            (2, "invalid_json_line"),
            (3, "duplicate_custom_id"),
            (4, "model_not_found"),
        ]
        assert [error.code for error in (await running.ended(gone)).errors] == ["input_file_missing"]
    assert running.calls == []


async def test_batches_of_another_site_are_left_alone(mill: Mill) -> None:
    with mill.store.read() as connection:
        assert batches_store.open_batches(connection, "site_elsewhere") == []
    batch_id = mill.submit([line("a")])
    with mill.store.read() as connection:
        assert [each.batch_id for each in batches_store.open_batches(connection, mill.blobs.site)] == [batch_id]
        assert batches_store.open_batches(connection, "site_elsewhere") == []


async def test_active_batches_are_bounded_and_all_are_validated_at_once(
    mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "ACTIVE_PER_MODEL", 2)
    mill.slack.waiting = {"mock": 1}
    ids = [mill.submit([line("a"), line("b")]) for _ in range(7)]
    wrong = mill.submit(["{"])
    async with mill.run(fine) as running:
        for batch_id in ids:
            await running.started(batch_id)
        assert (await running.ended(wrong)).status is BatchStatus.FAILED
        active = set(running.runner._active)  # those that were validated first; a busy machine decides which
        assert len(active) == 2 and active < set(ids)
        cancelled = next(batch_id for batch_id in reversed(ids) if batch_id not in active)
        mill.cancel(cancelled)  # what waits can be cancelled, too
        assert (await running.ended(cancelled)).status is BatchStatus.CANCELLED
        mill.slack.waiting = {}
        for batch_id in ids:
            if batch_id == cancelled:
                continue
            assert (await running.ended(batch_id)).counts.completed == 2
    assert len(running.calls) == 12
