"""Jobs: commands that want devices; their states, and each attempt at them.

    queued -> starting -> running -> succeeded | failed
    running -> preempting -> queued (preempted, lost, out of money, the platform stopped)
    any of these -> cancelled | expired

Tenants and operators make a job and ask for its cancelling: that is here, and what is read of jobs. All other steps are
the job controller's (`store.job_transitions`).
"""

from collections.abc import Collection
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, case, func, insert, select, tuple_, update

from tidemill.clock import from_micros, to_micros
from tidemill.errors import Conflict, NotFound, TidemillError
from tidemill.store.ids import new_id
from tidemill.store.tables.jobs import job_attempts, jobs
from tidemill.store.tables.tenants import tenants

MAX_REASON = 500
"""Characters of a reason that are kept."""


class JobState(StrEnum):
    """Where a job is in its lifecycle."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PREEMPTING = "preempting"
    """It was asked to checkpoint and go: for something more urgent, as it was cancelled, as its money is used up."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """Its deadline came first."""


UNFINISHED = (JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.PREEMPTING)
HELD = (JobState.STARTING, JobState.RUNNING, JobState.PREEMPTING)
"""It has devices."""


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    PREEMPTED = "preempted"
    STOPPED = "stopped"
    """The platform was stopped."""
    LOST = "lost"
    """The platform or a node was lost with it."""
    UNPAID = "unpaid"
    """The balance was used up."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class TooManyJobs(TidemillError):
    """The tenant has as many unfinished jobs as it may have."""

    status = 429
    code = "job_limit_exceeded"


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is to do, as it was submitted."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    workdir: str | None = None
    """Where it runs; None: a directory of its own."""
    devices: int = 1
    kinds: tuple[str, ...] = ()
    """Kinds of devices that it runs on, the best first; empty: any that has a price."""
    gang: bool = True
    per_device: bool = False
    """One process for each device; otherwise one for each node."""
    priority: int = 0
    estimate_s: float | None = None
    """How long it takes on all its devices, as its owner thinks."""
    grace_s: float = 60.0
    """What it gets to checkpoint in."""
    signal: str = "TERM"
    retries: int = 0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job of a tenant."""

    job_id: str
    tenant_id: str
    site: str
    name: str
    queue: str
    spec: JobSpec
    preemptible: bool = True
    reservation_id: str | None = None
    """It runs on what its tenant has reserved, and is not billed for it once more."""
    state: JobState = JobState.QUEUED
    reason: str = ""
    """Why it is in this state, or what it waits for."""
    attempts: int = 0
    failures: int = 0
    losses: int = 0
    """Attempts in a row that were lost with the platform or a node."""
    ran_us: int = 0
    """Time that earlier attempts ran, microseconds."""
    exit_code: int | None = None
    deadline_at: datetime | None = None
    submitted_at: datetime
    not_before: datetime | None = None
    """A retry waits until then."""
    cancel_at: datetime | None = None
    """When its cancelling was asked for."""
    started_at: datetime | None = None
    """When it was started for the first time."""
    ended_at: datetime | None = None

    @property
    def finished(self) -> bool:
        return self.state not in UNFINISHED


class AssignedDevice(msgspec.Struct, frozen=True):
    """A device that an attempt has."""

    id: str
    node: str
    kind: str


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One time that a job was started. Attempts count from 1."""

    job_id: str
    attempt: int
    devices: tuple[AssignedDevice, ...]
    ranks: int
    why: str = ""
    """Why it was started just then and there."""
    taken_at: datetime
    """When it got its devices."""
    started_at: datetime | None = None
    """When its processes ran."""
    ended_at: datetime | None = None
    outcome: AttemptOutcome | None = None
    exit_code: int | None = None
    reason: str = ""


def create_job(connection: Connection, job: Job, *, max_open: int) -> None:
    """Enter a new job. Raises TooManyJobs."""
    connection.execute(
        select(tenants.c.tenant_id).where(tenants.c.tenant_id == job.tenant_id).with_for_update(key_share=True)
    )
    unfinished = connection.execute(
        select(func.count())
        .select_from(jobs)
        .where(jobs.c.tenant_id == job.tenant_id, jobs.c.state.in_(state_values(UNFINISHED)))
    ).scalar_one()
    if unfinished >= max_open:
        raise TooManyJobs(
            f"There are {unfinished} unfinished jobs, which is the maximum.", hint="Wait until one has finished."
        )
    connection.execute(
        insert(jobs).values(
            job_id=job.job_id,
            tenant_id=job.tenant_id,
            site=job.site,
            name=job.name,
            queue=job.queue,
            spec=msgspec.json.encode(job.spec).decode(),
            preemptible=job.preemptible,
            reservation_id=job.reservation_id,
            state=job.state.value,
            reason=job.reason,
            attempts=0,
            failures=0,
            losses=0,
            ran_us=0,
            deadline_at=None if job.deadline_at is None else to_micros(job.deadline_at),
            submitted_at=to_micros(job.submitted_at),
        )
    )


def new_job_id() -> str:
    return new_id("job")


