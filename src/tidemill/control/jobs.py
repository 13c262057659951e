"""Jobs as operators see them: submitted, listed with what they have cost, cancelled.

Plain values in and out.
"""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection

from tidemill.control.names import check_text, read_duration, read_expiry, tenant_named
from tidemill.control.pages import PAGE, check_limit
from tidemill.errors import BadInput
from tidemill.ledger.devices import seconds_text
from tidemill.ledger.money import format_amount
from tidemill.store import jobs as job_store
from tidemill.store.device_meters import meter_rows
from tidemill.store.job_submission import JobLimits, JobSubmission
from tidemill.store.job_submission import submit as store_job
from tidemill.store.jobs import UNFINISHED, Attempt, Job, JobState
from tidemill.store.tenants import Tenant, list_tenants
from tidemill.suggestions import did_you_mean

Json = dict[str, Any]


class JobRequest(msgspec.Struct, kw_only=True):
    """What an operator asks for, as it was written."""

    tenant: str
    command: list[str]
    name: str | None = None
    devices: int = 1
    kinds: list[str] = []
    gang: bool = True
    ranks: str | None = None
    preemptible: bool = True
    queue: str | None = None
    reservation: str | None = None
    priority: int = 0
    deadline: str | None = None
    estimate: str | None = None
    checkpoint_signal: str = "TERM"
    grace: str | None = None
    retries: int = 0
    env: dict[str, str] = {}
    workdir: str | None = None


def submit_job(connection: Connection, request: JobRequest, limits: JobLimits, *, zone: str, now: datetime) -> Json:
    """Enter a job. Raises BadInput, NotFound, TooManyJobs."""
    owner = tenant_named(connection, request.tenant)
    if request.ranks not in (None, "node", "device"):
        raise BadInput(f"ranks must be node or device, not {request.ranks[:20]!r}.", param="ranks")
    deadline = None if request.deadline is None else read_expiry("deadline", request.deadline, zone=zone, now=now)
    submission = JobSubmission(
        argv=tuple(request.command),
        name=request.name,
        devices=request.devices,
        kinds=tuple(request.kinds),
        gang=request.gang,
        per_device=None if request.ranks is None else request.ranks == "device",
        preemptible=request.preemptible,
        queue=request.queue,
        reservation=request.reservation,
        priority=request.priority,
        deadline_at=deadline,
        estimate_s=_seconds("estimate", request.estimate),
        signal=request.checkpoint_signal.upper().removeprefix("SIG"),
        grace_s=_seconds("grace", request.grace),
        retries=request.retries,
        env=request.env,
        workdir=request.workdir,
    )
    return job_json(store_job(connection, submission, owner, limits, now=now), owner)


def list_jobs(
    connection: Connection,
    tenant: str | None,
    *,
    states: Collection[str] = (),
    unfinished: bool = False,
    after: str | None = None,
    limit: int = PAGE,
) -> Json:
    """A page of jobs, newest first; `next` is the `after` of the next one, or None.

    Raises NotFound, BadInput.
    """
    check_limit(limit)
    wanted = [_state(text) for text in states] + (list(UNFINISHED) if unfinished else [])
    owners = {each.tenant_id: each for each in list_tenants(connection)}
    tenant_id = None if tenant is None else tenant_named(connection, tenant).tenant_id
    found = job_store.list_jobs(connection, tenant_id=tenant_id, states=wanted, after=after, limit=limit + 1)
    return {
        "jobs": [job_json(job, owners[job.tenant_id]) for job in found[:limit]],
        "next": found[limit - 1].job_id if len(found) > limit else None,
    }


