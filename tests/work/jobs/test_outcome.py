"""What becomes of a job when an attempt has ended: every way that it can end."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from tidemill.store.jobs import AttemptOutcome, Job, JobSpec, JobState
from tidemill.work.jobs.launch import RunEnd, StopCause
from tidemill.work.jobs.outcome import MAX_LOSSES, RETRY_LONGEST_S, ending_of

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def job(**fields: Any) -> Job:
    spec = JobSpec(argv=("true",), retries=fields.pop("retries", 0))
    return Job(job_id="job_1", tenant_id="ten_1", site="s", name="j", queue="q", spec=spec, submitted_at=NOW, **fields)


def end(**fields: Any) -> RunEnd:
    return RunEnd(**{"elapsed_us": 5, "exit_code": 0, "by_itself": True, **fields})


@pytest.mark.parametrize(
    ("how", "done", "outcome", "becomes"),
    [
        (end(), False, AttemptOutcome.SUCCEEDED, JobState.SUCCEEDED),
        (end(exit_code=3), False, AttemptOutcome.FAILED, JobState.FAILED),
        (end(exit_code=3), True, AttemptOutcome.FAILED, JobState.FAILED),
        (end(exit_code=-11), False, AttemptOutcome.FAILED, JobState.FAILED),
        (end(exit_code=None, by_itself=False, cannot="no such program"), False, AttemptOutcome.FAILED, JobState.FAILED),
        (end(exit_code=None, by_itself=False, lost="node lost"), False, AttemptOutcome.LOST, JobState.QUEUED),
        # asked to go, and it did
        (end(cause=StopCause.PREEMPT, by_itself=False), False, AttemptOutcome.PREEMPTED, JobState.QUEUED),
        (
            end(cause=StopCause.PREEMPT, by_itself=False, exit_code=-15),
            False,
            AttemptOutcome.PREEMPTED,
            JobState.QUEUED,
        ),
        (end(cause=StopCause.STOP, by_itself=False, exit_code=-9), True, AttemptOutcome.STOPPED, JobState.QUEUED),
        (end(cause=StopCause.UNPAID, by_itself=False), False, AttemptOutcome.UNPAID, JobState.QUEUED),
        (end(cause=StopCause.CANCEL, by_itself=False), False, AttemptOutcome.CANCELLED, JobState.CANCELLED),
        (end(cause=StopCause.EXPIRE, by_itself=False), False, AttemptOutcome.EXPIRED, JobState.EXPIRED),
        # before it had begun
        (
            end(cause=StopCause.PREEMPT, by_itself=False, exit_code=None),
            False,
            AttemptOutcome.PREEMPTED,
            JobState.QUEUED,
        ),
        (
            end(cause=StopCause.PREEMPT, by_itself=False, exit_code=None, cannot="x"),
            False,
            AttemptOutcome.PREEMPTED,
            JobState.QUEUED,
        ),
        # it says that it is done
        (end(cause=StopCause.PREEMPT, by_itself=False), True, AttemptOutcome.SUCCEEDED, JobState.SUCCEEDED),
        (end(cause=StopCause.EXPIRE, by_itself=False), True, AttemptOutcome.SUCCEEDED, JobState.SUCCEEDED),
        (end(cause=StopCause.CANCEL, by_itself=False), True, AttemptOutcome.CANCELLED, JobState.CANCELLED),
        # it ended before it heard
        (end(cause=StopCause.PREEMPT), False, AttemptOutcome.SUCCEEDED, JobState.SUCCEEDED),
        (end(cause=StopCause.CANCEL), False, AttemptOutcome.SUCCEEDED, JobState.SUCCEEDED),
        (end(cause=StopCause.PREEMPT, exit_code=3), False, AttemptOutcome.FAILED, JobState.FAILED),
        (end(cause=StopCause.CANCEL, exit_code=3), False, AttemptOutcome.CANCELLED, JobState.CANCELLED),
        (end(cause=StopCause.EXPIRE, exit_code=3), False, AttemptOutcome.EXPIRED, JobState.EXPIRED),
    ],
)
def test_what_becomes_of_it(how: RunEnd, done: bool, outcome: AttemptOutcome, becomes: JobState) -> None:
    ending = ending_of(job(), how, "why", done=done, now=NOW)
    assert (ending.outcome, ending.becomes, ending.ran_us) == (outcome, becomes, 5)


def test_retries_wait_longer_each_time() -> None:
    waits = []
    for failures in range(9):
        ending = ending_of(job(retries=9, failures=failures), end(exit_code=1), "", done=False, now=NOW)
        assert ending.becomes is JobState.QUEUED and ending.not_before is not None
        waits.append((ending.not_before - NOW).total_seconds())
    assert waits == sorted(waits) and waits[0] == 10 and waits[-1] == RETRY_LONGEST_S
    assert ending_of(job(retries=9, failures=9), end(exit_code=1), "", done=False, now=NOW).becomes is JobState.FAILED


def test_one_that_takes_its_node_along_each_time_is_given_up() -> None:
    lost = end(exit_code=None, by_itself=False, lost="node lost")
    assert ending_of(job(losses=MAX_LOSSES - 1), lost, "", done=False, now=NOW).becomes is JobState.QUEUED
    given_up = ending_of(job(losses=MAX_LOSSES), lost, "", done=False, now=NOW)
    assert given_up.becomes is JobState.FAILED and "11 times in a row (node lost)" in given_up.reason


def test_one_without_money_waits_a_while() -> None:
    ending = ending_of(job(), end(cause=StopCause.UNPAID, by_itself=False), "insufficient balance", done=False, now=NOW)
    assert ending.job_reason == "unpaid: insufficient balance" and ending.not_before is not None
    assert ending.not_before > NOW + timedelta(seconds=1)
    assert msgspec.to_builtins(ending)["becomes"] == "queued"
