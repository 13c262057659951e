"""Jobs, queues and reservations in the store: each step leaves only the states that it may."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tidemill.errors import Conflict, NotFound
from tidemill.store.engine import Store
from tidemill.store.job_transitions import (
    begin_attempt,
    end_attempt,
    end_waiting,
    note_preempting,
    note_running,
    note_waiting,
    put_back,
)
from tidemill.store.jobs import (
    AssignedDevice,
    Attempt,
    AttemptOutcome,
    Job,
    JobSpec,
    JobState,
    TooManyJobs,
    ask_to_cancel,
    create_job,
    ended_before,
    find_job,
    list_attempts,
    list_jobs,
    new_job_id,
    open_jobs,
)
from tidemill.store.queues import Queue, find_queue, list_queues, remove_queue, set_queue
from tidemill.store.reservations import (
    OPEN,
    Reservation,
    ReservationState,
    cancel_reservation,
    create_reservation,
    find_reservation,
    list_reservations,
    step_reservation,
)
from tidemill.store.tenants import Tenant

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PLACES = (AssignedDevice("local/0", "local", "cpu"),)


def submitted(store: Store, acme: Tenant, *, minute: int = 0, **fields: Any) -> str:
    job = Job(
        job_id=new_job_id(),
        tenant_id=acme.tenant_id,
        site="site_1",
        name=fields.pop("name", "train"),
        queue="acme",
        spec=JobSpec(argv=("python", "train.py"), env={"A": "ß"}, kinds=("cpu",), estimate_s=1.5),
        submitted_at=NOW + timedelta(minutes=minute),
        **fields,
    )
    with store.write() as connection:
        create_job(connection, job, max_open=3)
    with store.read() as connection:
        assert find_job(connection, job.job_id) == job
    return job.job_id


def begun(store: Store, job: str) -> Attempt:
    with store.write() as connection:
        attempt = begin_attempt(connection, job, devices=PLACES, ranks=1, why="room", now=NOW)
    assert attempt is not None
    return attempt


def ended(store: Store, attempt: Attempt, outcome: AttemptOutcome, becomes: JobState) -> bool:
    with store.write() as connection:
        return end_attempt(
            connection,
            attempt,
            outcome=outcome,
            exit_code=0,
            reason="r",
            ended_at=NOW + timedelta(hours=1),
            ran_us=7,
            becomes=becomes,
            job_reason="j",
            not_before=NOW if becomes is JobState.QUEUED else None,
        )


def job_of(store: Store, job: str) -> Job:
    with store.read() as connection:
        return find_job(connection, job)


def test_from_attempt_to_attempt(store: Store, acme: Tenant) -> None:
    job = submitted(store, acme)
    first = begun(store, job)
    assert (first.attempt, first.devices, job_of(store, job).state) == (1, PLACES, JobState.STARTING)
    with store.write() as connection:
        assert begin_attempt(connection, job, devices=PLACES, ranks=1, why="again", now=NOW) is None
        note_running(connection, first, NOW)
        note_preempting(connection, job, "people come")
    assert job_of(store, job).state is JobState.PREEMPTING
    assert ended(store, first, AttemptOutcome.FAILED, JobState.QUEUED)
    assert not ended(store, first, AttemptOutcome.FAILED, JobState.QUEUED)  # written down once
    waits = job_of(store, job)
    assert (waits.failures, waits.losses, waits.ran_us, waits.not_before) == (1, 0, 7, NOW)
    for losses in (1, 2):
        assert ended(store, begun(store, job), AttemptOutcome.LOST, JobState.QUEUED)
        assert job_of(store, job).losses == losses
    last = begun(store, job)
    assert job_of(store, job).not_before is None
    assert ended(store, last, AttemptOutcome.SUCCEEDED, JobState.SUCCEEDED)
    done = job_of(store, job)
    assert done.finished and done.losses == 0 and done.attempts == 4 and done.ran_us == 28
    assert done.started_at == NOW and done.ended_at == NOW + timedelta(hours=1)
    with store.read() as connection:
        assert [each.outcome for each in list_attempts(connection, job)] == [
            AttemptOutcome.FAILED,
            AttemptOutcome.LOST,
            AttemptOutcome.LOST,
            AttemptOutcome.SUCCEEDED,
        ]
        assert ended_before(connection, "site_1", NOW + timedelta(hours=2)) == [job]
        assert ended_before(connection, "site_1", NOW) == []
        assert ended_before(connection, "site_2", NOW + timedelta(hours=2)) == []


def test_cancelling_and_steps_that_come_too_late(store: Store, acme: Tenant) -> None:
    waits, runs, over = (submitted(store, acme, minute=minute) for minute in range(3))
    begun(store, runs)
    ended(store, begun(store, over), AttemptOutcome.SUCCEEDED, JobState.SUCCEEDED)
    with store.write() as connection:
        assert ask_to_cancel(connection, waits, now=NOW).state is JobState.CANCELLED
        assert ask_to_cancel(connection, waits, now=NOW).state is JobState.CANCELLED
        assert ask_to_cancel(connection, runs, now=NOW).cancel_at == NOW
        with pytest.raises(Conflict, match="is over: succeeded"):
            ask_to_cancel(connection, over, now=NOW)
        with pytest.raises(NotFound):
            ask_to_cancel(connection, runs, now=NOW, tenant_id="ten_other")
        assert not end_waiting(connection, runs, JobState.EXPIRED, "late", NOW)
        note_waiting(connection, runs, "money")
        note_preempting(connection, waits, "late")
        assert begin_attempt(connection, waits, devices=PLACES, ranks=1, why="", now=NOW) is None
        put_back(connection, runs)  # its attempt is open
    assert job_of(store, runs).state is JobState.STARTING and job_of(store, waits).state is JobState.CANCELLED
    with store.read() as connection:
        assert [job.job_id for job in open_jobs(connection, "site_1")] == [runs]
        assert open_jobs(connection, "site_2") == []


def test_lists_names_and_bounds(store: Store, acme: Tenant) -> None:
    jobs = [submitted(store, acme, minute=minute) for minute in range(3)]
    with pytest.raises(TooManyJobs, match="3 unfinished jobs"):
        submitted(store, acme)
    assert job_of(store, "train").job_id == jobs[2]  # the newest of that name
    with store.read() as connection:
        page = list_jobs(connection, tenant_id=acme.tenant_id, limit=2)
        rest = list_jobs(connection, states=(JobState.QUEUED,), after=page[-1].job_id, limit=2)
        assert [job.job_id for job in (*page, *rest)] == jobs[::-1]
        assert list_jobs(connection, states=(JobState.RUNNING,)) == []
        with pytest.raises(NotFound):
            find_job(connection, "job_x")


def test_queues(store: Store, acme: Tenant) -> None:
    night = Queue(name="night", tenant_id=None, quota=4, created_at=NOW)
    own = Queue(name="acme", tenant_id=acme.tenant_id, borrow=0, weight=2, created_at=NOW)
    with store.write() as connection:
        set_queue(connection, night)
        set_queue(connection, own)
        assert (
            set_queue(connection, Queue(name="night", tenant_id=None, quota=5, created_at=NOW + timedelta(1))).quota
            == 5
        )
        with pytest.raises(Conflict):
            set_queue(connection, Queue(name="acme", tenant_id=None, created_at=NOW))
    submitted(store, acme)
    with store.write() as connection:
        assert [(each.name, each.quota, each.created_at) for each in list_queues(connection)] == [
            ("acme", 0, NOW),
            ("night", 5, NOW),
        ]
        with pytest.raises(Conflict, match="has unfinished jobs"):
            remove_queue(connection, "acme")
        remove_queue(connection, "night")
        assert find_queue(connection, "night") is None
        with pytest.raises(NotFound):
            remove_queue(connection, "night")


def test_reservations(store: Store, acme: Tenant) -> None:
    booked = Reservation(
        reservation_id="res_1",
        tenant_id=acme.tenant_id,
        kind="h800",
        devices=8,
        starts_at=NOW,
        ends_at=NOW + timedelta(days=1),
        lend=True,
        price_id="prc_1",
        created_at=NOW,
    )
    with store.write() as connection:
        create_reservation(connection, booked)
        assert find_reservation(connection, "res_1") == booked
        assert step_reservation(connection, "res_1", (ReservationState.BOOKED,), ReservationState.ACTIVE)
        assert not step_reservation(connection, "res_1", (ReservationState.BOOKED,), ReservationState.ACTIVE)
        assert len(list_reservations(connection, tenant_id=acme.tenant_id, states=OPEN)) == 1
        assert cancel_reservation(connection, "res_1", "by hand", now=NOW).reason == "by hand"
        with pytest.raises(Conflict, match="is over: cancelled"):
            cancel_reservation(connection, "res_1", "again", now=NOW)
        assert list_reservations(connection, states=OPEN) == [] and len(list_reservations(connection)) == 1
        with pytest.raises(NotFound, match="There is no reservation 'res_2'"):
            find_reservation(connection, "res_2")
