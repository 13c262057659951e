"""Job scheduling: which jobs start, and which are preempted for others."""

import math
from collections.abc import Iterable

import msgspec

from tidemill.tides.job_queue import GangReservation, GangReservations, JobQueue, least
from tidemill.tides.occupancy import ORDINARY, ends_soon
from tidemill.tides.placement import Placement, PlacementRequest, kinds_of, place
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.preemption import job_candidate, preemptible_by_job
from tidemill.tides.quota import QueueUse, laxity_s
from tidemill.tides.reservations import firm_room, lendable
from tidemill.tides.state import JobPhase, JobView, PreemptJob, StartJob, WaitNote

MAX_ROUNDS = 4


def offer_jobs(builder: PlanBuilder) -> None:
    """Offer running jobs for preemption."""
    for job in builder.running:
        name = f"job {job.id}"
        if job.phase is not JobPhase.RUNNING or not job.preemptible or not job.on:
            continue
        if builder.on_reservation(job):
            continue
        if any(name != builder.occupancy.holder.get(device) for device in job.on):
            continue
        views = [builder.occupancy.device.get(device) for device in job.on]
        if any(view is None or not view.up for view in views):
            builder.preempt_jobs.append(PreemptJob(job.id, "a device that it is on was taken out or lost"))
            builder.occupancy.vacate(name, job.on)
            builder.queues.remove(job, len(job.on))
            continue
        if not ends_soon(job, builder.rules.soon_s):
            builder.occupancy.offer(job_candidate(job, builder.now, builder.rules))


def run_jobs(builder: PlanBuilder) -> None:
    """Give devices to jobs, in the order of quotas, shares, deadlines and age."""
    jobs = []
    for job in builder.snapshot.jobs:
        if job.phase is not JobPhase.QUEUED or job.reservation in builder.reserved:
            continue
        if job.not_before > builder.now:
            builder.wait(f"job {job.id}", f"its next attempt, in {job.not_before - builder.now:.0f} s")
        else:
            jobs.append(job)
    for _ in range(MAX_ROUNDS):
        each = SchedulingRound(builder)
        waiting = each.run(jobs)
        if not each.changed:
            break
        builder.occupancy.unhold()
        jobs = waiting
    builder.waiting += each.notes


class SchedulingRound:
    """One pass over the waiting jobs."""

    def __init__(self, builder: PlanBuilder) -> None:
        self._builder = builder
        self._gangs = GangReservations(builder)
        self._blocked: set[str] = set()
        """Queues whose first job waits: those behind it preempt nobody."""
        self._too_many: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        """By kinds and zones, the least number of devices that was not to be had without preemption."""
        self._zones = lendable(builder)
        self._firm = firm_room(builder)
        self.changed = False
        """A job began on what is kept for a gang, or was preempted: the shares are others now."""
        self.notes: list[WaitNote] = []
        """What those wait for that don't begin."""

    def run(self, jobs: Iterable[JobView]) -> list[JobView]:
        """Run the pass; returns the jobs that got no devices."""
        builder, queue, waiting = self._builder, JobQueue(self._builder, jobs), []
        while (job := queue.next()) is not None:
            name, share = f"job {job.id}", builder.queues[job.queue]
            why_not = _never(builder, job) or _over_limit(share, job) or _no_firm_room(builder, job, self._firm)
            placement = None if why_not else self._place(job)
            if placement is not None:
                quota = _quota_in_words(share, job, len(placement.devices))
                builder.queues.add(job, len(placement.devices))
                if builder.give(placement, name, f"job {job.id} needs its devices: {quota}"):
                    builder.start_jobs.append(StartJob(job.id, placement.devices, quota))
                    builder.begun.append(
                        msgspec.structs.replace(
                            job, phase=JobPhase.RUNNING, on=placement.devices, started_at=builder.now
                        )
                    )
                else:
                    builder.wait(name, f"{len(placement.devices)} devices that are being given back")
            else:
                if not why_not and job.queue not in self._blocked:
                    self._blocked.add(job.queue)
                    self._gangs.reserve(job)
                self.notes.append(WaitNote(name, why_not or _why_blocked(builder, job, self._gangs.first_for(job))))
                waiting.append(job)
            queue.advance(job.queue)
        return waiting

    def _place(self, job: JobView) -> Placement | None:
        builder, occupancy = self._builder, self._builder.occupancy
        zones = self._zones if job.preemptible else (ORDINARY,)
        work, count = f"job {job.id}", _how_many(builder, job, zones)
        lets = self._gangs.admits(job)
        # Whom a later job may preempt, the gang that is first in the queue may preempt, too.
        free_way = lets or self._gangs.first_for(job) is None
        search = free_way and job.queue not in self._blocked and builder.searches < builder.rules.preemption_searches
        key = (job.kinds, zones)
        if not (search or lets or work in occupancy.promises_to) and count >= self._too_many.get(key, count + 1):
            return None
        builder.searches += search
        free = len(builder.occupancy.promised)
        may_preempt = preemptible_by_job(job, builder.queues, builder.now, builder.rules) if search else None
        placement = place(
            occupancy,
            PlacementRequest(work, count, job.kinds, spread=True, zones=zones, held=lets, may_preempt=may_preempt),
        )
        if placement is None and not lets:
            self._too_many[key] = min(count, self._too_many.get(key, count))
        if placement is not None and (placement.victims or len(builder.occupancy.promised) < free):
            self.changed = True
        return placement


