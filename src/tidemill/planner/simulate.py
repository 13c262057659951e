"""A simulated fleet, run by the policies of `tidemill.tides` themselves.

It has a day of interactive requests, batches and jobs.

Time goes in steps of a few seconds (the bins of the arrivals), a plan is made each `plan_every_s`. See `fleet_model`
for how replicas are simulated. Replicas start in exactly their model's time, a job that is preempted needs exactly its
checkpoint's; a replica that drains hands its sequences to the others. Nothing fails.
"""

import math
import random

import msgspec

from tidemill.planner.fleet_model import SimulatedLoad
from tidemill.planner.model_run import FORECAST_S, DemandStream, ServedModel
from tidemill.planner.policies import SchedulingPolicy
from tidemill.planner.work_model import SimBatch, SimJob, SimulatedBatchSpec, SimulatedJobSpec
from tidemill.tides.forecast import DemandSeries, forecast
from tidemill.tides.state import (
    BacklogView,
    DevicePromise,
    DeviceView,
    FleetSnapshot,
    JobPhase,
    Phase,
    Plan,
    QueueView,
    ReplicaView,
)

_DRAIN_S = 15.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet and a day."""

    devices: tuple[DeviceView, ...]
    streams: tuple[DemandStream, ...]
    queues: tuple[QueueView, ...] = ()
    jobs: tuple[SimulatedJobSpec, ...] = ()
    batches: tuple[SimulatedBatchSpec, ...] = ()
    step_s: float = 2.0
    plan_every_s: float = 10.0
    seed: int = 1


class SimulationResult(msgspec.Struct, kw_only=True):
    """What came of it."""

    policy: str
    fill: float = 0.0
    """Work done, relative to what the devices could have done: a job's device counts while it computes what is not
    lost, a replica's by its work relative to the most that it does within the objective (or of batches alone)."""
    held: float = 0.0
    """Share of device-seconds in which somebody held the device."""
    kept: float = 0.0
    """Share of the interactive requests that were answered within their objective."""
    kept_by_model: dict[str, float] = {}
    requests: float = 0.0
    deadlines: int = 0
    deadlines_kept: int = 0
    batch_work: float = 0.0
    job_hours: float = 0.0
    """Device-hours of jobs, what was lost not counted."""
    lost_hours: float = 0.0
    """Device-hours of restores, checkpoints and lost work."""
    interactive_hours: float = 0.0
    """Device-hours of replicas for interactive requests."""
    jobs_ended: int = 0
    preemptions: int = 0
    replica_starts: int = 0
    plans: int = 0
    hours: list[tuple[float, float, float]] = []
    """For each hour: fill, share of devices with interactive replicas, share of requests within the objective."""


class SimReplica(msgspec.Struct):
    id: str
    model: str
    devices: tuple[str, ...]
    phase: Phase
    since: float
    next_at: float = math.inf
    """When it is ready, or has drained."""
    batch_only: bool = False

    def view(self, load: SimulatedLoad, lines: bool) -> ReplicaView:
        ready = self.phase is Phase.READY and not self.batch_only
        return ReplicaView(
            id=self.id,
            model=self.model,
            devices=self.devices,
            phase=self.phase,
            in_flight=round(load.sequences) if ready else 0,
            filler=round(load.fillers) if ready else int(lines),
            since=self.since,
            batch_only=self.batch_only,
        )


