"""The steps of a job's state and of its attempts, as `work.jobs.controller` takes them.

Each step names the states that it may leave, in the statement that takes it.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, case, func, insert, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.store.jobs import (
    HELD,
    MAX_REASON,
    UNFINISHED,
    AssignedDevice,
    Attempt,
    AttemptOutcome,
    JobState,
    state_values,
)
from tidemill.store.tables.jobs import job_attempts, jobs


def begin_attempt(
    connection: Connection, job_id: str, *, devices: Sequence[AssignedDevice], ranks: int, why: str, now: datetime
) -> Attempt | None:
    """Begin a waiting job with these devices; None when it does not wait any more."""
    taken = connection.execute(
        update(jobs)
        .where(jobs.c.job_id == job_id, jobs.c.state == JobState.QUEUED.value, jobs.c.cancel_at.is_(None))
        .values(
            state=JobState.STARTING.value,
            reason=why[:MAX_REASON],
            attempts=jobs.c.attempts + 1,
            not_before=None,
            started_at=func.coalesce(jobs.c.started_at, to_micros(now)),
        )
    )
    if taken.rowcount != 1:
        return None
    number = connection.execute(select(jobs.c.attempts).where(jobs.c.job_id == job_id)).scalar_one()
    attempt = Attempt(
        job_id=job_id,
        attempt=int(number),
        devices=tuple(devices),
        ranks=ranks,
        why=why[:MAX_REASON],
        taken_at=from_micros(to_micros(now)),
    )
    connection.execute(
        insert(job_attempts).values(
            job_id=job_id,
            attempt=attempt.attempt,
            devices=msgspec.json.encode(attempt.devices).decode(),
            ranks=ranks,
            why=attempt.why,
            taken_at=to_micros(now),
            reason="",
        )
    )
    return attempt


def note_running(connection: Connection, attempt: Attempt, now: datetime) -> None:
    """The attempt's processes run."""
    there = (job_attempts.c.job_id == attempt.job_id, job_attempts.c.attempt == attempt.attempt)
    connection.execute(update(job_attempts).where(*there).values(started_at=to_micros(now)))
    _step(connection, attempt.job_id, (JobState.STARTING,), state=JobState.RUNNING.value)


def note_preempting(connection: Connection, job_id: str, reason: str) -> None:
    """The job was asked to checkpoint and go."""
    leaving = (JobState.STARTING, JobState.RUNNING)
    _step(connection, job_id, leaving, state=JobState.PREEMPTING.value, reason=reason[:MAX_REASON])


def still_open(connection: Connection, attempt: Attempt) -> bool:
    """Whether an attempt has not been ended. Nobody else ends it until the commit."""
    there = (job_attempts.c.job_id == attempt.job_id, job_attempts.c.attempt == attempt.attempt)
    row = connection.execute(select(job_attempts.c.ended_at).where(*there).with_for_update()).first()
    return row is not None and row.ended_at is None


def end_attempt(
    connection: Connection,
    attempt: Attempt,
    *,
    outcome: AttemptOutcome,
    exit_code: int | None,
    reason: str,
    ended_at: datetime,
    ran_us: int,
    becomes: JobState,
    job_reason: str,
    not_before: datetime | None = None,
) -> bool:
    """Write down how an attempt ended and what becomes of the job; False when that was done already.

    A job that would wait again is cancelled instead when that was asked for meanwhile.
    """
    ended = connection.execute(
        update(job_attempts)
        .where(
            job_attempts.c.job_id == attempt.job_id,
            job_attempts.c.attempt == attempt.attempt,
            job_attempts.c.ended_at.is_(None),
        )
        .values(ended_at=to_micros(ended_at), outcome=outcome.value, exit_code=exit_code, reason=reason[:MAX_REASON])
    )
    if ended.rowcount != 1:
        return False
    at = to_micros(ended_at)
    if becomes in UNFINISHED:
        steps = _again(becomes, job_reason, at)
    else:
        steps = {"state": becomes.value, "reason": job_reason[:MAX_REASON], "ended_at": at}
    _step(
        connection,
        attempt.job_id,
        HELD,
        **steps,
        exit_code=exit_code,
        failures=jobs.c.failures + int(outcome is AttemptOutcome.FAILED),
        losses=jobs.c.losses + 1 if outcome is AttemptOutcome.LOST else 0,
        ran_us=jobs.c.ran_us + ran_us,
        not_before=None if not_before is None else to_micros(not_before),
    )
    return True


def end_waiting(connection: Connection, job_id: str, state: JobState, reason: str, now: datetime) -> bool:
    """End a job that waits; False when it does not wait any more."""
    values = {"state": state.value, "reason": reason[:MAX_REASON], "ended_at": to_micros(now)}
    return _step(connection, job_id, (JobState.QUEUED,), **values)


def note_waiting(connection: Connection, job_id: str, reason: str, not_before: datetime | None = None) -> None:
    """Say what a waiting job waits for."""
    until = None if not_before is None else to_micros(not_before)
    _step(connection, job_id, (JobState.QUEUED,), reason=reason[:MAX_REASON], not_before=until)


def put_back(connection: Connection, job_id: str) -> None:
    """Let a job wait again of which no attempt is open: the platform was killed in between."""
    steps = _again(JobState.QUEUED, "the platform was killed", jobs.c.cancel_at)
    open_attempt = select(job_attempts.c.job_id).where(job_attempts.c.ended_at.is_(None))
    where = (jobs.c.job_id == job_id, jobs.c.state.in_(state_values(HELD)), jobs.c.job_id.not_in(open_attempt))
    connection.execute(update(jobs).where(*where).values(**steps))


def _again(state: JobState, reason: str, ended_at: Any) -> dict[str, Any]:
    """It goes on, unless its cancelling was asked for."""
    asked = jobs.c.cancel_at.is_not(None)
    return {
        "state": case((asked, JobState.CANCELLED.value), else_=state.value),
        "reason": case((asked, "cancelled"), else_=reason[:MAX_REASON]),
        "ended_at": case((asked, ended_at), else_=None),
    }


def leave_reservation(connection: Connection, job_id: str) -> None:
    """The reservation is over: from here on it is a job like others."""
    connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(reservation_id=None))


def _step(connection: Connection, job_id: str, leaving: Sequence[JobState], **values: Any) -> bool:
    where = (jobs.c.job_id == job_id, jobs.c.state.in_(state_values(leaving)))
    return connection.execute(update(jobs).where(*where).values(**values)).rowcount == 1
