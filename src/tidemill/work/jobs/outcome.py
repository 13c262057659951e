"""What becomes of a job when an attempt at it has ended. Values in, values out."""

from datetime import datetime, timedelta

from tidemill.store.jobs import AttemptOutcome, Job, JobState
from tidemill.work.jobs.attempt_store import AttemptEnd
from tidemill.work.jobs.launch import RunEnd, StopCause

RETRY_FIRST_S = 10.0
RETRY_LONGEST_S = 600.0
MAX_LOSSES = 10
"""Attempts in a row that may be lost with the platform or a node: then the job itself is suspected."""
UNPAID_WAIT_S = 30.0
"""How long a job whose money was used up waits before the balance is looked at again."""

_STOPPED = {
    StopCause.PREEMPT: AttemptOutcome.PREEMPTED,
    StopCause.STOP: AttemptOutcome.STOPPED,
    StopCause.UNPAID: AttemptOutcome.UNPAID,
    StopCause.CANCEL: AttemptOutcome.CANCELLED,
    StopCause.EXPIRE: AttemptOutcome.EXPIRED,
}


def ending_of(job: Job, end: RunEnd, why: str, *, done: bool, now: datetime) -> AttemptEnd:
    """Decide. `why`: the words of who asked it to go; `done`: the job itself says that it is done.

    One that ended before it heard that it shall go has ended by itself. One that was asked to go and says that it is
    done, with exit code 0, has succeeded; otherwise it is taken up again from its checkpoint.
    """
    succeeded = end.exit_code == 0 and not end.cannot and not end.lost
    if end.cause is not None:
        final = end.cause in (StopCause.CANCEL, StopCause.EXPIRE)
        heard = not end.by_itself
        spared = succeeded and (not heard or (done and end.cause is not StopCause.CANCEL))
        if not spared and (heard or final):
            return _stopped(end, end.cause, why, now)
    if end.lost:
        return _lost(job, end, now)
    if succeeded:
        return _ending(end, AttemptOutcome.SUCCEEDED, "ended with exit code 0", JobState.SUCCEEDED, "")
    return _failed(job, end, now)


def _stopped(end: RunEnd, cause: StopCause, why: str, now: datetime) -> AttemptEnd:
    outcome = _STOPPED[cause]
    if cause is StopCause.CANCEL:
        return _ending(end, outcome, why, JobState.CANCELLED, why)
    if cause is StopCause.EXPIRE:
        return _ending(end, outcome, why, JobState.EXPIRED, why)
    later = now + timedelta(seconds=UNPAID_WAIT_S) if cause is StopCause.UNPAID else None
    return _ending(end, outcome, why, JobState.QUEUED, f"{outcome.value}: {why}", later)


def _lost(job: Job, end: RunEnd, now: datetime) -> AttemptEnd:
    if job.losses + 1 > MAX_LOSSES:
        reason = f"lost {job.losses + 1} times in a row ({end.lost})"
        return _ending(end, AttemptOutcome.LOST, reason, JobState.FAILED, reason)
    return _ending(end, AttemptOutcome.LOST, end.lost, JobState.QUEUED, f"lost: {end.lost}")


def _failed(job: Job, end: RunEnd, now: datetime) -> AttemptEnd:
    reason = end.cannot or _exit_text(end.exit_code)
    retries = job.spec.retries
    if job.failures >= retries:
        tried = f", {retries} retries used up" if retries else ""
        return _ending(end, AttemptOutcome.FAILED, reason, JobState.FAILED, reason + tried)
    wait_s = min(RETRY_FIRST_S * 2**job.failures, RETRY_LONGEST_S)
    text = f"{reason}; retry {job.failures + 1} of {retries} in {wait_s:.0f} s"
    return _ending(end, AttemptOutcome.FAILED, reason, JobState.QUEUED, text, now + timedelta(seconds=wait_s))


def _exit_text(code: int | None) -> str:
    if code is None:
        return "ended without an exit code"
    return f"ended with exit code {code}" if code >= 0 else f"killed by signal {-code}"


def _ending(
    end: RunEnd,
    outcome: AttemptOutcome,
    reason: str,
    becomes: JobState,
    job_reason: str,
    not_before: datetime | None = None,
) -> AttemptEnd:
    return AttemptEnd(
        outcome=outcome,
        exit_code=end.exit_code,
        reason=reason,
        ran_us=end.elapsed_us,
        becomes=becomes,
        job_reason=job_reason,
        not_before=not_before,
    )