class Simulation:
    """One day of one fleet under one policy."""

    def __init__(self, scenario: Scenario, policy: SchedulingPolicy) -> None:
        self.scenario, self.policy = scenario, policy
        chance = random.Random(scenario.seed)
        self.now = 0.0
        self.models = {each.spec.name: ServedModel(each, chance, scenario.step_s) for each in scenario.streams}
        self.replicas: dict[str, SimReplica] = {}
        work = policy.work
        self.jobs = {spec.id: SimJob(spec) for spec in scenario.jobs} if work else {}
        self.batches = [SimBatch(spec, spec.work) for spec in scenario.batches] if work else []
        self.batches.sort(key=lambda each: each.spec.deadline)
        self.promises: tuple[DevicePromise, ...] = ()
        self.figures = SimulationResult(policy=policy.name)
        self._used_s = self._held_s = 0.0
        self._hour = [0.0, 0.0, 0.0, 0.0]
        self._count = 0
        self._place_first()

    def _place_first(self) -> None:
        free = [view.id for view in self.scenario.devices]
        for model in sorted(self.models.values(), key=lambda each: -each.spec.devices):
            for _ in range(model.stream.first_replicas):
                devices, free = tuple(free[: model.spec.devices]), free[model.spec.devices :]
                self._add(model.spec.name, devices, Phase.READY, math.inf, batch_only=False)

    def _add(self, model: str, devices: tuple[str, ...], phase: Phase, next_at: float, *, batch_only: bool) -> None:
        self._count += 1
        name = f"{model}-{self._count}"
        self.replicas[name] = SimReplica(name, model, devices, phase, self.now, next_at, batch_only)

    def run(self) -> SimulationResult:
        """The whole day."""
        step_s = self.scenario.step_s
        steps = min(len(stream.bins) for stream in self.scenario.streams)
        every = max(round(self.scenario.plan_every_s / step_s), 1)
        for model in self.models.values():
            if model.history and self.policy.forecast:
                model.demand = forecast(
                    DemandSeries(0.0, tuple(model.history), FORECAST_S), model.spec.startup_s + FORECAST_S
                )
        for index in range(steps):
            self.now = index * step_s
            if index % every == 0:
                self._plan(every * step_s)
            if index and index % round(FORECAST_S / step_s) == 0 and self.policy.forecast:
                for model in self.models.values():
                    model.look_ahead(self.now)
            self._step(index)
            if (index + 1) % round(3600 / step_s) == 0:
                self._end_hour()
        return self._sum_up(steps * step_s)

    # A plan

    def _plan(self, dt_s: float) -> None:
        for replica in list(self.replicas.values()):
            if replica.next_at <= self.now:
                if replica.phase is Phase.DRAINING:
                    del self.replicas[replica.id]
                else:
                    replica.phase, replica.since, replica.next_at = Phase.READY, self.now, math.inf
        self._count_ready()
        for model in self.models.values():
            model.measure()
        plan = self.policy.decide(self.snapshot())
        self._carry_out(plan)
        self._count_ready()
        self._run_jobs(dt_s)
        self._account_held(dt_s)

    def snapshot(self) -> FleetSnapshot:
        """What the policy sees."""
        now = self.now
        parts: dict[str, list[tuple[float, float]]] = {}
        for batch in self.batches:
            if batch.spec.submitted_at <= now and batch.left > 0:
                parts.setdefault(batch.spec.model, []).append((batch.left, batch.spec.deadline))
        return FleetSnapshot(
            now=now,
            devices=self.scenario.devices,
            models=tuple(model.view(now, self.policy.forecast) for model in self.models.values()),
            replicas=tuple(
                replica.view(self.models[replica.model].load, replica.model in parts)
                for replica in self.replicas.values()
            ),
            jobs=tuple(
                job.view(now) for job in self.jobs.values() if job.ended_at is None and job.spec.submitted_at <= now
            ),
            queues=self.scenario.queues,
            backlogs=tuple(BacklogView(model=name, parts=tuple(each)) for name, each in parts.items()),
            promises=self.promises,
        )

    def _carry_out(self, plan: Plan) -> None:
        figures = self.figures
        figures.plans += 1
        self.promises = plan.promises
        for lent in plan.lend_replicas:
            self.replicas[lent.replica].batch_only = lent.batch_only
        for stop in plan.stop_replicas:
            replica = self.replicas[stop.replica]
            replica.phase, replica.since, replica.next_at = Phase.DRAINING, self.now, self.now + _DRAIN_S
        for start in plan.start_replicas:
            ready_at = self.now + self.models[start.model].spec.startup_s
            self._add(start.model, start.devices, Phase.STARTING, ready_at, batch_only=start.batch_only)
            figures.replica_starts += 1
        for gone in plan.preempt_jobs:
            self.jobs[gone.job].preempt(self.now)
            figures.preemptions += 1
        for begin in plan.start_jobs:
            self.jobs[begin.job].start(begin.devices, self.now)

    def _count_ready(self) -> None:
        ready = dict.fromkeys(self.models, 0)
        lent = dict.fromkeys(self.models, 0)
        for replica in self.replicas.values():
            if replica.phase is Phase.READY:
                (lent if replica.batch_only else ready)[replica.model] += 1
        for name, model in self.models.items():
            model.resize(ready[name])
            model.lent = lent[name]

    # A step

    def _step(self, index: int) -> None:
        dt = self.scenario.step_s
        for name, model in self.models.items():
            came = model.stream.bins[index]
            lines = any(each.left > 0 and each.spec.submitted_at <= self.now for each in self.batches_of(name))
            missed = model.missed
            outcome, used = model.step(came, lines, self.policy.filler)
            devices = model.spec.devices
            done = 0.0
            if outcome is not None:
                done = outcome.filler_work * model.ready
            could = model.lent * model.best_filler * dt
            rest = self._batch_done(name, done + could)
            lent_used = max(could - rest, 0.0) / model.best_filler
            self._used_s += (used * dt + lent_used) * devices
            self._hour[0] += (used * dt + lent_used) * devices
            self._hour[1] += model.ready * devices * dt
            self._hour[2] += came.requests
            self._hour[3] += model.missed - missed
            self.figures.interactive_hours += model.ready * devices * dt / 3600

    def batches_of(self, model: str) -> list[SimBatch]:
        return [each for each in self.batches if each.spec.model == model and each.left > 0]

    def _batch_done(self, model: str, work: float) -> float:
        """Take so much off the batches, the earliest deadline first. Returns what was not needed."""
        for batch in self.batches:
            if work <= 0:
                return 0.0
            if batch.spec.model != model or batch.left <= 0 or batch.spec.submitted_at > self.now:
                continue
            done = min(batch.left, work)
            batch.left -= done
            work -= done
            self.figures.batch_work += done
            if batch.left <= 0:
                batch.ended_at = self.now
        return work

    def _run_jobs(self, dt_s: float) -> None:
        for job in self.jobs.values():
            if job.phase is JobPhase.QUEUED:
                continue
            on = len(job.on)
            computed = job.advance(self.now, dt_s)
            self._used_s += computed * on
            self._hour[0] += computed * on
            self.figures.job_hours += computed * on / 3600
            self.figures.lost_hours += (dt_s - computed) * on / 3600

    def _account_held(self, dt_s: float) -> None:
        held = sum(len(replica.devices) for replica in self.replicas.values())
        held += sum(len(job.on) for job in self.jobs.values())
        self._held_s += held * dt_s

    # The end

    def _end_hour(self) -> None:
        used, interactive, asked, missed = self._hour
        whole = len(self.scenario.devices) * 3600
        self.figures.hours.append((used / whole, interactive / whole, 1 - missed / max(asked, 1e-9)))
        self._hour = [0.0, 0.0, 0.0, 0.0]

    def _sum_up(self, seconds: float) -> SimulationResult:
        figures, owned = self.figures, len(self.scenario.devices) * seconds
        figures.fill, figures.held = self._used_s / owned, self._held_s / owned
        asked = sum(model.asked for model in self.models.values())
        figures.requests = asked
        figures.kept = 1 - sum(model.missed for model in self.models.values()) / max(asked, 1e-9)
        figures.kept_by_model = {name: 1 - model.missed / max(model.asked, 1e-9) for name, model in self.models.items()}
        due: list[tuple[float, float | None]] = [
            (job.spec.deadline, job.ended_at) for job in self.jobs.values() if job.spec.deadline is not None
        ]
        due += [(batch.spec.deadline, batch.ended_at) for batch in self.batches]
        figures.deadlines = sum(1 for deadline, _ in due if deadline <= seconds)
        due = [(deadline, at) for deadline, at in due if deadline <= seconds]
        figures.deadlines_kept = sum(1 for deadline, at in due if at is not None and at <= deadline)
        figures.jobs_ended = sum(1 for job in self.jobs.values() if job.ended_at is not None)
        return figures
