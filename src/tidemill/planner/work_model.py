"""Jobs and batches of a simulated fleet."""

import msgspec

from tidemill.tides.state import JobPhase, JobView


class SimulatedJobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A job that is submitted."""

    id: str
    queue: str
    devices: int
    submitted_at: float
    run_s: float
    """On all its devices, undisturbed."""
    deadline: float | None = None
    preemptible: bool = True
    priority: int = 0
    checkpoint_every_s: float = 900.0
    checkpoint_s: float = 20.0
    """What it needs to write one when it is told to go."""
    restore_s: float = 60.0
    """Until it computes again after it has begun: loading, compiling, reading the checkpoint."""
    grace_s: float = 60.0


class SimJob(msgspec.Struct):
    """A job on its way."""

    spec: SimulatedJobSpec
    phase: JobPhase = JobPhase.QUEUED
    on: tuple[str, ...] = ()
    started_at: float = 0.0
    done_s: float = 0.0
    """Computed so far, lost work not counted."""
    saved_s: float = 0.0
    stops_at: float = 0.0
    ended_at: float | None = None
    preemptions: int = 0
    lost_s: float = 0.0
    """Computed and lost."""

    def view(self, now: float) -> JobView:
        spec = self.spec
        return JobView(
            id=spec.id,
            tenant=spec.queue,
            queue=spec.queue,
            devices=spec.devices,
            preemptible=spec.preemptible,
            priority=spec.priority,
            deadline=spec.deadline,
            remaining_s=spec.run_s - self.done_s + (spec.restore_s if self.phase is JobPhase.QUEUED else 0.0),
            grace_s=spec.grace_s,
            submitted_at=spec.submitted_at,
            phase=self.phase,
            on=self.on,
            started_at=self.started_at,
            unsaved_s=self.done_s - self.saved_s,
        )

    def start(self, devices: tuple[str, ...], now: float) -> None:
        self.phase, self.on, self.started_at = JobPhase.RUNNING, devices, now

    def preempt(self, now: float) -> None:
        """It is told to go: it writes a checkpoint, if it has begun to compute at all."""
        self.phase = JobPhase.STOPPING
        self.stops_at = now + (self.spec.checkpoint_s if now - self.started_at > self.spec.restore_s else 1.0)
        self.preemptions += 1

    def advance(self, now: float, dt_s: float) -> float:
        """The next `dt_s` seconds from `now` on. Returns the seconds in which it computed."""
        spec = self.spec
        if self.phase is JobPhase.STOPPING:
            if now + dt_s >= self.stops_at:
                self.saved_s = self.done_s
                self.phase, self.on = JobPhase.QUEUED, ()
            return 0.0
        if self.phase is not JobPhase.RUNNING:
            return 0.0
        from_s = max(self.started_at + spec.restore_s, now)
        computed = min(max(now + dt_s - from_s, 0.0), spec.run_s - self.done_s)
        self.done_s += computed
        if self.done_s - self.saved_s >= spec.checkpoint_every_s:
            self.saved_s = self.done_s
        if self.done_s >= spec.run_s - 1e-6:
            self.ended_at, self.phase, self.on = now + dt_s, JobPhase.QUEUED, ()
        return computed

    def lose(self) -> None:
        """It was killed: what was not saved is gone."""
        self.lost_s += self.done_s - self.saved_s
        self.done_s = self.saved_s
        self.phase, self.on = JobPhase.QUEUED, ()


class SimulatedBatchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that is handed in."""

    model: str
    submitted_at: float
    deadline: float
    work: float
    """Tokens of prefill, answers weighed."""


class SimBatch(msgspec.Struct):
    spec: SimulatedBatchSpec
    left: float
    ended_at: float | None = None
