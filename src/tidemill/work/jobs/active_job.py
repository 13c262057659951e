"""An unfinished job: what the controller knows of it beyond the store, and how the plan sees it."""

import asyncio
import time
from datetime import datetime, timedelta

import msgspec

from tidemill.ledger.devices import DeviceMeter
from tidemill.store.jobs import Attempt, Job
from tidemill.tides.state import JobPhase, JobView
from tidemill.work.jobs.launch import RunningAttempt


class ActiveMeter(msgspec.Struct, frozen=True):
    """A meter that runs, and at which moment of its attempt it began."""

    meter: DeviceMeter
    origin_us: int

    def until(self, elapsed_us: int) -> datetime:
        """Up to which instant it counts when its attempt has run for `elapsed_us`."""
        return self.meter.started_at + timedelta(microseconds=max(elapsed_us - self.origin_us, 0))


class ActiveJob:
    """An unfinished job. Belongs to the event loop."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.kinds = job.spec.kinds
        """Kinds of devices that it may run on now."""
        self.attempt: Attempt | None = None
        self.run: RunningAttempt | None = None
        self.on: tuple[str, ...] = ()
        """The devices that it has, from the moment that it is told to start until it has left them."""
        self.meters: list[ActiveMeter] = []
        self.task: asyncio.Task[None] | None = None
        self.stopping = False
        self.began = 0.0
        """When it was told to start, monotonic."""
        self.not_before = 0.0
        """Monotonic: no start before then, for a reason that is not in the store."""
        self.saved = 0.0
        """Monotonic: when its last checkpoint was seen."""
        self.saved_at: float | None = None
        """That checkpoint's own time, to tell the next one from it."""

    @property
    def held(self) -> bool:
        """It has devices, or is about to have them."""
        return self.task is not None

    def note_checkpoint(self, saved_at: float | None) -> None:
        """Tell of its newest checkpoint."""
        if saved_at is not None and saved_at != self.saved_at:
            self.saved_at, self.saved = saved_at, time.monotonic()

    def view(self, now_s: float, reserved_from: float = 0.0) -> JobView:
        """How the tide sees it; `now_s` is Unix time, and so is when the reservation begins that it waits for."""
        job, spec = self.job, self.job.spec
        steady = time.monotonic()
        ran_s = job.ran_us / 1e6 + (steady - self.began if self.held else 0.0)
        phase = JobPhase.QUEUED
        if self.held:
            phase = JobPhase.STOPPING if self.stopping else JobPhase.RUNNING
        waits_s = max(self.not_before - steady, 0.0)
        not_before = max(_seconds(job.not_before) or 0.0, now_s + waits_s if waits_s else 0.0, reserved_from)
        return JobView(
            id=job.job_id,
            tenant=job.tenant_id,
            queue=job.queue,
            devices=spec.devices,
            kinds=self.kinds,
            gang=spec.gang,
            preemptible=job.preemptible,
            priority=spec.priority,
            deadline=_seconds(job.deadline_at),
            remaining_s=None if spec.estimate_s is None else max(spec.estimate_s - ran_s, 0.0),
            grace_s=spec.grace_s,
            submitted_at=job.submitted_at.timestamp(),
            not_before=not_before,
            phase=phase,
            on=self.on,
            started_at=now_s - (steady - self.began) if self.held else 0.0,
            unsaved_s=steady - max(self.saved, self.began) if self.held else 0.0,
            reservation=job.reservation_id,
        )


def _seconds(instant: datetime | None) -> float | None:
    return None if instant is None else instant.timestamp()
