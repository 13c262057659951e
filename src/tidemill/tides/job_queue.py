"""Whose turn it is among the jobs that wait, and the gangs that devices are kept together for."""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable

import msgspec

from tidemill.tides.occupancy import ORDINARY, PreemptionTier
from tidemill.tides.placement import PlacementRequest, kinds_of
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.quota import behind, gives_way, presses, turn
from tidemill.tides.state import JobPhase, JobView

Order = tuple[int, bool, float, tuple[bool, float, float, str]]


def least(job: JobView) -> int:
    """Devices without which a job doesn't begin."""
    return max(job.devices, 1) if job.gang else 1


class JobQueue:
    """The jobs that wait, queue by queue."""

    def __init__(self, draft: PlanBuilder, jobs: Iterable[JobView]) -> None:
        self._draft = draft
        self._jobs: dict[str, list[JobView]] = defaultdict(list)
        for job in jobs:
            self._jobs[job.queue].append(job)
        self._heap: list[tuple[Order, str]] = []
        for name, jobs in self._jobs.items():
            jobs.sort(key=lambda each: (not self._granted(each), turn(each, draft.now, draft.rules)), reverse=True)
            self._push(name)

    def _push(self, queue: str) -> None:
        """A queue whose next job is within its quota goes before one that would borrow; of borrowers, the one that has
        the least for its weight, so that a large job is not always the last; a deadline that presses goes first."""
        jobs = self._jobs[queue]
        if not jobs:
            return
        draft, job, share = self._draft, jobs[-1], self._draft.queues[queue]
        pressing = presses(job, draft.now, draft.rules)
        order: Order
        if self._granted(job):
            order = (-1, False, 0.0, turn(job, draft.now, draft.rules))
        elif share.owns(least(job)):
            order = (0, not pressing, share.used / max(share.view.quota, 1), turn(job, draft.now, draft.rules))
        else:
            order = (1, not pressing, share.weight_used(), turn(job, draft.now, draft.rules))
        heapq.heappush(self._heap, (order, queue))

    def _granted(self, job: JobView) -> bool:
        """The last plan has given it all its devices, of which some are still being given back."""
        return len(self._draft.board.promises_to.get(f"job {job.id}", ())) >= least(job)

    def next(self) -> JobView | None:
        """The job whose turn it is."""
        if not self._heap:
            return None
        _, queue = heapq.heappop(self._heap)
        return self._jobs[queue].pop()

    def again(self, queue: str) -> None:
        """The queue's last job has had its turn."""
        self._push(queue)


class GangReservation(msgspec.Struct, frozen=True):
    """The gang that is first in line for a kind, and when its devices will have come together."""

    job: JobView
    count: int
    """Devices that are kept for it so far."""
    at: float
    """`inf`: nobody knows."""


class GangReservations:
    """What is kept together for gangs: one gang for each kind of device."""

    def __init__(self, draft: PlanBuilder) -> None:
        self._draft = draft
        self.by_kind: dict[str, GangReservation] = {}

    def first_for(self, job: JobView) -> GangReservation | None:
        """The gang that stands before a job."""
        return next((each for kind, each in self.by_kind.items() if not job.kinds or kind in job.kinds), None)

    def keep(self, job: JobView) -> GangReservation | None:
        """Keep what there is of a kind for a gang that can't begin yet. None when others are first in line."""
        draft, board = self._draft, self._draft.board
        if not job.gang or job.devices < 2:
            return None
        for kind in kinds_of(board, PlacementRequest("", job.devices, job.kinds)):
            if kind in self.by_kind or board.total[kind] < job.devices:
                continue
            pools = (board.free[ORDINARY], board.coming[ORDINARY])
            there = [device for pool in pools for node in pool.kinds.get(kind, {}).values() for device in node]
            devices = there[: job.devices]
            hold = GangReservation(job, len(devices), _together_at(draft, kind, job.devices - len(devices), job))
            self.by_kind[kind] = hold
            board.hold(devices)
            draft.promise(devices, f"job {job.id}")
            return hold
        return None

    def lets(self, job: JobView) -> bool:
        """Whether a job may run on what is kept: it ends before that is needed, or would give way."""
        return bool(self.by_kind) and all(self._lets(job, hold) for hold in self.by_kind.values())

    def _lets(self, job: JobView, hold: GangReservation) -> bool:
        draft = self._draft
        if job.remaining_s is not None and draft.now + job.remaining_s <= hold.at < math.inf:
            return True
        if not job.preemptible or not behind(job, hold.job, draft.rules):
            return False
        count = max(job.devices, 1)
        running = msgspec.structs.replace(job, phase=JobPhase.RUNNING, started_at=draft.now, on=("",) * count)
        draft.queues.add(running, count)
        settled = draft.now + draft.rules.min_run_s
        would = gives_way(running, hold.job, draft.queues, settled, draft.rules)
        draft.queues.remove(running, count)
        return would


def _together_at(draft: PlanBuilder, kind: str, missing: int, gang: JobView) -> float:
    """When a gang will have as many devices more: of jobs that end, or that will have run long enough to give way."""
    board, rules = draft.board, draft.rules
    freed: list[tuple[float, int]] = []

    def of_kind(devices: Iterable[str]) -> int:
        views = (board.device.get(device) for device in devices)
        return sum(1 for view in views if view is not None and view.up and view.kind == kind)

    for job in (*draft.running, *draft.begun):
        if f"job {job.id}" in board.gone or job.phase is not JobPhase.RUNNING or not (count := of_kind(job.on)):
            continue
        settled = max(job.started_at + rules.min_run_s, draft.now)
        if gives_way(job, gang, draft.queues, settled, rules):
            freed.append((settled, count))
        elif job.remaining_s is not None:
            freed.append((draft.now + job.remaining_s, count))
    for unit in board.units.values():
        if unit.replica is not None and unit.tier == PreemptionTier.LENT:
            freed.append((max(unit.replica.since + rules.min_fill_s, draft.now), of_kind(unit.devices)))
    for at, count in sorted(freed):
        missing -= count
        if missing <= 0:
            return at
    return math.inf
