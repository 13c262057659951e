"""/api/v1/jobs"""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated

from litestar import get, post
from litestar.params import FromQuery, JSONBody, QueryParameter
from litestar.response import Stream
from msgspec import Meta, convert, field

from tidemill.control import jobs
from tidemill.control.api.access import Running, change, read
from tidemill.control.api.schemas import CONFLICT, FAILURES, Amount, Answer, Body, Currency, Instant, TenantRef
from tidemill.control.pages import MAX_PAGE, PAGE
from tidemill.store.jobs import list_attempts

_READ_BYTES = 256 * 1024


class JobSchema(Answer):
    """A job: a command that wants devices, or has them."""

    id: str
    tenant: Annotated[str, Meta(description="The tenant's name.")]
    name: str
    queue: str
    command: list[str]
    state: Annotated[
        str,
        Meta(
            description="`queued`, `starting`, `running`, `preempting`, `succeeded`, `failed`, `cancelled`, `expired`."
        ),
    ]
    reason: Annotated[str, Meta(description="Why it is in this state, or what it waits for.")]
    devices: int
    kinds: Annotated[list[str], Meta(description="In order of preference; empty: any kind with a price.")]
    gang: Annotated[bool, Meta(description="Start only when all devices are available.")]
    ranks: Annotated[str, Meta(description="One process for each `node` or `device`.")]
    preemptible: bool
    reservation: str | None
    priority: int
    deadline_at: str | None
    estimate_seconds: float | None
    checkpoint_signal: str
    grace_seconds: float
    retries: int
    attempts: int
    failures: int
    ran_seconds: Annotated[str, Meta(description="Run time of its earlier attempts.")]
    exit_code: int | None
    cancel_asked_at: str | None
    not_before: Annotated[str | None, Meta(description="A retry waits until then.")]
    submitted_at: Instant
    started_at: Annotated[str | None, Meta(description="When it was started for the first time.")]
    ended_at: str | None


class JobAttempt(Answer):
    """One time that a job was started."""

    attempt: int
    devices: list[str]
    kinds: list[str]
    ranks: Annotated[int, Meta(description="Processes.")]
    why: Annotated[str, Meta(description="Why it was started just then and there.")]
    taken_at: Instant
    started_at: str | None
    ended_at: str | None
    outcome: Annotated[str | None, Meta(examples=["succeeded", "failed", "preempted", "lost"])]
    exit_code: int | None
    reason: str
    device_seconds: str
    charge: Amount


class WholeJob(JobSchema):
    """A job with its attempts, and what it has cost until now."""

    env: Annotated[list[str], Meta(description="Names of the variables that it was given.")]
    workdir: str | None
    device_seconds: str
    charge: Amount
    currency: Currency
    history: list[JobAttempt]


class Jobs(Answer):
    """A page of jobs, newest first."""

    jobs: list[JobSchema]
    next: Annotated[str | None, Meta(description="`after` of the next page; null at the end.")]


class JobRequestSchema(Body):
    """A job to be run."""

    tenant: TenantRef
    command: Annotated[list[str], Meta(description="Program and arguments; no shell.")]
    name: str | None = None
    devices: int = 1
    kinds: Annotated[list[str], Meta(description="Kinds of devices, the best first; empty: any with a price.")] = field(
        default_factory=list
    )
    gang: bool = True
    ranks: Annotated[str | None, Meta(description="`node` or `device`; by `gang` when left out.")] = None
    preemptible: bool = True
    queue: Annotated[str | None, Meta(description="The tenant's own when left out.")] = None
    reservation: Annotated[str | None, Meta(description="Run on this reservation of the tenant.")] = None
    priority: int = 0
    deadline: Annotated[str | None, Meta(description="A time from now, a day or an instant.", examples=["6h"])] = None
    estimate: Annotated[str | None, Meta(description="How long it takes.", examples=["2h"])] = None
    checkpoint_signal: str = "TERM"
    grace: Annotated[str | None, Meta(description="What it gets to checkpoint in.", examples=["60s"])] = None
    retries: int = 0
    env: dict[str, str] = field(default_factory=dict)
    workdir: Annotated[str | None, Meta(description="An absolute path; a directory of its own when left out.")] = None


class JobRef(Body):
    """A job to be cancelled."""

    job: Annotated[str, Meta(description="Its id or name.", examples=["job_7k3m"])]


class JobLog(Answer):
    """A part of what a process of a job has said."""

    job: str
    attempt: int
    rank: int
    text: str
    next: Annotated[str, Meta(description="`cursor` of the next part; the same again: nothing new yet.")]
    ended: Annotated[bool, Meta(description="The attempt is over: when `text` is empty, there will be no more.")]


class ArtifactSchema(Answer):
    """A file that a job has made for its owner."""

    path: str
    bytes: int
    modified_at: Instant


