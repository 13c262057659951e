"""kill -9 of the platform, of the shims and of everything: jobs are billed once, and go on."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from tests.support.jobs import WITHIN_S, Jobs, shims, spawned
from tests.support.paths import ROOT
from tidemill.fleet.backend import ProcessEnd
from tidemill.store.jobs import AttemptOutcome, JobState
from tidemill.work.jobs.recovery import JobRecovery, read_end

SAVES = ("sh", "-c", "echo up; trap 'echo saved; exit 0' TERM; sleep 60 & wait")


class Life:
    """A platform in a process of its own, with one job that runs."""

    def __init__(self, directory: Path, *argv: str, **spec: object) -> None:
        self.directory = directory
        self.jobs = Jobs(directory)
        self.job = self.jobs.submit(*argv, **spec)  # type: ignore[arg-type]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.job_life", str(directory)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == b"open\n"
        self.wait_for("up")
        time.sleep(0.7)  # a reading or two

    def wait_for(self, text: str, attempt: int = 1) -> None:
        path = self.jobs.files.log(self.job, attempt, 0)
        deadline = time.monotonic() + WITHIN_S
        while not (path.exists() and text in path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self, *, everything: bool) -> None:
        victims = [self.process.pid, *(shims(self.process.pid) + spawned(self.job) if everything else [])]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def billed_us(self) -> int:
        return sum(row.device_us for row in self.jobs.rows())

    async def next_life(self) -> Jobs:
        self.jobs.store.close()
        self.jobs = await Jobs(self.directory).open()
        return self.jobs


@pytest.fixture
def lives() -> Iterator[list[Life]]:
    begun: list[Life] = []
    yield begun
    for life in begun:
        with suppress(ProcessLookupError):
            life.process.kill()
        life.process.wait()


async def test_after_a_kill_of_the_platform_its_shims_see_to_the_end(tmp_path: Path, lives: list[Life]) -> None:
    life = Life(tmp_path, *SAVES, devices=2)
    lives.append(life)
    life.kill(everything=False)
    jobs = await life.next_life()
    try:
        waits = await jobs.reach(life.job, JobState.QUEUED)
        assert waits.reason == "stopped: the platform was killed" and waits.exit_code == 0
        assert "saved" in jobs.files.read_log(life.job, 1, 0).data.decode()
        (attempt,) = jobs.attempts(life.job)
        end = read_end(jobs.files.end_file(life.job, 1, 0))
        assert end is not None and attempt.started_at is not None and attempt.ended_at is not None
        assert abs(attempt.ended_at.timestamp() - end.at) < 0.01
        assert life.billed_us() == 2 * ((attempt.ended_at - attempt.started_at) // timedelta(microseconds=1))
        jobs.check_books()
        await jobs.start(life.job)
        await jobs.says(life.job, "up", attempt=2)
        assert waits.losses == 0
    finally:
        await jobs.close()


async def test_after_a_kill_of_everything_it_counts_to_its_last_reading(tmp_path: Path, lives: list[Life]) -> None:
    life = Life(tmp_path, *SAVES)
    lives.append(life)
    before = life.billed_us()
    assert before > 0
    life.kill(everything=True)
    billed = life.billed_us()
    jobs = await life.next_life()
    try:
        waits = await jobs.reach(life.job, JobState.QUEUED)
        assert waits.reason == "lost: the platform was killed" and waits.losses == 1
        assert jobs.attempts(life.job)[0].outcome is AttemptOutcome.LOST
        assert before <= life.billed_us() == billed
        assert spawned(life.job) == []
        jobs.check_books()
        await jobs.start(life.job)
        await jobs.says(life.job, "up", attempt=2)
    finally:
        await jobs.close()


async def test_a_shim_that_is_killed_takes_its_job_along(tmp_path: Path, lives: list[Life]) -> None:
    life = Life(tmp_path, *SAVES)
    lives.append(life)
    (shim,) = shims(life.process.pid)
    os.kill(shim, signal.SIGKILL)
    life.wait_for("up", attempt=2)  # that platform starts all that waits
    first, *_ = life.jobs.attempts(life.job)
    assert (first.outcome, first.exit_code) == (AttemptOutcome.LOST, -9)
    life.kill(everything=True)
    jobs = await life.next_life()
    await jobs.reach(life.job, JobState.QUEUED)
    assert jobs.job(life.job).losses >= 1
    jobs.check_books()
    await jobs.close()


async def test_killed_again_and_again(tmp_path: Path, lives: list[Life]) -> None:
    """Each time at another moment; the books are right each time, and the job goes on."""
    Jobs(tmp_path).store.close()
    world = Jobs(tmp_path)
    job = world.submit(*SAVES)
    for round_ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.job_life", str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        await asyncio.sleep(0.09 * round_)
        process.kill()
        process.wait()
    world.store.close()
    jobs = await Jobs(tmp_path).open()
    try:
        waits = await jobs.reach(job, JobState.QUEUED)
        assert len(jobs.attempts(job)) == waits.attempts >= 1
        assert all(each.ended_at is not None for each in jobs.attempts(job))
        jobs.check_books()
        await jobs.until(lambda: spawned(job) == [])
    finally:
        await jobs.close()


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
async def test_a_clock_that_jumped_meanwhile_is_not_believed(tmp_path: Path, lives: list[Life], jump_s: float) -> None:
    life = Life(tmp_path, *SAVES)
    lives.append(life)
    life.kill(everything=True)
    billed = life.billed_us()
    life.jobs.files.end_file(life.job, 1, 0).write_bytes(
        msgspec.json.encode(ProcessEnd(0, time.time() + jump_s, "stopped"))
    )
    jobs = await life.next_life()
    try:
        await jobs.reach(life.job, JobState.QUEUED)
        covered_us = round(jobs.controller._ledger.hold_s(jobs.job(life.job)) * 1e6)
        assert billed <= life.billed_us() <= billed + covered_us
        assert life.billed_us() == (billed if jump_s < 0 else billed + covered_us)
        jobs.check_books()
    finally:
        await jobs.close()


async def test_one_that_was_taken_and_never_begun_waits_again(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = jobs.submit("true")
    with jobs.store.write() as connection:
        connection.exec_driver_sql("UPDATE jobs SET state = 'starting'")
    recovery = JobRecovery(jobs.store, jobs.files, jobs.controller._ledger, jobs.job(job))
    assert recovery.attempt() is None
    await jobs.open()
    assert (await jobs.reach(job, JobState.QUEUED)).reason == "the platform was killed"
    await jobs.start(job)
    await jobs.reach(job, JobState.SUCCEEDED)
    await jobs.close()
