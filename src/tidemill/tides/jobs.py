"""Which jobs begin, and which give way to others."""

import math
from collections.abc import Iterable

import msgspec

from tidemill.tides.job_queue import GangReservation, GangReservations, JobQueue, least
from tidemill.tides.occupancy import ORDINARY, PreemptionCandidate, PreemptionTier, ends_soon
from tidemill.tides.placement import Placement, PlacementRequest, kinds_of, place
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.quota import QueueUse, gives_way, laxity_s
from tidemill.tides.reservations import firm_room, lendable
from tidemill.tides.state import JobPhase, JobView, PreemptJob, StartJob, WaitNote

MAX_ROUNDS = 4


def offer_jobs(draft: PlanBuilder) -> None:
    """Say which running jobs could give way."""
    for job in draft.running:
        name = f"job {job.id}"
        if job.phase is not JobPhase.RUNNING or not job.preemptible or not job.on:
            continue
        if draft.on_reservation(job):
            continue
        if any(name != draft.board.holder.get(device) for device in job.on):
            continue
        views = [draft.board.device.get(device) for device in job.on]
        if any(view is None or not view.up for view in views):
            draft.preempt_jobs.append(PreemptJob(job.id, "a device that it is on was taken out or lost"))
            draft.board.vacate(name, job.on)
            draft.queues.remove(job, len(job.on))
            continue
        if not ends_soon(job, draft.rules.soon_s):
            draft.board.offer(draft.unit_of(job))


def run_jobs(draft: PlanBuilder) -> None:
    """Give devices to jobs, in the order of quotas, shares, deadlines and age."""
    jobs = []
    for job in draft.snapshot.jobs:
        if job.phase is not JobPhase.QUEUED or job.reservation in draft.reserved:
            continue
        if job.not_before > draft.now:
            draft.wait(f"job {job.id}", f"its next attempt, in {job.not_before - draft.now:.0f} s")
        else:
            jobs.append(job)
    for _ in range(MAX_ROUNDS):
        each = SchedulingRound(draft)
        waiting = each.run(jobs)
        if not each.changed:
            break
        draft.board.unhold()
        jobs = waiting
    draft.waiting += each.notes


class SchedulingRound:
    """Each job that waits has its turn once."""

    def __init__(self, draft: PlanBuilder) -> None:
        self._draft = draft
        self._holds = GangReservations(draft)
        self._blocked: set[str] = set()
        """Queues whose first job waits: those behind it make nobody give way."""
        self._too_many: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        """By kinds and zones, the least number of devices that was not to be had without preemption."""
        self._zones = lendable(draft)
        self._firm = firm_room(draft)
        self.changed = False
        """A job began on what is kept for a gang, or was preempted: the shares are others now."""
        self.notes: list[WaitNote] = []
        """What those wait for that don't begin."""

    def run(self, jobs: Iterable[JobView]) -> list[JobView]:
        """Returns those that got nothing."""
        draft, line, waiting = self._draft, JobQueue(self._draft, jobs), []
        while (job := line.next()) is not None:
            name, share = f"job {job.id}", draft.queues[job.queue]
            why_not = _never(draft, job) or _over_limit(share, job) or _no_firm_room(draft, job, self._firm)
            grant = None if why_not else self._place(job)
            if grant is not None:
                standing = _standing(share, job, len(grant.devices))
                draft.queues.add(job, len(grant.devices))
                if draft.give(grant, name, f"job {job.id} needs its devices: {standing}"):
                    draft.start_jobs.append(StartJob(job.id, grant.devices, standing))
                    draft.begun.append(
                        msgspec.structs.replace(job, phase=JobPhase.RUNNING, on=grant.devices, started_at=draft.now)
                    )
                else:
                    draft.wait(name, f"{len(grant.devices)} devices that are being given back")
            else:
                if not why_not and job.queue not in self._blocked:
                    self._blocked.add(job.queue)
                    self._holds.keep(job)
                self.notes.append(WaitNote(name, why_not or _why_blocked(draft, job, self._holds.first_for(job))))
                waiting.append(job)
            line.again(job.queue)
        return waiting

    def _place(self, job: JobView) -> Placement | None:
        draft, board = self._draft, self._draft.board
        zones = self._zones if job.preemptible else (ORDINARY,)
        work, count = f"job {job.id}", _how_many(draft, job, zones)

        def may(unit: PreemptionCandidate) -> bool:
            if unit.job is not None:
                return gives_way(unit.job, job, draft.queues, draft.now, draft.rules)
            if unit.tier != PreemptionTier.LENT or unit.replica is None:
                return False
            return draft.now - unit.replica.since >= draft.rules.min_fill_s

        lets = self._holds.lets(job)
        # Whoever would give way to a later job would do so to the gang that is first in line, too.
        free_way = lets or self._holds.first_for(job) is None
        search = free_way and job.queue not in self._blocked and draft.searches < draft.rules.preemption_searches
        key = (job.kinds, zones)
        if not (search or lets or work in board.promises_to) and count >= self._too_many.get(key, count + 1):
            return None
        draft.searches += search
        free = len(draft.board.promised)
        grant = place(
            board,
            PlacementRequest(work, count, job.kinds, spread=True, zones=zones, held=lets, may=may if search else None),
        )
        if grant is None and not lets:
            self._too_many[key] = min(count, self._too_many.get(key, count))
        if grant is not None and (grant.victims or len(draft.board.promised) < free):
            self.changed = True
        return grant


