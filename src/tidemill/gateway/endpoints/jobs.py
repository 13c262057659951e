"""/v1/jobs: the tenant's side of jobs, where the operator lets tenants run commands. What runs them is
`work.jobs.controller`.

No API of anyone's is spoken here, as there is none for this; objects, lists and errors have OpenAI's form.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from tidemill.errors import NotFound
from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.auth.snapshot import Principal
from tidemill.gateway.endpoints.files import id_of
from tidemill.gateway.endpoints.pagination import limit_of, page, query_of
from tidemill.gateway.endpoints.tenant_api import Routes, TenantApi
from tidemill.gateway.errors import BadRequest, NotForTenants
from tidemill.http.server import Exchange
from tidemill.ledger.money import format_amount
from tidemill.store.device_meters import meter_rows
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_submission import JobLimits, JobSubmission, submit
from tidemill.store.jobs import Job, ask_to_cancel, find_job, list_attempts, list_jobs
from tidemill.store.tenants import find_tenant

LONGEST_S = 10 * 365 * 86_400
"""The most that a deadline or an estimate can be, seconds."""

_encode = msgspec.json.Encoder().encode


class JobRules(msgspec.Struct, frozen=True):
    """The rules of jobs, from the configuration."""

    tenants: bool
    """Tenants may have commands run."""
    directory: str
    user: str | None
    limits: JobLimits


class _Create(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    command: list[str]
    name: str | None = None
    devices: int = 1
    kinds: list[str] = []
    gang: bool = True
    preemptible: bool = True
    queue: str | None = None
    reservation: str | None = None
    priority: int = 0
    deadline_seconds: int | None = None
    estimate_seconds: int | None = None
    checkpoint_signal: str = "TERM"
    grace_seconds: float | None = None
    retries: int = 0
    env: dict[str, str] = {}


_decode_create = msgspec.json.Decoder(_Create).decode


class JobEndpoints(TenantApi):
    """The jobs of one gateway process's tenants."""

    def __init__(self, authenticator: Authenticator, store: Store, rules: JobRules, executor: Executor) -> None:
        super().__init__(authenticator, store, executor)
        self._rules = rules
        self._files = JobFiles(Path(rules.directory), user=rules.user)

    @property
    def routes(self) -> Routes:
        return {
            (b"POST", b"/v1/jobs"): self._create,
            (b"GET", b"/v1/jobs"): self._list,
            (b"GET", b"/v1/jobs/{id}"): self._retrieve,
            (b"POST", b"/v1/jobs/{id}/cancel"): self._cancel,
            (b"GET", b"/v1/jobs/{id}/logs"): self._logs,
            (b"GET", b"/v1/jobs/{id}/artifacts"): self._artifacts,
            (b"GET", b"/v1/jobs/{id}/artifact"): self._artifact,
        }

    async def _admit(self, exchange: Exchange) -> Principal:
        principal = await self.authenticate(exchange)
        if not self._rules.tenants:
            raise NotForTenants(
                "On this platform, only the operator can submit jobs.", hint="Ask your operator to submit it."
            )
        return principal

    async def _create(self, exchange: Exchange) -> None:
        principal = await self._admit(exchange)
        wish, now = _wish(exchange.body), datetime.now(UTC)

        def write() -> Job:
            with self._store.write() as connection:
                owner = find_tenant(connection, principal.tenant_id)
                return submit(connection, wish(now), owner, self._rules.limits, now=now)

        self.answer(exchange, job_json(await self.in_thread(write)))

    async def _list(self, exchange: Exchange) -> None:
        principal = await self._admit(exchange)
        query = query_of(exchange)
        limit = limit_of(query, default=20, highest=100)

        def read() -> list[Job]:
            with self._store.read() as connection:
                return list_jobs(connection, tenant_id=principal.tenant_id, after=query.get("after"), limit=limit + 1)

        found = await self.in_thread(read)
        self.answer(exchange, page([job_json(job) for job in found], limit))

    async def _retrieve(self, exchange: Exchange) -> None:
        job = await self._find(exchange)

        def cost() -> dict[str, object]:
            with self._store.read() as connection:
                rows = meter_rows(connection, tenant_id=job.tenant_id, job_id=job.job_id)
                owner = find_tenant(connection, job.tenant_id)
            charge = format_amount(sum(row.amount for row in rows))
            device_s = sum(row.device_us for row in rows) / 1e6
            return {"device_seconds": device_s, "charge": charge, "currency": owner.currency}

        self.answer(exchange, {**job_json(job), **await self.in_thread(cost)})

    async def _cancel(self, exchange: Exchange) -> None:
        job = await self._find(exchange)

        def write() -> Job:
            with self._store.write() as connection:
                return ask_to_cancel(connection, job.job_id, now=datetime.now(UTC), tenant_id=job.tenant_id)

        self.answer(exchange, job_json(await self.in_thread(write)))

    async def _logs(self, exchange: Exchange) -> None:
        """Answer with a part of a log as plain text; the header `x-next-cursor` leads to the next."""
        job = await self._find(exchange)
        query = query_of(exchange)
        attempt = _number(query, "attempt", job.attempts)
        rank = _number(query, "rank", 0)

        def read() -> tuple[bytes, str]:
            with self._store.read() as connection:
                known = {each.attempt for each in list_attempts(connection, job.job_id)}
            if attempt not in known:
                raise NotFound(f"The job {job.job_id} has no attempt {attempt} yet.", param="attempt")
            piece = self._files.read_log(job.job_id, attempt, rank, query.get("cursor", ""))
            return piece.data, piece.next

        data, cursor = await self.in_thread(read)
        headers = f"content-type: text/plain; charset=utf-8\r\nx-next-cursor: {cursor}\r\n"
        exchange.respond(200, data, headers.encode())

    async def _artifacts(self, exchange: Exchange) -> None:
        job = await self._find(exchange)
        found = await self.in_thread(lambda: self._files.artifacts(job.job_id))
        listed = [
            {"object": "job.artifact", "path": each.path, "bytes": each.bytes, "modified_at": int(each.modified_at)}
            for each in found
        ]
        self.answer(exchange, {"object": "list", "data": listed, "has_more": False})

    async def _artifact(self, exchange: Exchange) -> None:
        job = await self._find(exchange)
        path = query_of(exchange).get("path", "")
        fd = await self.in_thread(lambda: self._files.open_artifact(job.job_id, path))
        await self.send_file(exchange, fd, f"{job.job_id}/{path}")

    async def _find(self, exchange: Exchange) -> Job:
        principal = await self._admit(exchange)
        job_id = id_of(exchange)

        def read() -> Job:
            with self._store.read() as connection:
                return find_job(connection, job_id, tenant_id=principal.tenant_id)

        return await self.in_thread(read)


