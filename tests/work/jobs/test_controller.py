"""The life of jobs, with real processes: started, preempted, resumed, retried, cancelled; billed to the microsecond."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import EXAMPLE, Jobs, spawned
from tidemill.ledger.money import parse_amount
from tidemill.store.job_files import JobFiles
from tidemill.store.jobs import AttemptOutcome, JobState, ask_to_cancel

SLEEPER = ("sh", "-c", "echo up; trap 'echo saved; exit 7' TERM; sleep 60 & wait")
DEAF = ("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")


@pytest.fixture
async def jobs(tmp_path: Path) -> AsyncIterator[Jobs]:
    world = await Jobs(tmp_path).open()
    yield world
    await world.close()


async def test_a_job_runs_and_is_billed_for_its_time(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_TEST", "1")
    monkeypatch.setenv("SOME_CLOUD_TOKEN", "1")
    job = jobs.submit(
        "sh",
        "-c",
        "env; echo '{port}'; sleep 0.5; echo made > $TIDEMILL_ARTIFACT_DIR/it",
        env={"EPOCHS": "3", "LANG": "x"},
        devices=2,
    )
    await jobs.start(job, 2)
    done = await jobs.reach(job, JobState.SUCCEEDED)
    assert (done.exit_code, done.attempts, done.reason) == (0, 1, "")
    said = jobs.files.read_log(job, 1, 0).data.decode()
    variables = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    assert variables["EPOCHS"] == "3" and variables["LANG"] == "x" and "{port}" in said
    assert variables["TIDEMILL_ATTEMPT"] == "1" and variables["TIDEMILL_WORLD_SIZE"] == "1"
    assert variables["TIDEMILL_DEVICES"] == "local/0,local/1" and variables["OMP_NUM_THREADS"] == "2"
    assert not {"SECRET_OF_TEST", "SOME_CLOUD_TOKEN", "TIDEMILL_GIVEN_EPOCHS"} & variables.keys()
    assert [each.path for each in jobs.files.artifacts(job)] == ["it"]
    (row,) = jobs.rows()
    (attempt,) = jobs.attempts(job)
    assert attempt.started_at is not None and attempt.ended_at is not None
    assert row.device_us == 2 * done.ran_us >= 1_000_000
    assert attempt.ended_at - attempt.started_at == timedelta(microseconds=done.ran_us)
    assert jobs.balance() == parse_amount("100") - row.amount
    assert row.amount == pytest.approx(row.device_us * 1000 * 1e-3, abs=1)
    jobs.check_books()


@pytest.mark.slow
async def test_training_that_is_preempted_twice_ends_as_one_that_is_not(jobs: Jobs, tmp_path: Path) -> None:
    steps = ("--steps", "600", "--every", "100")
    alone = tmp_path / "alone"
    alone.mkdir()
    environment = {**os.environ, "TIDEMILL_CHECKPOINT_DIR": str(alone), "TIDEMILL_ARTIFACT_DIR": str(alone)}
    subprocess.run([sys.executable, str(EXAMPLE), *steps], check=True, env=environment, capture_output=True)

    job = jobs.train(*steps, "--pause", "0.01")
    for attempt, step in ((1, 100), (2, 300)):
        await jobs.start(job)
        await jobs.says(job, f"step {step}:", attempt=attempt)
        jobs.controller.preempt(job, "people come")
        assert (await jobs.reach(job, JobState.QUEUED)).reason == "preempted: people come"
    await jobs.start(job)
    await jobs.reach(job, JobState.SUCCEEDED)
    undisturbed = json.loads((alone / "result.json").read_text())
    fd = jobs.files.open_artifact(job, "result.json")
    with os.fdopen(fd) as file:
        assert json.load(file) == undisturbed
    assert undisturbed["accuracy"] > 0.9
    assert [each.outcome for each in jobs.attempts(job)] == [
        AttemptOutcome.PREEMPTED,
        AttemptOutcome.PREEMPTED,
        AttemptOutcome.SUCCEEDED,
    ]
    assert "begins at step 0" not in jobs.files.read_log(job, 2, 0).data.decode()
    jobs.check_books()


async def test_one_that_ignores_its_signal_is_killed_after_its_grace(jobs: Jobs) -> None:
    job = jobs.submit(*DEAF, grace_s=0.5)
    await jobs.start(job)
    await jobs.says(job, "up")
    jobs.controller.preempt(job, "people come")
    await jobs.until(lambda: jobs.controller.views()[0].phase == "stopping")
    assert (await jobs.reach(job, JobState.QUEUED)).exit_code == -9
    assert spawned(job) == []
    assert jobs.attempts(job)[0].outcome is AttemptOutcome.PREEMPTED
    jobs.check_books()


async def test_failures_are_retried_later_and_preemptions_do_not_count(jobs: Jobs) -> None:
    job = jobs.submit("sh", "-c", "echo up; test -e $TIDEMILL_CHECKPOINT_DIR/x && exit 3; sleep 60", retries=1)
    await jobs.start(job)
    await jobs.says(job, "up")
    jobs.controller.preempt(job, "people come")
    await jobs.reach(job, JobState.QUEUED)
    (jobs.files.checkpoints(job) / "x").touch()
    await jobs.start(job)
    await jobs.until(lambda: jobs.job(job).failures == 1)
    failed = jobs.job(job)
    assert failed.state is JobState.QUEUED and failed.reason == "ended with exit code 3; retry 1 of 1 in 10 s"
    assert failed.not_before is not None and failed.not_before > datetime.now(UTC)
    await jobs.until(lambda: [view.not_before > view.submitted_at for view in jobs.controller.views()] == [True])
    await jobs.start(job)  # the tide would wait
    over = await jobs.reach(job, JobState.FAILED)
    assert over.reason == "ended with exit code 3, 1 retries used up" and over.attempts == 3
    jobs.check_books()


async def test_a_program_that_is_not_there(jobs: Jobs) -> None:
    job = jobs.submit("no-such-program")
    await jobs.start(job)
    assert (await jobs.reach(job, JobState.FAILED)).reason == "ended with exit code 127"
    assert "there is no program 'no-such-program'" in jobs.files.read_log(job, 1, 0).data.decode()
    lost = jobs.submit("true", workdir="/no/such/directory")
    await jobs.start(lost)
    assert "there is no directory /no/such/directory" in (await jobs.reach(lost, JobState.FAILED)).reason
    assert [each.ended_at is not None for each in jobs.attempts(lost)] == [True]
    jobs.check_books()


async def test_cancelling(jobs: Jobs) -> None:
    waits, runs = jobs.submit("true"), jobs.submit(*SLEEPER)
    await jobs.start(runs)
    await jobs.says(runs, "up")
    for job in (waits, runs):
        with jobs.store.write() as connection:
            ask_to_cancel(connection, job, now=datetime.now(UTC))
    jobs.controller.wake()
    assert (await jobs.reach(runs, JobState.CANCELLED)).exit_code == 7
    assert jobs.job(waits).state is JobState.CANCELLED
    await jobs.says(runs, "saved")
    await jobs.until(lambda: not jobs.controller.views())
    jobs.check_books()


async def test_a_deadline_and_a_clock_that_jumps(jobs: Jobs) -> None:
    deadline = datetime.now(UTC) + timedelta(hours=1)
    waits = jobs.submit("true", deadline_at=deadline)
    runs = jobs.submit(*SLEEPER, deadline_at=deadline)
    await jobs.start(runs)
    await jobs.says(runs, "up")
    jobs.skew_s = 86_400.0  # a clock that is wrong for a while expires nothing, and bills nothing
    for _ in range(3):
        jobs.controller.wake()
        await jobs.until(lambda: not jobs.controller._wake.is_set())
    assert jobs.job(waits).state is JobState.QUEUED and jobs.job(runs).state is JobState.RUNNING
    jobs.skew_s = 0.0
    now = jobs.controller._clock.now
    jobs.controller._clock.now = lambda: now() + timedelta(hours=2)  # type: ignore[method-assign]
    assert (await jobs.reach(runs, JobState.EXPIRED)).reason.endswith("UTC has passed")
    assert (await jobs.reach(waits, JobState.EXPIRED)).reason == "its deadline passed before it could run"
    assert sum(row.device_us for row in jobs.rows()) < 3_600_000_000
    jobs.check_books()


async def test_a_job_without_money_waits(jobs: Jobs) -> None:
    job = jobs.submit("true", devices=2, grace_s=60_000.0)
    await jobs.start(job, 2)
    await jobs.until(lambda: "insufficient balance" in jobs.job(job).reason)
    await jobs.until(lambda: not jobs.controller._active[job].held)  # the store knows it first
    assert jobs.job(job).state is JobState.QUEUED and jobs.attempts(job) == []
    view = jobs.controller.views()[0]
    assert view.phase == "queued" and view.on == () and view.not_before > view.submitted_at
    jobs.check_books()


async def test_when_the_money_is_used_up_it_checkpoints_and_waits(tmp_path: Path) -> None:
    """A second costs 0.002: with 0.054 the hold for tick, grace and slack (25.2 s) cannot be renewed after 1.8 s."""
    jobs = await Jobs(tmp_path, balance="0.054").open()
    try:
        job = jobs.submit(*SLEEPER, devices=2)
        await jobs.start(job, 2)
        await jobs.until(lambda: [each.outcome for each in jobs.attempts(job)] not in ([], [None]))
        waits = jobs.job(job)
        assert waits.reason == "unpaid: insufficient balance" and waits.exit_code == 7
        assert jobs.attempts(job)[0].outcome is AttemptOutcome.UNPAID
        assert jobs.balance() > 0 and jobs.rows()[0].uncollected == 0
        jobs.check_books()
    finally:
        await jobs.close()


async def test_a_gang_falls_together_and_ranks_know_each_other(jobs: Jobs) -> None:
    script = "echo $TIDEMILL_RANK of $TIDEMILL_WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT on $TIDEMILL_DEVICES;"
    falls = "cd $TIDEMILL_CHECKPOINT_DIR; touch $TIDEMILL_RANK; until test -e 0; do sleep 0.05; done;"
    falls += "test $TIDEMILL_RANK = 1 && exit 5; sleep 60"
    job = jobs.submit("sh", "-c", script + falls, devices=2, per_device=True)
    await jobs.start(job, 2)
    assert (await jobs.reach(job, JobState.FAILED)).exit_code == 5
    first, second = (jobs.files.read_log(job, 1, rank).data.decode() for rank in (0, 1))
    assert first.startswith("0 of 2 at 127.0.0.1:") and first.endswith("on local/0\n")
    assert second == first.replace("0 of", "1 of").replace("local/0", "local/1")
    assert spawned(job) == []
    loose = jobs.submit("sh", "-c", "test $TIDEMILL_RANK = 1 && exit 5; sleep 0.5; echo whole", devices=2, gang=False)
    loose_ranks = jobs.submit(
        "sh", "-c", "test $TIDEMILL_RANK = 1 && exit 5; sleep 0.5; echo whole", devices=2, gang=False, per_device=True
    )
    for each in (loose, loose_ranks):
        await jobs.start(each, 2)
    await jobs.reach(loose, JobState.SUCCEEDED)
    await jobs.reach(loose_ranks, JobState.FAILED)
    assert jobs.files.read_log(loose_ranks, 1, 0).data == b"whole\n"
    jobs.check_books()


async def test_a_stopped_platform_takes_its_jobs_up_again(tmp_path: Path) -> None:
    jobs = await Jobs(tmp_path).open()
    job = jobs.submit(*SLEEPER, preemptible=False)
    await jobs.start(job)
    await jobs.says(job, "up")
    await jobs.close()
    jobs = await Jobs(tmp_path).open()
    try:
        assert jobs.job(job).reason == "stopped: the platform is stopped"
        assert [each.outcome for each in jobs.attempts(job)] == [AttemptOutcome.STOPPED]
        jobs.check_books()
        await jobs.start(job)
        await jobs.says(job, "up", attempt=2)
    finally:
        await jobs.close()


async def test_a_checkpoint_is_seen(jobs: Jobs) -> None:
    job = jobs.submit("sh", "-c", "sleep 0.3; echo > $TIDEMILL_CHECKPOINT_DIR/c; echo saved; sleep 60")
    await jobs.start(job)
    await jobs.says(job, "saved")
    jobs.controller.wake()
    active = jobs.controller._active[job]
    await jobs.until(lambda: active.saved > active.began)
    (view,) = jobs.controller.views()
    assert view.unsaved_s < view_age(view)


def view_age(view: Any) -> float:
    return datetime.now(UTC).timestamp() - float(view.started_at)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run jobs as another user")
async def test_jobs_of_another_user(tmp_path: Path) -> None:
    elsewhere = Path(tempfile.mkdtemp(prefix="tm-jobs-"))
    elsewhere.chmod(0o711)
    jobs = Jobs(tmp_path, files=JobFiles(elsewhere / "jobs", user="nobody"))
    try:
        await jobs.open()
        job = jobs.submit(
            "sh",
            "-c",
            f"id -un; echo $USER; cat {tmp_path}/tidemill.db && echo leaked; echo x > $TIDEMILL_ARTIFACT_DIR/it; "
            "touch ../attempts/1/x; sleep 60",
            env={"LD_PRELOAD": "/no/such/library.so"},
            grace_s=1.0,
        )
        await jobs.start(job)
        await jobs.says(job, "library.so")
        await jobs.says(job, "nobody\nnobody\n")
        await jobs.until(lambda: bool(jobs.files.artifacts(job)))
        said = jobs.files.read_log(job, 1, 0).data.decode()
        assert "leaked" not in said and "Permission denied" in said
        assert said.splitlines()[0].startswith("ERROR: ld.so")  # of the job's own program, no earlier
        assert [entry.name for entry in jobs.files.log(job, 1, 0).parent.iterdir()].count("x") == 0
        jobs.controller.preempt(job, "enough")
        await jobs.reach(job, JobState.QUEUED)
        assert spawned(job) == []
    finally:
        await jobs.close()
        shutil.rmtree(elsewhere)
