"""One attempt at a job after the other: begun, run, settled.

Recovered where an earlier process has left it.

Whatever happens to one, its devices come back, what it has used is billed, and the other jobs go on.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Protocol

import msgspec
import structlog

from tidemill.clock import JumpTolerantClock
from tidemill.errors import TidemillError
from tidemill.fleet.backend import Backend, Device
from tidemill.store.device_meters import InsufficientBalance
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_transitions import note_preempting, note_waiting
from tidemill.store.jobs import JobState
from tidemill.work.jobs.active_job import ActiveJob, ActiveMeter
from tidemill.work.jobs.attempt_store import AttemptEnd, AttemptStore, NoPrice
from tidemill.work.jobs.launch import RunEnd, RunningAttempt, StopCause, ranks_of
from tidemill.work.jobs.outcome import UNPAID_WAIT_S, ending_of
from tidemill.work.jobs.recovery import KILLED, JobRecovery
from tidemill.work.store_threads import StoreThreads

log = structlog.get_logger()


class AttemptListener(Protocol):
    """Who is told of attempts: the job controller."""

    def changed(self) -> None:
        """Something is different that a plan is made from."""
        ...

    def released(self, active: ActiveJob) -> None:
        """The job has no devices any more."""
        ...


class AttemptRunner:
    """Runs attempts at jobs. Belongs to the event loop."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        files: JobFiles,
        ledger: AttemptStore,
        threads: StoreThreads,
        clock: JumpTolerantClock,
        *,
        listener: AttemptListener,
        shared: Callable[[], set[str]],
    ) -> None:
        """`shared`: CPU slots that a replica has as well; a job there gets what that leaves."""
        self._store = store
        self._backend = backend
        self._files = files
        self._ledger = ledger
        self._threads = threads
        self._clock = clock
        self._listener = listener
        self._shared = shared
        self.closing = False
        """The platform is stopped: an attempt that begins now is asked to stop at once."""

    def start(self, active: ActiveJob, devices: tuple[Device, ...], why: str) -> None:
        """Begin an attempt on these devices; returns at once."""
        active.on = tuple(device.id for device in devices)
        active.began = active.saved = time.monotonic()
        active.stopping = False
        active.task = asyncio.create_task(self._guarded(active, self._attempt(active, devices, why)))

    async def _guarded(self, active: ActiveJob, attempt: Coroutine[Any, Any, None]) -> None:
        """Whatever goes wrong with one job, its devices come back and the others go on."""
        try:
            await attempt
        except Exception:
            log.exception("a job's attempt has failed inside Tidemill", job=active.job.job_id)
            if active.run is not None:
                active.run.kill()
            self._let_go(active, wait_s=30.0)

    async def _attempt(self, active: ActiveJob, devices: tuple[Device, ...], why: str) -> None:
        job = active.job
        try:
            ranks = len(ranks_of(devices, per_device=job.spec.per_device))
            now = self._clock.now()
            attempt = await self._threads.do(self._ledger.begin, job, devices, ranks=ranks, why=why, now=now)
        except (InsufficientBalance, NoPrice) as error:
            await self._wait_for_money(active, error)
            return
        except Exception as error:  # if it has begun all the same, the next look takes it up
            log.warning("a job cannot be started", job=job.job_id, reason=str(error))
            self._let_go(active, wait_s=5.0)
            return
        if attempt is None:  # cancelled meanwhile
            self._let_go(active)
            return
        active.attempt = attempt
        active.job = msgspec.structs.replace(job, state=JobState.STARTING, attempts=attempt.attempt)
        colocated = not self._shared().isdisjoint(device.id for device in devices)
        active.run = run = RunningAttempt(
            self._backend, self._files, active.job, attempt, devices, idle_class=colocated
        )
        log.info("job starts", job=job.job_id, attempt=attempt.attempt, devices=active.on, why=why)
        if self.closing:
            run.request_stop(StopCause.STOP, "the platform is stopped")
        running = asyncio.create_task(run.live())
        started = asyncio.create_task(run.running.wait())
        await asyncio.wait([running, started], return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if run.running.is_set():
            at = self._clock.now() - timedelta(microseconds=run.elapsed_us())
            active.attempt = attempt = msgspec.structs.replace(attempt, started_at=at)
            active.job = msgspec.structs.replace(active.job, state=JobState.RUNNING)
            meters = await self._threads.surely(self._ledger.start, attempt, at)
            active.meters = [ActiveMeter(meter, 0) for meter in meters]
            self._listener.changed()
        end = await running
        await self._settle(active, end, run.why)

    async def _settle(self, active: ActiveJob, end: RunEnd, why: str) -> None:
        """Write down how an attempt ended. Not given up: until it is written, the job is not started again."""
        active.stopping = True
        done = await self._threads.do(self._files.done, active.job.job_id)
        ending = ending_of(active.job, end, why, done=done, now=self._clock.now())
        await self._write_end(active, end.elapsed_us, ending)

    async def _write_end(self, active: ActiveJob, elapsed_us: int, ending: AttemptEnd) -> None:
        attempt, job = active.attempt, active.job
        assert attempt is not None
        later = {each.meter.meter_id: each.until(elapsed_us) for each in active.meters}
        await self._threads.surely(self._ledger.end, job, attempt, elapsed_us, ending, later=later)
        log.info(
            "job attempt ended",
            job=job.job_id,
            attempt=attempt.attempt,
            outcome=ending.outcome.value,
            reason=ending.reason,
            becomes=ending.becomes.value,
            ran_s=round(elapsed_us / 1e6, 3),
        )
        self._let_go(active)

    async def take_up(self, active: ActiveJob) -> None:
        """It has devices as far as the store knows, and nobody sees to it.

        Since a kill, or as the answer to the commit of its beginning was lost.
        """
        recovery = JobRecovery(self._store, self._files, self._ledger, active.job)
        attempt = await self._threads.do(recovery.attempt)
        active.stopping = True
        active.began = active.saved = time.monotonic()
        if attempt is not None:
            active.attempt = attempt
            active.on = tuple(place.id for place in attempt.devices)
        active.task = asyncio.create_task(self._guarded(active, self._recover(active, recovery)))

    async def _recover(self, active: ActiveJob, recovery: JobRecovery) -> None:
        """Finish what an earlier process of the platform has begun."""
        found = await recovery.wait(self._threads)
        if found is None:  # it had not even begun
            await self._threads.surely(recovery.put_back)
            self._let_go(active)
            return
        done = await self._threads.do(self._files.done, active.job.job_id)
        ending = ending_of(active.job, found, KILLED, done=done, now=self._clock.now())
        if active.job.cancel_at is not None and ending.becomes is JobState.QUEUED:
            cancelled = msgspec.structs.replace(found, cause=StopCause.CANCEL, by_itself=False)
            ending = ending_of(active.job, cancelled, "cancelled", done=False, now=self._clock.now())
        await self._write_end(active, found.elapsed_us, ending)

    def request_stop(self, active: ActiveJob, cause: StopCause, why: str, *, grace_s: float | None = None) -> None:
        run = active.run
        if not active.held or run is None or not run.request_stop(cause, why, grace_s=grace_s):
            return
        log.info("job is asked to go", job=active.job.job_id, cause=cause.value, why=why)
        active.stopping = True
        text = f"{cause.value}: {why}"
        self._threads.later(self._note_preempting, active.job.job_id, text)
        self._listener.changed()

    def _note_preempting(self, job_id: str, reason: str) -> None:
        with self._store.write() as connection:
            note_preempting(connection, job_id, reason)

    async def _wait_for_money(self, active: ActiveJob, error: TidemillError) -> None:
        job = active.job
        not_before = self._clock.now() + timedelta(seconds=UNPAID_WAIT_S)
        reason = error.message[:1].lower() + error.message[1:]

        def note() -> None:
            with self._store.write() as connection:
                note_waiting(connection, job.job_id, reason, not_before)

        try:
            await self._threads.do(note)
            active.job = msgspec.structs.replace(job, reason=reason, not_before=not_before)
        except TidemillError as failure:
            log.warning("the store does not answer", reason=str(failure))
        self._let_go(active, wait_s=UNPAID_WAIT_S)

    def _let_go(self, active: ActiveJob, *, wait_s: float = 0.0) -> None:
        """The job has no devices any more; what it is now, the store says."""
        active.not_before = time.monotonic() + wait_s if wait_s else 0.0
        active.on, active.meters = (), []
        active.run, active.attempt, active.task, active.stopping = None, None, None, False
        self._listener.released(active)
