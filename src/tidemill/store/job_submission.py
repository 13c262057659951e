"""Submit a job: it is checked against the limits and what the store knows, and stored as queued."""

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import PurePosixPath

import msgspec
from sqlalchemy import Connection

from tidemill.errors import BadInput, NotFound
from tidemill.ledger.devices import MAX_DEVICES, DeviceTier
from tidemill.store.device_prices import current_device_prices
from tidemill.store.jobs import Job, JobSpec, create_job, new_job_id
from tidemill.store.queues import find_queue, list_queues
from tidemill.store.reservations import OPEN, list_reservations
from tidemill.store.tenants import Tenant, check_name
from tidemill.suggestions import did_you_mean

MAX_WORDS = 1_000
MAX_COMMAND = 64 * 1024
"""Bytes of a command, and of its environment."""
MAX_ENV = 200
MAX_PRIORITY = 100
MAX_RETRIES = 100
MAX_KINDS = 20
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SIGNALS = frozenset("TERM INT HUP QUIT USR1 USR2".split())


class JobLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of jobs, from the configuration."""

    site: str
    """The directory that has the jobs' files."""
    tenant_open: int = 100
    grace_s: float = 60.0
    max_grace_s: float = 600.0


class JobSubmission(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody wants to have run."""

    argv: tuple[str, ...]
    name: str | None = None
    devices: int = 1
    kinds: tuple[str, ...] = ()
    gang: bool = True
    per_device: bool | None = None
    """None: as `gang` says; one process for each node of a gang, one for each device of what is none."""
    preemptible: bool = True
    queue: str | None = None
    reservation: str | None = None
    priority: int = 0
    deadline_at: datetime | None = None
    estimate_s: float | None = None
    signal: str = "TERM"
    grace_s: float | None = None
    retries: int = 0
    env: Mapping[str, str] = {}
    workdir: str | None = None


def submit(
    connection: Connection, submission: JobSubmission, owner: Tenant, limits: JobLimits, *, now: datetime
) -> Job:
    """Enter a job. Raises BadInput, NotFound, TooManyJobs."""
    _check_command(submission)
    _check_numbers(submission)
    grace_s = limits.grace_s if submission.grace_s is None else submission.grace_s
    if not 0 <= grace_s <= limits.max_grace_s:
        raise BadInput(f"grace must be from 0 to {limits.max_grace_s:g} seconds.", param="grace")
    reservation_id, kinds = _kinds(connection, submission, owner, limits.site, now)
    job = Job(
        job_id=new_job_id(),
        tenant_id=owner.tenant_id,
        site=limits.site,
        name=check_name(
            "job", submission.name if submission.name is not None else PurePosixPath(submission.argv[0]).name or "job"
        ),
        queue=_queue(connection, submission, owner),
        spec=JobSpec(
            argv=submission.argv,
            env=dict(submission.env),
            workdir=submission.workdir,
            devices=submission.devices,
            kinds=kinds,
            gang=submission.gang,
            per_device=not submission.gang if submission.per_device is None else submission.per_device,
            priority=submission.priority,
            estimate_s=submission.estimate_s,
            grace_s=grace_s,
            signal=submission.signal,
            retries=submission.retries,
        ),
        preemptible=submission.preemptible,
        reservation_id=reservation_id,
        deadline_at=submission.deadline_at,
        submitted_at=now,
    )
    create_job(connection, job, max_open=limits.tenant_open)
    return job


def _check_command(submission: JobSubmission) -> None:
    if not submission.argv or not submission.argv[0]:
        raise BadInput("There is no command to run.", hint="Put it after `--`.", param="command")
    size = sum(len(word.encode()) + 1 for word in submission.argv)
    if len(submission.argv) > MAX_WORDS or size > MAX_COMMAND:
        raise BadInput(
            f"command: at most {MAX_WORDS} words and {MAX_COMMAND // 1024} KiB are allowed.", param="command"
        )
    size = sum(len(name) + len(value.encode()) + 2 for name, value in submission.env.items())
    if len(submission.env) > MAX_ENV or size > MAX_COMMAND:
        raise BadInput(f"env: at most {MAX_ENV} variables and {MAX_COMMAND // 1024} KiB are allowed.", param="env")
    for name in submission.env:
        if not _ENV_NAME.fullmatch(name) or name.startswith("TIDEMILL_"):
            raise BadInput(
                f"env: {name[:80]!r} is not allowed.",
                hint="Use letters, digits and _ in a name, and do not begin it with TIDEMILL_.",
                param="env",
            )
    if any("\0" in text for text in (*submission.argv, *submission.env.values(), submission.workdir or "")):
        raise BadInput("A command, variable or directory must not contain NUL characters.", param="command")
    if submission.workdir is not None and (not submission.workdir.startswith("/") or len(submission.workdir) > 1000):
        raise BadInput("workdir must be an absolute path on the node.", param="workdir")


def _check_numbers(submission: JobSubmission) -> None:
    for param, value, low, high in (
        ("devices", submission.devices, 1, MAX_DEVICES),
        ("priority", submission.priority, -MAX_PRIORITY, MAX_PRIORITY),
        ("retries", submission.retries, 0, MAX_RETRIES),
    ):
        if not low <= value <= high:
            raise BadInput(f"{param} must be from {low:,} to {high:,}, not {value:,}.", param=param)
    if submission.estimate_s is not None and submission.estimate_s <= 0:
        raise BadInput("estimate must be more than zero.", param="estimate")
    if submission.signal not in _SIGNALS:
        hint = did_you_mean(submission.signal, sorted(_SIGNALS)) or f"Choose one of: {', '.join(sorted(_SIGNALS))}."
        raise BadInput(
            f"checkpoint_signal: {submission.signal[:20]!r} is not supported.", hint=hint, param="checkpoint_signal"
        )


def _kinds(
    connection: Connection, submission: JobSubmission, owner: Tenant, site: str, now: datetime
) -> tuple[str | None, tuple[str, ...]]:
    """The reservation, if any, and the kinds of devices."""
    if len(submission.kinds) > MAX_KINDS:
        raise BadInput(f"kind: at most {MAX_KINDS} are allowed.", param="kind")
    if submission.reservation is not None:
        # A tenant may be asking, so another tenant's reservation is one that is not there, also in the hint.
        own = {
            each.reservation_id: each for each in list_reservations(connection, tenant_id=owner.tenant_id, site=site)
        }
        found = own.get(submission.reservation)
        if found is None:
            usable = [each.reservation_id for each in own.values() if each.state in OPEN]
            text = f"There is no reservation {submission.reservation[:80]!r} for {owner.name}."
            raise NotFound(text, hint=did_you_mean(submission.reservation, usable), param="reservation")
        if found.state not in OPEN:
            raise BadInput(f"The reservation {found.reservation_id} is over: {found.state}.", param="reservation")
        if submission.devices > found.devices:
            raise BadInput(f"devices: the reservation has {found.devices}, not {submission.devices}.", param="devices")
        return found.reservation_id, (found.kind,)
    tier = DeviceTier.PREEMPTIBLE if submission.preemptible else DeviceTier.STANDARD
    prices = current_device_prices(connection, now)
    priced = sorted({kind for kind, currency, each in prices if currency == owner.currency and each is tier})
    if not priced:
        raise BadInput(
            f"No kind of device has a price in {owner.currency}.",
            hint=f"The operator must add [device_prices.KIND.{owner.currency}] to the configuration.",
            param="kind",
        )
    for kind in submission.kinds:
        if kind not in priced:
            hint = did_you_mean(kind, priced) or f"Choose one of: {', '.join(priced)}."
            raise BadInput(f"kind: {kind[:64]!r} has no price in {owner.currency}.", hint=hint, param="kind")
    return None, tuple(dict.fromkeys(submission.kinds))


def _queue(connection: Connection, submission: JobSubmission, owner: Tenant) -> str:
    name = submission.queue if submission.queue is not None else owner.name
    queue = find_queue(connection, name)
    if queue is None and name == owner.name:
        return name
    if queue is None or queue.tenant_id not in (None, owner.tenant_id):
        usable = [each.name for each in list_queues(connection) if each.tenant_id in (None, owner.tenant_id)]
        hint = did_you_mean(name, usable) or f"Choose one of: {', '.join([owner.name, *usable])}."
        raise BadInput(f"There is no queue {name[:80]!r} for {owner.name}.", hint=hint, param="queue")
    return queue.name