def job_json(job: Job) -> dict[str, object]:
    """A job as its tenant sees it; instants are Unix seconds, as in OpenAI's objects."""
    spec = job.spec
    return {
        "id": job.job_id,
        "object": "job",
        "name": job.name,
        "queue": job.queue,
        "command": spec.argv,
        "status": job.state.value,
        "reason": job.reason,
        "devices": spec.devices,
        "kinds": spec.kinds,
        "gang": spec.gang,
        "preemptible": job.preemptible,
        "reservation": job.reservation_id,
        "priority": spec.priority,
        "retries": spec.retries,
        "attempts": job.attempts,
        "exit_code": job.exit_code,
        "grace_seconds": spec.grace_s,
        "deadline_at": _seconds(job.deadline_at),
        "created_at": _seconds(job.submitted_at),
        "started_at": _seconds(job.started_at),
        "ended_at": _seconds(job.ended_at),
    }


def _wish(body: bytes) -> Callable[[datetime], JobSubmission]:
    """Parse the submission in a body; deadlines are relative to `now`. Raises BadRequest."""
    try:
        asked = _decode_create(body or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request is not valid for a job: {error}.") from error
    for name in ("deadline_seconds", "estimate_seconds"):
        value = getattr(asked, name)
        if value is not None and not 1 <= value <= LONGEST_S:
            raise BadRequest(f"'{name}' must be from 1 to {LONGEST_S}.", param=name)
    deadline_s = asked.deadline_seconds
    return lambda now: JobSubmission(
        argv=tuple(asked.command),
        name=asked.name,
        devices=asked.devices,
        kinds=tuple(asked.kinds),
        gang=asked.gang,
        preemptible=asked.preemptible,
        queue=asked.queue,
        reservation=asked.reservation,
        priority=asked.priority,
        deadline_at=None if deadline_s is None else now + timedelta(seconds=deadline_s),
        estimate_s=None if asked.estimate_seconds is None else float(asked.estimate_seconds),
        signal=asked.checkpoint_signal.upper().removeprefix("SIG"),
        grace_s=asked.grace_seconds,
        retries=asked.retries,
        env=asked.env,
    )


def _number(query: dict[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise BadRequest(f"'{name}' is {text[:20]!r}, but must be a number.", param=name)
    return int(text)


def _seconds(instant: datetime | None) -> int | None:
    return None if instant is None else int(instant.timestamp())