def find_job(connection: Connection, job_id: str, *, tenant_id: str | None = None) -> Job:
    """A job by its id, or the newest one of that name. Raises NotFound, also for another tenant's."""
    query = select(jobs).where((jobs.c.job_id == job_id) | (jobs.c.name == job_id))
    if tenant_id is not None:
        query = query.where(jobs.c.tenant_id == tenant_id)
    row = connection.execute(query.order_by(jobs.c.job_id != job_id, jobs.c.submitted_at.desc()).limit(1)).first()
    if row is None:
        raise NotFound(f"There is no job {job_id[:80]!r}.", hint="List the jobs to see their ids.", param="job")
    return _job(row)


def list_jobs(
    connection: Connection,
    *,
    tenant_id: str | None = None,
    states: Collection[JobState] = (),
    after: str | None = None,
    limit: int = 100,
) -> list[Job]:
    """A page of jobs, newest first, behind the job `after`. Raises NotFound for that one."""
    query = select(jobs)
    if tenant_id is not None:
        query = query.where(jobs.c.tenant_id == tenant_id)
    if states:
        query = query.where(jobs.c.state.in_(state_values(states)))
    if after is not None:
        last = find_job(connection, after, tenant_id=tenant_id)
        query = query.where(tuple_(jobs.c.submitted_at, jobs.c.job_id) < (to_micros(last.submitted_at), last.job_id))
    query = query.order_by(jobs.c.submitted_at.desc(), jobs.c.job_id.desc()).limit(limit)
    return [_job(row) for row in connection.execute(query)]


def list_attempts(connection: Connection, job_id: str) -> list[Attempt]:
    """The attempts at a job, in order."""
    query = select(job_attempts).where(job_attempts.c.job_id == job_id).order_by(job_attempts.c.attempt)
    return [_attempt(row) for row in connection.execute(query)]


def ask_to_cancel(connection: Connection, job_id: str, *, now: datetime, tenant_id: str | None = None) -> Job:
    """Have a job cancelled; one that waits is cancelled at once.

    Raises NotFound; Conflict when it is over.
    """
    job = find_job(connection, job_id, tenant_id=tenant_id)
    at, waits = to_micros(now), jobs.c.state == JobState.QUEUED.value
    # One statement: it may be put back in the queue at the same time, and what it is once its row is locked decides.
    connection.execute(
        update(jobs)
        .where(jobs.c.job_id == job.job_id, jobs.c.state.in_(state_values(UNFINISHED)))
        .values(
            state=case((waits, JobState.CANCELLED.value), else_=jobs.c.state),
            reason=case((waits, "cancelled while it waited"), else_=jobs.c.reason),
            cancel_at=func.coalesce(jobs.c.cancel_at, at),
            ended_at=case((waits, at), else_=jobs.c.ended_at),
        )
    )
    asked = find_job(connection, job.job_id)
    if asked.finished and asked.state is not JobState.CANCELLED:
        raise Conflict(f"The job {job.job_id} is over: {asked.state}.", hint="There is nothing to cancel.")
    return asked


def open_jobs(connection: Connection, site: str) -> list[Job]:
    """The unfinished jobs of a site, oldest first."""
    query = select(jobs).where(jobs.c.site == site, jobs.c.state.in_(state_values(UNFINISHED)))
    return [_job(row) for row in connection.execute(query.order_by(jobs.c.submitted_at, jobs.c.job_id))]


def devices_on(connection: Connection, reservation_id: str) -> int:
    """How many devices the jobs have that run on a reservation."""
    rows = connection.execute(
        select(job_attempts.c.devices)
        .join(jobs, jobs.c.job_id == job_attempts.c.job_id)
        .where(jobs.c.reservation_id == reservation_id, job_attempts.c.ended_at.is_(None))
    )
    return sum(len(_decode_devices(text)) for text in rows.scalars())


def ended_before(connection: Connection, site: str, instant: datetime) -> list[str]:
    """The jobs of a site that were over before `instant`."""
    query = select(jobs.c.job_id).where(jobs.c.site == site, jobs.c.ended_at < to_micros(instant))
    return [str(job_id) for job_id in connection.execute(query).scalars()]


def state_values(states: Collection[JobState]) -> list[str]:
    """The states as the store writes them."""
    return [state.value for state in states]


_decode_spec = msgspec.json.Decoder(JobSpec).decode
_decode_devices = msgspec.json.Decoder(tuple[AssignedDevice, ...]).decode


def _instants(row: Row[Any], *names: str) -> dict[str, datetime | None]:
    return {name: None if (micros := row._mapping[name]) is None else from_micros(micros) for name in names}


def _job(row: Row[Any]) -> Job:
    values: dict[str, Any] = dict(row._mapping)
    values |= _instants(row, "deadline_at", "submitted_at", "not_before", "cancel_at", "started_at", "ended_at")
    values["spec"] = _decode_spec(row.spec)
    values["state"] = JobState(row.state)
    return Job(**values)


def _attempt(row: Row[Any]) -> Attempt:
    values: dict[str, Any] = dict(row._mapping)
    values |= _instants(row, "taken_at", "started_at", "ended_at")
    values["devices"] = _decode_devices(row.devices)
    values["outcome"] = None if row.outcome is None else AttemptOutcome(row.outcome)
    return Attempt(**values)