def show_job(connection: Connection, job: str) -> Json:
    """A job, its attempts, and what it has cost until now. Raises NotFound."""
    found = find(connection, job)
    owner = _owner(connection, found)
    rows = meter_rows(connection, tenant_id=found.tenant_id, job_id=found.job_id)
    by_attempt: dict[int, list[int]] = {}
    for row in rows:
        sums = by_attempt.setdefault(row.meter.attempt or 0, [0, 0])
        sums[0] += row.device_us
        sums[1] += row.amount
    return {
        **job_json(found, owner),
        "env": sorted(found.spec.env),
        "workdir": found.spec.workdir,
        "device_seconds": seconds_text(sum(row.device_us for row in rows)),
        "charge": format_amount(sum(row.amount for row in rows)),
        "currency": owner.currency,
        "history": [
            _attempt_json(each, *by_attempt.get(each.attempt, (0, 0)))
            for each in job_store.list_attempts(connection, found.job_id)
        ],
    }


def cancel_job(connection: Connection, job: str, *, now: datetime) -> Json:
    """Have a job cancelled; it gets its grace. Raises NotFound; Conflict when it is over."""
    found = find(connection, job)
    asked = job_store.ask_to_cancel(connection, found.job_id, now=now)
    return job_json(asked, _owner(connection, asked))


def find(connection: Connection, job: str) -> Job:
    """A job by its id, or the newest of that name. Raises NotFound, BadInput."""
    return job_store.find_job(connection, check_text("job", job, longest=255))


def job_json(job: Job, owner: Tenant) -> Json:
    """One job as plain values."""
    spec = job.spec
    return {
        "id": job.job_id,
        "tenant": owner.name,
        "name": job.name,
        "queue": job.queue,
        "command": list(spec.argv),
        "state": job.state.value,
        "reason": job.reason,
        "devices": spec.devices,
        "kinds": list(spec.kinds),
        "gang": spec.gang,
        "ranks": "device" if spec.per_device else "node",
        "preemptible": job.preemptible,
        "reservation": job.reservation_id,
        "priority": spec.priority,
        "deadline_at": _instant(job.deadline_at),
        "estimate_seconds": spec.estimate_s,
        "checkpoint_signal": spec.signal,
        "grace_seconds": spec.grace_s,
        "retries": spec.retries,
        "attempts": job.attempts,
        "failures": job.failures,
        "ran_seconds": seconds_text(job.ran_us),
        "exit_code": job.exit_code,
        "cancel_asked_at": _instant(job.cancel_at),
        "not_before": _instant(job.not_before),
        "submitted_at": job.submitted_at.isoformat(),
        "started_at": _instant(job.started_at),
        "ended_at": _instant(job.ended_at),
    }


def _attempt_json(attempt: Attempt, device_us: int, amount: int) -> Json:
    return {
        "attempt": attempt.attempt,
        "devices": [device.id for device in attempt.devices],
        "kinds": sorted({device.kind for device in attempt.devices}),
        "ranks": attempt.ranks,
        "why": attempt.why,
        "taken_at": attempt.taken_at.isoformat(),
        "started_at": _instant(attempt.started_at),
        "ended_at": _instant(attempt.ended_at),
        "outcome": None if attempt.outcome is None else attempt.outcome.value,
        "exit_code": attempt.exit_code,
        "reason": attempt.reason,
        "device_seconds": seconds_text(device_us),
        "charge": format_amount(amount),
    }


def _owner(connection: Connection, job: Job) -> Tenant:
    owners: Mapping[str, Tenant] = {each.tenant_id: each for each in list_tenants(connection)}
    return owners[job.tenant_id]


def _state(text: str) -> JobState:
    try:
        return JobState(text)
    except ValueError as error:
        known = [state.value for state in JobState]
        hint = did_you_mean(text, known) or f"Choose one of: {', '.join(known)}."
        raise BadInput(f"state: {text[:40]!r} is not a job state.", hint=hint, param="state") from error


def _seconds(param: str, text: str | None) -> float | None:
    """Plain digits are seconds."""
    if text is None:
        return None
    plain = text.strip()
    return float(plain) if plain.isdecimal() and len(plain) < 10 else read_duration(param, text).total_seconds()


def _instant(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()
