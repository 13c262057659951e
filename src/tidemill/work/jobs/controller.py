"""The job controller: every unfinished job of this platform, in memory for the scheduler and in the store durably.

The plan says when a job starts and when it gives its devices back (`start`, `preempt`); the controller does it, bills
it (`work.jobs.attempt_store`), decides what becomes of it (`work.jobs.outcome`), and recovers what an earlier process
of the platform has left (`work.jobs.recovery`). What tenants and operators ask for comes through the store: the
controller looks there each second, and at once when it is woken.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import structlog

from tidemill.clock import PROCESS_CLOCK, JumpTolerantClock
from tidemill.errors import TidemillError
from tidemill.fleet.backend import Backend, Device
from tidemill.store.device_meters import InsufficientBalance
from tidemill.store.device_prices import current_device_prices
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_transitions import end_waiting, note_preempting, note_waiting
from tidemill.store.jobs import Job, JobState, open_jobs
from tidemill.store.queues import Queue, list_queues
from tidemill.store.tenants import Tenant, list_tenants
from tidemill.tides.state import JobView, QueueView, ReservationView
from tidemill.work.jobs.active_job import ActiveJob, ActiveMeter
from tidemill.work.jobs.attempt_store import AttemptEnd, AttemptStore, NoPrice
from tidemill.work.jobs.billing import JobBilling
from tidemill.work.jobs.device_kinds import DevicePrices, kinds_of
from tidemill.work.jobs.launch import RunEnd, RunningAttempt, StopCause, ranks_of
from tidemill.work.jobs.outcome import UNPAID_WAIT_S, ending_of
from tidemill.work.jobs.recovery import KILLED, JobRecovery
from tidemill.work.jobs.reservation_controller import ReservationController
from tidemill.work.store_threads import StoreThreads

LOOK_EVERY_S = 1.0
SWEEP_EVERY_S = 3600.0

log = structlog.get_logger()


class JobController:
    """Jobs, queues and reservations as the tide's controller needs them. Belongs to the event loop."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        files: JobFiles,
        *,
        zone: str = "UTC",
        keep_s: float = 30 * 86_400.0,
        tick_s: float | None = None,
        clock: JumpTolerantClock = PROCESS_CLOCK,
    ) -> None:
        self._store = store
        self._backend = backend
        self._files = files
        self._keep_s = keep_s
        self._clock = clock
        self._ledger = AttemptStore(store, zone) if tick_s is None else AttemptStore(store, zone, tick_s=tick_s)
        self._threads = StoreThreads(4, "jobs")
        self._active: dict[str, ActiveJob] = {}
        self._queues: list[Queue] = []
        self._tenants: dict[str, Tenant] = {}
        self._billing = JobBilling(self._ledger, self._threads, self._request_stop)
        self._reservations = ReservationController(store, self._ledger, zone, files.site)
        self._listeners: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: asyncio.Task[None] | None = None
        self._next_sweep = 0.0
        self.shared: Callable[[], set[str]] = set
        """CPU slots that a replica has as well: a job there gets what that leaves."""

    # What the tide sees and says

    def on_change(self, changed: Callable[[], None]) -> None:
        """`changed` is called when a job, queue or reservation has come, gone or changed: a reason to plan anew."""
        self._listeners.append(changed)

    def views(self) -> Sequence[JobView]:
        """The unfinished jobs."""
        now_s = self._clock.seconds()
        begins = self._reservations.to_come(now_s + LOOK_EVERY_S)
        return [
            active.view(now_s, begins.get(active.job.reservation_id or "", 0.0))
            for active in self._active.values()
            if active.held or active.job.state is JobState.QUEUED
        ]

    def queues(self) -> Sequence[QueueView]:
        """The queues that were set, and the tenants' own of those that have jobs."""
        found = {
            queue.name: QueueView(name=queue.name, quota=queue.quota, borrow=queue.borrow, weight=float(queue.weight))
            for queue in self._queues
        }
        for active in self._active.values():
            if active.job.queue not in found:
                owner = self._tenants.get(active.job.tenant_id)
                weight = float(owner.weight) if owner is not None else 1.0
                found[active.job.queue] = QueueView(name=active.job.queue, weight=weight)
        return list(found.values())

    def reservations(self) -> Sequence[ReservationView]:
        """The reservations that have begun or are to come."""
        return self._reservations.views()

    def start(self, job_id: str, devices: Sequence[Device], why: str) -> None:
        """Start a waiting job on these devices. Returns at once; what becomes of it is seen in `views`."""
        active = self._active.get(job_id)
        if (
            active is None
            or active.held
            or self._closing is not None
            or not devices
            or active.job.state is not JobState.QUEUED
        ):
            return
        active.on = tuple(device.id for device in devices)
        active.began = active.saved = time.monotonic()
        active.stopping = False
        active.task = asyncio.create_task(self._guarded(active, self._attempt(active, tuple(devices), why)))

    def preempt(self, job_id: str, why: str) -> None:
        """Have a job checkpoint within its grace, end and wait again. Returns at once."""
        active = self._active.get(job_id)
        if active is not None:
            self._request_stop(active, StopCause.PREEMPT, why)

    # Open, close

    async def open(self) -> None:
        """Recover what is unfinished. Returns once what an earlier process has left is known; its devices may still be
        held until their processes have ended.
        """
        await self._look()
        self._tasks = [asyncio.create_task(self._keep_looking()), asyncio.create_task(self._keep_billing())]

    async def close(self, grace_s: float | None = None) -> None:
        """Have every job checkpoint and end, within its own grace or `grace_s` if that is less; all go on at the next
        start. Returns when they have ended and are billed.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(grace_s))
        await asyncio.shield(self._closing)

    async def _close(self, grace_s: float | None) -> None:
        for active in self._active.values():
            self._request_stop(active, StopCause.STOP, "the platform is stopped", grace_s=grace_s)
        while tasks := [active.task for active in self._active.values() if active.task is not None]:
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TidemillError):
            await self._bill()  # reservations up to now
        await asyncio.to_thread(self._threads.close)

    def abort(self) -> None:
        """End all jobs now, while they are being closed: the operator does not want to wait."""
        for active in self._active.values():
            if active.run is not None:
                active.run.kill()

    def wake(self) -> None:
        """Look into the store now: a job was submitted, or is to be cancelled."""
        self._wake.set()

    async def _keep_looking(self) -> None:
        quiet_until = 0.0
        while True:
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._look()
                await self._look_at_files()
            except TidemillError as error:
                if time.monotonic() > quiet_until:
                    quiet_until = time.monotonic() + 10.0
                    log.warning("the store does not answer; jobs go on", reason=str(error))
            except Exception:
                log.exception("looking after the jobs failed")

    async def _look(self) -> None:
        """Take over what the store says: new jobs, cancellations, queues, reservations."""
        found, self._queues, tenants, prices = await self._threads.do(self._read)
        self._tenants = {each.tenant_id: each for each in tenants}
        changed = False
        for job in found:
            active = self._active.get(job.job_id)
            if active is None:
                self._active[job.job_id] = ActiveJob(job)
                changed = True
            elif not active.held:
                changed = changed or active.job != job
                active.job = job
            elif job.cancel_at is not None:
                self._request_stop(active, StopCause.CANCEL, "cancelled")
            self._active[job.job_id].kinds = kinds_of(job, self._tenants[job.tenant_id].currency, prices)
        for active in list(self._active.values()):
            if not active.held and active.job.state is not JobState.QUEUED:
                await self._take_up(active)
                changed = True
        known = {job.job_id for job in found}
        for job_id, active in list(self._active.items()):
            if job_id not in known and not active.held:
                del self._active[job_id]
                changed = True
        changed = await self._expire() or changed
        changed = await self._threads.do(self._reservations.look, self._clock.now()) or changed
        await self._leave_reservations()
        if changed:
            self._changed()

    def _read(self) -> tuple[list[Job], list[Queue], list[Tenant], DevicePrices]:
        with self._store.read() as connection:
            return (
                open_jobs(connection, self._files.site),
                list_queues(connection),
                list_tenants(connection),
                current_device_prices(connection, self._clock.now()),
            )

    async def _expire(self) -> bool:
        now = self._clock.now()
        changed = False
        for active in list(self._active.values()):
            deadline = active.job.deadline_at
            if deadline is None or deadline > now:
                continue
            if active.held:
                self._request_stop(active, StopCause.EXPIRE, f"its deadline {deadline:%Y-%m-%d %H:%M:%S} UTC is over")
                continue
            reason = "its deadline was over before it could run" if not active.job.attempts else "its deadline is over"
            await self._threads.do(self._write_off, active.job, reason, now)
            self._active.pop(active.job.job_id, None)
            changed = True
        return changed

    def _write_off(self, job: Job, reason: str, now: datetime) -> None:
        with self._store.write() as connection:
            end_waiting(connection, job.job_id, JobState.EXPIRED, reason, now)

    async def _leave_reservations(self) -> None:
        """Jobs whose reservation is over are jobs like others, billed from its end on."""
        for active in list(self._active.values()):
            reservation_id = active.job.reservation_id
            if reservation_id is None or self._reservations.lasts(reservation_id):
                continue
            run = active.run
            if run is not None and run.running.is_set() and active.attempt is not None:
                await self._billing.leave_reservation(active, run, self._clock.now())
            elif not active.held:
                await self._threads.do(self._ledger.leave_reservation, active.job)
                active.job = msgspec.structs.replace(active.job, reservation_id=None)

    async def _look_at_files(self) -> None:
        running = [active for active in self._active.values() if active.held and active.run is not None]
        if running:
            times = await self._threads.do(lambda: [self._files.saved_at(active.job.job_id) for active in running])
            for active, saved_at in zip(running, times, strict=True):
                active.note_checkpoint(saved_at)
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_EVERY_S
            before = self._clock.now() - timedelta(seconds=self._keep_s)
            await self._threads.do(self._ledger.sweep, self._files, before)

    # An attempt

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
        colocated = not self.shared().isdisjoint(device.id for device in devices)
        active.run = run = RunningAttempt(
            self._backend, self._files, active.job, attempt, devices, idle_class=colocated
        )
        log.info("job starts", job=job.job_id, attempt=attempt.attempt, devices=active.on, why=why)
        if self._closing is not None:
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
            self._changed()
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

    async def _take_up(self, active: ActiveJob) -> None:
        """It has devices as far as the store knows, and nobody sees to it: since a kill, or as the answer to the commit
        of its beginning was lost.
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

    def _request_stop(self, active: ActiveJob, cause: StopCause, why: str, *, grace_s: float | None = None) -> None:
        run = active.run
        if not active.held or run is None or not run.request_stop(cause, why, grace_s=grace_s):
            return
        log.info("job is asked to go", job=active.job.job_id, cause=cause.value, why=why)
        active.stopping = True
        text = f"{cause.value}: {why}"
        self._threads.later(self._note_preempting, active.job.job_id, text)
        self._changed()

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
        if active.job.state is not JobState.QUEUED:
            self._active.pop(active.job.job_id, None)  # read anew
        self.wake()
        self._changed()

    # Money

    async def _keep_billing(self) -> None:
        while True:
            await asyncio.sleep(self._ledger.tick_s)
            try:
                await self._bill()
            except TidemillError as error:
                log.warning("the store does not answer; device time is billed later", reason=str(error))
            except Exception:
                log.exception("billing device time failed")

    async def _bill(self) -> None:
        """Read every meter."""
        await self._billing.read(list(self._active.values()))
        if await self._threads.do(self._reservations.bill, self._clock.now()):
            self._changed()

    def _changed(self) -> None:
        for each in self._listeners:
            each()