class Artifacts(Answer):
    """The artefacts of a job."""

    job: str
    artifacts: list[ArtifactSchema]


JobParam = Annotated[str, QueryParameter(description="A job's id, or the newest of that name.")]


@get("/jobs", responses=FAILURES)
async def list_jobs(
    platform: Running,
    tenant: FromQuery[str | None] = None,
    status: Annotated[str | None, QueryParameter(description="Only in this state.")] = None,
    unfinished: Annotated[bool, QueryParameter(description="Only those that are not over.")] = False,
    after: Annotated[str | None, QueryParameter(description="`next` of the page before.")] = None,
    limit: Annotated[int, QueryParameter(description=f"Jobs in a page, 1 to {MAX_PAGE}.")] = PAGE,
) -> Jobs:
    """List the jobs of all tenants, or with `tenant` (a name or an id) of one, newest first."""
    found = await read(
        platform,
        lambda connection: jobs.list_jobs(
            connection,
            tenant,
            states=() if status is None else (status,),
            unfinished=unfinished,
            after=after,
            limit=limit,
        ),
    )
    return convert(found, Jobs)


@post("/jobs", status_code=200, responses=FAILURES)
async def submit_job(platform: Running, data: JSONBody[JobRequestSchema]) -> JobSchema:
    """Have a command run on devices, as soon as there is room for it."""
    now, limits = datetime.now(UTC), platform.job_limits
    request = convert(data, jobs.JobRequest, from_attributes=True)
    made = await change(
        platform, lambda connection: jobs.submit_job(connection, request, limits, zone=platform.zone, now=now)
    )
    platform.wake_jobs()
    return convert(made, JobSchema)


@get("/jobs/show", responses=FAILURES)
async def show_job(platform: Running, job: JobParam) -> WholeJob:
    """One job with its attempts, and what it has cost until now."""
    return convert(await read(platform, lambda connection: jobs.show_job(connection, job)), WholeJob)


@post("/jobs/cancel", status_code=200, responses=CONFLICT)
async def cancel_job(platform: Running, data: JSONBody[JobRef]) -> JobSchema:
    """Have a job cancelled. One that runs gets its signal and its grace."""
    now = datetime.now(UTC)
    asked = await change(platform, lambda connection: jobs.cancel_job(connection, data.job, now=now))
    platform.wake_jobs()
    return convert(asked, JobSchema)


@get("/jobs/logs", responses=FAILURES)
async def job_logs(
    platform: Running,
    job: JobParam,
    attempt: Annotated[int | None, QueryParameter(description="The last one when left out.")] = None,
    rank: Annotated[int, QueryParameter(description="Which process; they count from 0.")] = 0,
    cursor: Annotated[str, QueryParameter(description="`next` of the part before; from the beginning without.")] = "",
) -> JobLog:
    """What a process of a job has said: a part of at most 256 KiB. Long logs lose their beginning."""
    found = await read(platform, lambda connection: jobs.find(connection, job))
    attempts = await read(platform, lambda connection: list_attempts(connection, found.job_id))
    number = attempt if attempt is not None else max((each.attempt for each in attempts), default=0)
    ended = any(each.attempt == number and each.ended_at is not None for each in attempts) or found.finished
    piece = await asyncio.to_thread(platform.job_files.read_log, found.job_id, number, rank, cursor)
    return JobLog(
        job=found.job_id,
        attempt=number,
        rank=rank,
        text=piece.data.decode(errors="replace"),
        next=piece.next,
        ended=ended,
    )


@get("/jobs/artifacts", responses=FAILURES)
async def job_artifacts(platform: Running, job: JobParam) -> Artifacts:
    """List what a job has made for its owner."""
    found = await read(platform, lambda connection: jobs.find(connection, job))
    listed = await asyncio.to_thread(platform.job_files.artifacts, found.job_id)
    return Artifacts(
        job=found.job_id,
        artifacts=[
            ArtifactSchema(each.path, each.bytes, datetime.fromtimestamp(each.modified_at, UTC).isoformat())
            for each in listed
        ],
    )


@get("/jobs/artifact", media_type="application/octet-stream", responses=FAILURES)
async def job_artifact(
    platform: Running,
    job: JobParam,
    path: Annotated[str, QueryParameter(description="As listed.")],
) -> Stream:
    """Download one artefact."""
    found = await read(platform, lambda connection: jobs.find(connection, job))
    fd = await asyncio.to_thread(platform.job_files.open_artifact, found.job_id, path)
    size = os.fstat(fd).st_size
    return Stream(_chunks(fd), media_type="application/octet-stream", headers={"x-artifact-bytes": str(size)})


async def _chunks(fd: int) -> AsyncIterator[bytes]:
    try:
        while data := await asyncio.to_thread(os.read, fd, _READ_BYTES):
            yield data
    finally:
        os.close(fd)