def _how_many(draft: PlanBuilder, job: JobView, zones: tuple[str, ...]) -> int:
    """The devices that a job asks for: all, or when it can do with fewer, as many as are free and it may have."""
    count = max(job.devices, 1)
    if job.gang:
        return count
    board, share = draft.board, draft.queues[job.queue]
    kinds = kinds_of(board, PlacementRequest("", count, job.kinds))
    free = [sum(board.free[zone].count(kind) for zone in zones) for kind in kinds]
    most = next((each for each in free if each > 0), 1)
    room = share.limit - share.used if job.preemptible else min(share.limit - share.used, 1)
    return int(max(min(count, most, room), 1))


def _never(draft: PlanBuilder, job: JobView) -> str:
    board = draft.board
    kinds = job.kinds or tuple(board.total)
    most = max((board.total.get(kind, 0) for kind in kinds), default=0)
    if least(job) <= most:
        return ""
    return f"{least(job)} devices of one kind ({' or '.join(job.kinds) or 'any'}); the fleet has {most} that are up"


def _over_limit(share: QueueUse, job: JobView) -> str:
    if share.used + least(job) <= share.limit:
        return ""
    return (
        f"its queue {share.view.name} to use less: it has {share.used} devices and may have {share.limit:.0f} "
        f"(quota {share.view.quota}, and {share.view.borrow} borrowed)"
    )


def _no_firm_room(draft: PlanBuilder, job: JobView, firm: int) -> str:
    """What can't be preempted must leave room for all that is guaranteed: it runs within its queue's quota, or on what
    is nobody's; and beside minimum replicas and reservations, also those to come."""
    if job.preemptible:
        return ""
    queues, count = draft.queues, least(job)
    share = queues[job.queue]
    room = firm - queues.firm
    if share.firm + count > share.view.quota:
        room = min(room, firm - queues.quota - queues.firm_borrowed)
    if count <= room:
        return ""
    return (
        f"{count} devices for a job that can't be preempted; beside what models, quotas and reservations must be able "
        f"to get back there is room for {max(room, 0)}"
    )


def _standing(share: QueueUse, job: JobView, devices: int) -> str:
    queue = share.view
    if share.owns(devices):
        return f"queue {queue.name} has {share.used + devices} of its {queue.quota} devices"
    return f"queue {queue.name} borrows: {share.used + devices} devices, its quota is {queue.quota}"


def _why_blocked(draft: PlanBuilder, job: JobView, first: GangReservation | None) -> str:
    kinds = " or ".join(job.kinds) or "any kind"
    size = "1 device" if job.devices == 1 else f"{job.devices} devices{' at once' if job.gang else ''}"
    share = draft.queues[job.queue]
    parts = [f"{size} ({kinds})"]
    if first is not None and first.job.id == job.id:
        when = "" if math.isinf(first.at) else f", all of them are expected in {first.at - draft.now:.0f} s"
        parts.append(f"{first.count} are kept for it{when}")
    elif first is not None:
        parts.append(f"job {first.job.id} with {first.job.devices} devices is first in line")
    parts.append(f"queue {share.view.name} has {share.used} devices, its quota is {share.view.quota}")
    laxity = laxity_s(job, draft.now)
    if laxity is not None:
        parts.append(f"it can wait {laxity:,.0f} s" if laxity > 0 else f"it will be {-laxity:,.0f} s late")
    return "; ".join(parts)
