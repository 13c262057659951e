"""The order of the job queue, and device reservations for waiting gangs."""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable

import msgspec

from tidemill.tides.occupancy import ORDINARY
from tidemill.tides.placement import PlacementRequest, kinds_of
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.preemption import PreemptionTier, may_preempt
from tidemill.tides.quota import behind, is_urgent, queue_order
from tidemill.tides.state import JobPhase, JobView

Order = tuple[int, bool, float, tuple[bool, float, float, str]]


def least(job: JobView) -> int:
    """The minimum number of devices for a job to start."""
    return max(job.devices, 1) if job.gang else 1


class JobQueue:
    """The waiting jobs, queue by queue."""

    def __init__(self, builder: PlanBuilder, jobs: Iterable[JobView]) -> None:
        self._builder = builder
        self._jobs: dict[str, list[JobView]] = defaultdict(list)
        for job in jobs:
            self._jobs[job.queue].append(job)
        self._heap: list[tuple[Order, str]] = []
        for name, jobs in self._jobs.items():
            jobs.sort(
                key=lambda each: (not self._granted(each), queue_order(each, builder.now, builder.rules)), reverse=True
            )
            self._push(name)

    def _push(self, queue: str) -> None:
        """A queue whose next job is within its quota goes before one that would borrow.

        Of borrowers, the one that has the least for its weight, so that a large job is not always the last; an urgent
        one goes first.
        """
        jobs = self._jobs[queue]
        if not jobs:
            return
        builder, job, share = self._builder, jobs[-1], self._builder.queues[queue]
        urgent = is_urgent(job, builder.now, builder.rules)
        order: Order
        if self._granted(job):
            order = (-1, False, 0.0, queue_order(job, builder.now, builder.rules))
        elif share.owns(least(job)):
            order = (0, not urgent, share.used / max(share.view.quota, 1), queue_order(job, builder.now, builder.rules))
        else:
            order = (1, not urgent, share.weight_used(), queue_order(job, builder.now, builder.rules))
        heapq.heappush(self._heap, (order, queue))

    def _granted(self, job: JobView) -> bool:
        """True if the last plan gave it all its devices, some of which are still being freed."""
        return len(self._builder.occupancy.promises_to.get(f"job {job.id}", ())) >= least(job)

    def next(self) -> JobView | None:
        """The next job."""
        if not self._heap:
            return None
        _, queue = heapq.heappop(self._heap)
        return self._jobs[queue].pop()

    def advance(self, queue: str) -> None:
        """Advance to the queue's next job."""
        self._push(queue)


class GangReservation(msgspec.Struct, frozen=True):
    """Devices of a kind reserved for the first gang in the queue.

    And when it will have all of them.
    """

    job: JobView
    count: int
    """Devices that are kept for it so far."""
    at: float
    """`inf`: nobody knows."""


class GangReservations:
    """Device reservations for gangs: one gang for each kind of device."""

    def __init__(self, builder: PlanBuilder) -> None:
        self._builder = builder
        self.by_kind: dict[str, GangReservation] = {}

    def first_for(self, job: JobView) -> GangReservation | None:
        """The gang ahead of a job."""
        return next((each for kind, each in self.by_kind.items() if not job.kinds or kind in job.kinds), None)

    def reserve(self, job: JobView) -> GangReservation | None:
        """Reserve the available devices of a kind for a gang that can't start yet; None if others come first."""
        builder, occupancy = self._builder, self._builder.occupancy
        if not job.gang or job.devices < 2:
            return None
        for kind in kinds_of(occupancy, PlacementRequest("", job.devices, job.kinds)):
            if kind in self.by_kind or occupancy.total[kind] < job.devices:
                continue
            pools = (occupancy.free[ORDINARY], occupancy.coming[ORDINARY])
            there = [device for pool in pools for node in pool.kinds.get(kind, {}).values() for device in node]
            devices = there[: job.devices]
            hold = GangReservation(job, len(devices), _together_at(builder, kind, job.devices - len(devices), job))
            self.by_kind[kind] = hold
            occupancy.hold(devices)
            builder.promise(devices, f"job {job.id}")
            return hold
        return None

    def admits(self, job: JobView) -> bool:
        """True if a job may run on reserved devices: it ends in time, or may be preempted."""
        return bool(self.by_kind) and all(self._admits(job, hold) for hold in self.by_kind.values())

    def _admits(self, job: JobView, hold: GangReservation) -> bool:
        builder = self._builder
        if job.remaining_s is not None and builder.now + job.remaining_s <= hold.at < math.inf:
            return True
        if not job.preemptible or not behind(job, hold.job, builder.rules):
            return False
        count = max(job.devices, 1)
        running = msgspec.structs.replace(job, phase=JobPhase.RUNNING, started_at=builder.now, on=("",) * count)
        builder.queues.add(running, count)
        settled = builder.now + builder.rules.min_run_s
        would = may_preempt(hold.job, running, builder.queues, settled, builder.rules)
        builder.queues.remove(running, count)
        return would


def _together_at(builder: PlanBuilder, kind: str, missing: int, gang: JobView) -> float:
    """The time at which a gang gets so many more devices, from jobs that end or may be preempted."""
    occupancy, rules = builder.occupancy, builder.rules
    freed: list[tuple[float, int]] = []

    def of_kind(devices: Iterable[str]) -> int:
        views = (occupancy.device.get(device) for device in devices)
        return sum(1 for view in views if view is not None and view.up and view.kind == kind)

    for job in (*builder.running, *builder.begun):
        if f"job {job.id}" in occupancy.gone or job.phase is not JobPhase.RUNNING or not (count := of_kind(job.on)):
            continue
        settled = max(job.started_at + rules.min_run_s, builder.now)
        if may_preempt(gang, job, builder.queues, settled, rules):
            freed.append((settled, count))
        elif job.remaining_s is not None:
            freed.append((builder.now + job.remaining_s, count))
    for candidate in occupancy.candidates.values():
        if candidate.replica is not None and candidate.tier == PreemptionTier.LENT:
            freed.append((max(candidate.replica.since + rules.min_fill_s, builder.now), of_kind(candidate.devices)))
    for at, count in sorted(freed):
        missing -= count
        if missing <= 0:
            return at
    return math.inf
