"""The job controller: every unfinished job of this platform.

It has them in memory for the scheduler, and in the store durably.

The plan says when a job starts and when it gives its devices back (`start`, `preempt`); the controller does it, bills
it and recovers what an earlier process has left (`work.jobs.attempt_runner`). What tenants and operators ask for comes
through the store: the controller looks there each second, and at once when it is woken.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import msgspec
import structlog

from tidemill.clock import PROCESS_CLOCK, JumpTolerantClock
from tidemill.errors import TidemillError
from tidemill.fleet.backend import Backend, Device
from tidemill.store.device_prices import current_device_prices
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_transitions import end_waiting
from tidemill.store.jobs import Job, JobState, open_jobs
from tidemill.store.queues import Queue, list_queues
from tidemill.store.tenants import Tenant, list_tenants
from tidemill.tides.state import JobView, QueueView, ReservationView
from tidemill.work.jobs.active_job import ActiveJob
from tidemill.work.jobs.attempt_runner import AttemptRunner
from tidemill.work.jobs.attempt_store import AttemptStore
from tidemill.work.jobs.billing import JobBilling
from tidemill.work.jobs.device_kinds import DevicePrices, kinds_of
from tidemill.work.jobs.launch import StopCause
from tidemill.work.jobs.reservation_controller import ReservationController
from tidemill.work.store_threads import StoreThreads

_LOOK_EVERY_S = 1.0
_SWEEP_EVERY_S = 3600.0

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
        self._files = files
        self._keep_s = keep_s
        self._clock = clock
        self._ledger = AttemptStore(store, zone) if tick_s is None else AttemptStore(store, zone, tick_s=tick_s)
        self._threads = StoreThreads(4, "jobs")
        self._attempts = AttemptRunner(
            store,
            backend,
            files,
            self._ledger,
            self._threads,
            clock,
            listener=self,
            shared=lambda: self.shared(),
        )
        self._active: dict[str, ActiveJob] = {}
        self._queues: list[Queue] = []
        self._tenants: dict[str, Tenant] = {}
        self._billing = JobBilling(self._ledger, self._threads, self._attempts.request_stop)
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
        """`changed` is called when a job, queue or reservation has come, gone or changed.

        A reason to plan anew.
        """
        self._listeners.append(changed)

    def views(self) -> Sequence[JobView]:
        """The unfinished jobs."""
        now_s = self._clock.seconds()
        begins = self._reservations.to_come(now_s + _LOOK_EVERY_S)
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
        self._attempts.start(active, tuple(devices), why)

    def preempt(self, job_id: str, why: str) -> None:
        """Have a job checkpoint within its grace, end and wait again. Returns at once."""
        active = self._active.get(job_id)
        if active is not None:
            self._attempts.request_stop(active, StopCause.PREEMPT, why)

    # Open, close

    async def open(self) -> None:
        """Recover what is unfinished.

        Returns once what an earlier process has left is known; its devices may still be held until their processes have
        ended.
        """
        await self._look()
        self._tasks = [asyncio.create_task(self._keep_looking()), asyncio.create_task(self._keep_billing())]

    async def close(self, grace_s: float | None = None) -> None:
        """Have every job checkpoint and end, within its own grace or `grace_s` if that is less.

        All go on at the next start. Returns when they have ended and are billed.
        """
        if self._closing is None:
            self._attempts.closing = True
            self._closing = asyncio.create_task(self._close(grace_s))
        await asyncio.shield(self._closing)

    async def _close(self, grace_s: float | None) -> None:
        for active in self._active.values():
            self._attempts.request_stop(active, StopCause.STOP, "the platform is stopped", grace_s=grace_s)
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
                async with asyncio.timeout(_LOOK_EVERY_S):
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
                log.exception("the job controller failed")

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
                self._attempts.request_stop(active, StopCause.CANCEL, "cancelled")
            self._active[job.job_id].kinds = kinds_of(job, self._tenants[job.tenant_id].currency, prices)
        for active in list(self._active.values()):
            if not active.held and active.job.state is not JobState.QUEUED:
                await self._attempts.take_up(active)
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
            self.changed()

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
                self._attempts.request_stop(
                    active, StopCause.EXPIRE, f"its deadline {deadline:%Y-%m-%d %H:%M:%S} UTC has passed"
                )
                continue
            reason = "its deadline passed before it could run" if not active.job.attempts else "its deadline has passed"
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
            self._next_sweep = time.monotonic() + _SWEEP_EVERY_S
            before = self._clock.now() - timedelta(seconds=self._keep_s)
            await self._threads.do(self._ledger.sweep, self._files, before)

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
            self.changed()

    # What attempts tell

    def changed(self) -> None:
        for each in self._listeners:
            each()

    def released(self, active: ActiveJob) -> None:
        if active.job.state is not JobState.QUEUED:
            self._active.pop(active.job.job_id, None)  # read anew
        self.wake()
        self.changed()
