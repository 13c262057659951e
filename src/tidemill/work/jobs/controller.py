"""The job book: every unfinished job of this platform, in memory for the tide and in the store for good.

The tide says when a job starts and when it is to give its devices back (`start`, `preempt`); the book does it, bills it
(`work.jobs.attempt_store`), decides what becomes of it (`work.jobs.outcome`), and takes up what an earlier life of the
platform has left (`work.jobs.recovery`). What tenants and operators ask for comes through the store: the book looks
there each second, and at once when it is woken.
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
from tidemill.store.jobs import (
    Job,
    JobState,
    end_waiting,
    note_preempting,
    note_waiting,
    open_jobs,
)
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
        self._hands: dict[str, ActiveJob] = {}
        self._queues: list[Queue] = []
        self._tenants: dict[str, Tenant] = {}
        self._billing = JobBilling(self._ledger, self._threads, self._ask_to_go)
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
            hand.view(now_s, begins.get(hand.job.reservation_id or "", 0.0))
            for hand in self._hands.values()
            if hand.held or hand.job.state is JobState.QUEUED
        ]

    def queues(self) -> Sequence[QueueView]:
        """The queues that were set, and the tenants' own of those that have jobs."""
        found = {
            queue.name: QueueView(name=queue.name, quota=queue.quota, borrow=queue.borrow, weight=float(queue.weight))
            for queue in self._queues
        }
        for hand in self._hands.values():
            if hand.job.queue not in found:
                owner = self._tenants.get(hand.job.tenant_id)
                weight = float(owner.weight) if owner is not None else 1.0
                found[hand.job.queue] = QueueView(name=hand.job.queue, weight=weight)
        return list(found.values())

    def reservations(self) -> Sequence[ReservationView]:
        """The reservations that have begun or are to come."""
        return self._reservations.views()

    def start(self, job_id: str, devices: Sequence[Device], why: str) -> None:
        """Start a waiting job on these devices. Returns at once; what becomes of it is seen in `views`."""
        hand = self._hands.get(job_id)
        if (
            hand is None
            or hand.held
            or self._closing is not None
            or not devices
            or hand.job.state is not JobState.QUEUED
        ):
            return
        hand.on = tuple(device.id for device in devices)
        hand.began = hand.saved = time.monotonic()
        hand.stopping = False
        hand.task = asyncio.create_task(self._guarded(hand, self._attempt(hand, tuple(devices), why)))

    def preempt(self, job_id: str, why: str) -> None:
        """Have a job checkpoint within its grace, end and wait again. Returns at once."""
        hand = self._hands.get(job_id)
        if hand is not None:
            self._ask_to_go(hand, StopCause.PREEMPT, why)

    # Its life

    async def open(self) -> None:
        """Take up what is unfinished. Returns once what an earlier life has left is known; its devices may still be
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
        for hand in self._hands.values():
            self._ask_to_go(hand, StopCause.STOP, "the platform is stopped", grace_s=grace_s)
        while tasks := [hand.task for hand in self._hands.values() if hand.task is not None]:
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(TidemillError):
            await self._bill()  # reservations up to now
        await asyncio.to_thread(self._threads.close)

    def abort(self) -> None:
        """End all jobs now, while they are being closed: the operator does not want to wait."""
        for hand in self._hands.values():
            if hand.run is not None:
                hand.run.kill()

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
        """Take over what the store says: new jobs, wishes to cancel, queues, reservations."""
        found, self._queues, tenants, prices = await self._threads.do(self._read)
        self._tenants = {each.tenant_id: each for each in tenants}
        changed = False
        for job in found:
            hand = self._hands.get(job.job_id)
            if hand is None:
                self._hands[job.job_id] = ActiveJob(job)
                changed = True
            elif not hand.held:
                changed = changed or hand.job != job
                hand.job = job
            elif job.cancel_at is not None:
                self._ask_to_go(hand, StopCause.CANCEL, "cancelled")
            self._hands[job.job_id].kinds = kinds_of(job, self._tenants[job.tenant_id].currency, prices)
        for hand in list(self._hands.values()):
            if not hand.held and hand.job.state is not JobState.QUEUED:
                await self._take_up(hand)
                changed = True
        known = {job.job_id for job in found}
        for job_id, hand in list(self._hands.items()):
            if job_id not in known and not hand.held:
                del self._hands[job_id]
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
        for hand in list(self._hands.values()):
            deadline = hand.job.deadline_at
            if deadline is None or deadline > now:
                continue
            if hand.held:
                self._ask_to_go(hand, StopCause.EXPIRE, f"its deadline {deadline:%Y-%m-%d %H:%M:%S} UTC is over")
                continue
            reason = "its deadline was over before it could run" if not hand.job.attempts else "its deadline is over"
            await self._threads.do(self._write_off, hand.job, reason, now)
            self._hands.pop(hand.job.job_id, None)
            changed = True
        return changed

    def _write_off(self, job: Job, reason: str, now: datetime) -> None:
        with self._store.write() as connection:
            end_waiting(connection, job.job_id, JobState.EXPIRED, reason, now)

    async def _leave_reservations(self) -> None:
        """Jobs whose reservation is over are jobs like others, billed from its end on."""
        for hand in list(self._hands.values()):
            reservation_id = hand.job.reservation_id
            if reservation_id is None or self._reservations.lasts(reservation_id):
                continue
            run = hand.run
            if run is not None and run.running.is_set() and hand.attempt is not None:
                await self._billing.leave_reservation(hand, run, self._clock.now())
            elif not hand.held:
                await self._threads.do(self._ledger.leave_reservation, hand.job)
                hand.job = msgspec.structs.replace(hand.job, reservation_id=None)

    async def _look_at_files(self) -> None:
        running = [hand for hand in self._hands.values() if hand.held and hand.run is not None]
        if running:
            times = await self._threads.do(lambda: [self._files.saved_at(hand.job.job_id) for hand in running])
            for hand, saved_at in zip(running, times, strict=True):
                hand.note_checkpoint(saved_at)
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_EVERY_S
            before = self._clock.now() - timedelta(seconds=self._keep_s)
            await self._threads.do(self._ledger.sweep, self._files, before)

    # An attempt

    async def _guarded(self, hand: ActiveJob, life: Coroutine[Any, Any, None]) -> None:
        """Whatever goes wrong with one job, its devices come back and the others go on."""
        try:
            await life
        except Exception:
            log.exception("a job's attempt has failed inside Tidemill", job=hand.job.job_id)
            if hand.run is not None:
                hand.run.kill()
            self._let_go(hand, wait_s=30.0)

    async def _attempt(self, hand: ActiveJob, devices: tuple[Device, ...], why: str) -> None:
        job = hand.job
        try:
            ranks = len(ranks_of(devices, per_device=job.spec.per_device))
            now = self._clock.now()
            attempt = await self._threads.do(self._ledger.begin, job, devices, ranks=ranks, why=why, now=now)
        except (InsufficientBalance, NoPrice) as error:
            await self._wait_for_money(hand, error)
            return
        except Exception as error:  # if it has begun all the same, the next look takes it up
            log.warning("a job cannot be started", job=job.job_id, reason=str(error))
            self._let_go(hand, wait_s=5.0)
            return
        if attempt is None:  # cancelled meanwhile
            self._let_go(hand)
            return
        hand.attempt = attempt
        hand.job = msgspec.structs.replace(job, state=JobState.STARTING, attempts=attempt.attempt)
        beside = not self.shared().isdisjoint(device.id for device in devices)
        hand.run = run = RunningAttempt(self._backend, self._files, hand.job, attempt, devices, idle_class=beside)
        log.info("job starts", job=job.job_id, attempt=attempt.attempt, devices=hand.on, why=why)
        if self._closing is not None:
            run.ask_to_go(StopCause.STOP, "the platform is stopped")
        life = asyncio.create_task(run.live())
        started = asyncio.create_task(run.running.wait())
        await asyncio.wait([life, started], return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if run.running.is_set():
            at = self._clock.now() - timedelta(microseconds=run.elapsed_us())
            hand.attempt = attempt = msgspec.structs.replace(attempt, started_at=at)
            hand.job = msgspec.structs.replace(hand.job, state=JobState.RUNNING)
            meters = await self._threads.surely(self._ledger.start, attempt, at)
            hand.meters = [ActiveMeter(meter, 0) for meter in meters]
            self._changed()
        end = await life
        await self._settle(hand, end, run.why)

    async def _settle(self, hand: ActiveJob, end: RunEnd, why: str) -> None:
        """Write down how an attempt ended. Not given up: until it is written, the job is not started again."""
        hand.stopping = True
        done = await self._threads.do(self._files.done, hand.job.job_id)
        ending = ending_of(hand.job, end, why, done=done, now=self._clock.now())
        await self._write_end(hand, end.elapsed_us, ending)

    async def _write_end(self, hand: ActiveJob, elapsed_us: int, ending: AttemptEnd) -> None:
        attempt, job = hand.attempt, hand.job
        assert attempt is not None
        later = {each.meter.meter_id: each.until(elapsed_us) for each in hand.meters}
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
        self._let_go(hand)

    async def _take_up(self, hand: ActiveJob) -> None:
        """It has devices as far as the store knows, and nobody sees to it: since a kill, or as the answer to the commit
        of its beginning was lost.
        """
        recovery = JobRecovery(self._store, self._files, self._ledger, hand.job)
        attempt = await self._threads.do(recovery.attempt)
        hand.stopping = True
        hand.began = hand.saved = time.monotonic()
        if attempt is not None:
            hand.attempt = attempt
            hand.on = tuple(place.id for place in attempt.devices)
        hand.task = asyncio.create_task(self._guarded(hand, self._recover(hand, recovery)))

    async def _recover(self, hand: ActiveJob, recovery: JobRecovery) -> None:
        """Finish what an earlier life of the platform has begun."""
        found = await recovery.wait(self._threads)
        if found is None:  # it had not even begun
            await self._threads.surely(recovery.put_back)
            self._let_go(hand)
            return
        done = await self._threads.do(self._files.done, hand.job.job_id)
        ending = ending_of(hand.job, found, KILLED, done=done, now=self._clock.now())
        if hand.job.cancel_at is not None and ending.becomes is JobState.QUEUED:
            cancelled = msgspec.structs.replace(found, cause=StopCause.CANCEL, by_itself=False)
            ending = ending_of(hand.job, cancelled, "cancelled", done=False, now=self._clock.now())
        await self._write_end(hand, found.elapsed_us, ending)

    def _ask_to_go(self, hand: ActiveJob, cause: StopCause, why: str, *, grace_s: float | None = None) -> None:
        run = hand.run
        if not hand.held or run is None or not run.ask_to_go(cause, why, grace_s=grace_s):
            return
        log.info("job is asked to go", job=hand.job.job_id, cause=cause.value, why=why)
        hand.stopping = True
        text = f"{cause.value}: {why}"
        self._threads.later(self._note_preempting, hand.job.job_id, text)
        self._changed()

    def _note_preempting(self, job_id: str, reason: str) -> None:
        with self._store.write() as connection:
            note_preempting(connection, job_id, reason)

    async def _wait_for_money(self, hand: ActiveJob, error: TidemillError) -> None:
        job = hand.job
        not_before = self._clock.now() + timedelta(seconds=UNPAID_WAIT_S)
        reason = error.message[:1].lower() + error.message[1:]

        def note() -> None:
            with self._store.write() as connection:
                note_waiting(connection, job.job_id, reason, not_before)

        try:
            await self._threads.do(note)
            hand.job = msgspec.structs.replace(job, reason=reason, not_before=not_before)
        except TidemillError as failure:
            log.warning("the store does not answer", reason=str(failure))
        self._let_go(hand, wait_s=UNPAID_WAIT_S)

    def _let_go(self, hand: ActiveJob, *, wait_s: float = 0.0) -> None:
        """The job has no devices any more; what it is now, the store says."""
        hand.not_before = time.monotonic() + wait_s if wait_s else 0.0
        hand.on, hand.meters = (), []
        hand.run, hand.attempt, hand.task, hand.stopping = None, None, None, False
        if hand.job.state is not JobState.QUEUED:
            self._hands.pop(hand.job.job_id, None)  # read anew
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
        await self._billing.read(list(self._hands.values()))
        if await self._threads.do(self._reservations.bill, self._clock.now()):
            self._changed()

    def _changed(self) -> None:
        for each in self._listeners:
            each()