def _how_many(builder: PlanBuilder, job: JobView, zones: tuple[str, ...]) -> int:
    """The number of devices that a job asks for.

    All, or when it can do with fewer, as many as are free and it may have.
    """
    count = max(job.devices, 1)
    if job.gang:
        return count
    occupancy, share = builder.occupancy, builder.queues[job.queue]
    kinds = kinds_of(occupancy, PlacementRequest("", count, job.kinds))
    free = [sum(occupancy.free[zone].count(kind) for zone in zones) for kind in kinds]
    most = next((each for each in free if each > 0), 1)
    room = share.limit - share.used if job.preemptible else min(share.limit - share.used, 1)
    return int(max(min(count, most, room), 1))


def _never(builder: PlanBuilder, job: JobView) -> str:
    occupancy = builder.occupancy
    kinds = job.kinds or tuple(occupancy.total)
    most = max((occupancy.total.get(kind, 0) for kind in kinds), default=0)
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


def _no_firm_room(builder: PlanBuilder, job: JobView, firm: int) -> str:
    """Why a job that can't be preempted would take guaranteed devices; "" if it would not.

    It runs within its queue's quota, or on what is nobody's; and beside minimum replicas and reservations, also those
    to come.
    """
    if job.preemptible:
        return ""
    queues, count = builder.queues, least(job)
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


def _quota_in_words(share: QueueUse, job: JobView, devices: int) -> str:
    queue = share.view
    if share.owns(devices):
        return f"queue {queue.name} has {share.used + devices} of its {queue.quota} devices"
    return f"queue {queue.name} borrows: {share.used + devices} devices, its quota is {queue.quota}"


def _why_blocked(builder: PlanBuilder, job: JobView, first: GangReservation | None) -> str:
    kinds = " or ".join(job.kinds) or "any kind"
    size = "1 device" if job.devices == 1 else f"{job.devices} devices{' at once' if job.gang else ''}"
    share = builder.queues[job.queue]
    parts = [f"{size} ({kinds})"]
    if first is not None and first.job.id == job.id:
        when = "" if math.isinf(first.at) else f", all of them are expected in {first.at - builder.now:.0f} s"
        parts.append(f"{first.count} are kept for it{when}")
    elif first is not None:
        parts.append(f"job {first.job.id} with {first.job.devices} devices is first in the queue")
    parts.append(f"queue {share.view.name} has {share.used} devices, its quota is {share.view.quota}")
    laxity = laxity_s(job, builder.now)
    if laxity is not None:
        parts.append(f"it can wait {laxity:,.0f} s" if laxity > 0 else f"it will be {-laxity:,.0f} s late")
    return "; ".join(parts)
