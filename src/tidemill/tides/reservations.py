"""Reservations: a tenant's rented devices are available when the reservation starts.

They are its alone unless it lends them.
"""

from collections import defaultdict

from tidemill.tides.occupancy import ORDINARY
from tidemill.tides.placement import PlacementRequest, place
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.preemption import preemptible_by_reservation, preemptible_by_reserved_job
from tidemill.tides.quota import queue_order
from tidemill.tides.state import AssignReservation, JobPhase, JobView, ReservationView, StartJob


def unmarked(reservation: str) -> str:
    """The zone of devices promised to a reservation but not marked yet; they are not lent."""
    return f"{reservation} unmarked"


def keep_reservations(builder: PlanBuilder) -> None:
    """Set aside the devices of reservations in force and of those that start soon.

    Make others give it back in time.
    """
    for reservation in sorted(builder.snapshot.reservations, key=lambda each: (each.start, each.id)):
        if reservation.end <= builder.now:
            continue
        builder.occupancy.release(f"reservation {reservation.id}")
        had = _its_own(builder, reservation)
        has = [device for device in had if builder.occupancy.device[device].up][: reservation.devices]
        for device in had:
            if device not in has and builder.occupancy.device[device].up:
                _hand_back(builder, device)
        if len(has) < reservation.devices:
            has += _call_back(builder, reservation, reservation.devices - len(has))
        if reservation.id in builder.reserved:
            if set(has) != {view.id for view in builder.snapshot.devices if view.reserved_by == reservation.id}:
                why = f"reservation {reservation.id} of {reservation.tenant} is in force"
                builder.reserve.append(AssignReservation(reservation.id, tuple(has), why))
            if not reservation.lend:
                _clear(builder, reservation)


def _its_own(builder: PlanBuilder, reservation: ReservationView) -> list[str]:
    """The devices marked as the reservation's, and those of its jobs; used ones first."""
    occupancy = builder.occupancy
    if reservation.id in builder.reserved:
        for job in builder.running:
            for device in job.on if job.reservation == reservation.id else ():
                if device in occupancy.device and occupancy.zone[device] == ORDINARY:
                    occupancy.zone[device] = unmarked(reservation.id)
    zones = (reservation.id, unmarked(reservation.id))
    its_jobs = {f"job {job.id}" for job in builder.running if job.reservation == reservation.id}
    own = [device for device, zone in occupancy.zone.items() if zone in zones]
    return sorted(own, key=lambda device: (occupancy.holder.get(device) not in its_jobs, occupancy.order[device]))


def _hand_back(builder: PlanBuilder, device: str) -> None:
    """Return a device that a reservation has beyond its number."""
    occupancy = builder.occupancy
    for pools in (occupancy.free, occupancy.coming):
        if pools[occupancy.zone[device]].discard(device):
            pools[ORDINARY].add(device)
    occupancy.zone[device] = ORDINARY


def _call_back(builder: PlanBuilder, reservation: ReservationView, owed: int) -> list[str]:
    """Reserve free devices for a reservation from a while before its start.

    Others are called back as late as is safe.
    """
    begins_in_s = reservation.start - builder.now
    rules = builder.rules
    work = f"reservation {reservation.id}"
    longest_s = max(
        (candidate.job.grace_s for candidate in builder.occupancy.candidates.values() if candidate.job is not None),
        default=0.0,
    )
    if begins_in_s > max(rules.ahead_s, longest_s + rules.margin_s):
        return []
    why = f"reservation {reservation.id} of {reservation.tenant} " + (
        "is in force" if begins_in_s <= 0 else f"begins in {begins_in_s:.0f} s"
    )
    may_preempt = preemptible_by_reservation(begins_in_s, rules)
    got: list[str] = []
    for count in (owed, *[1] * owed):  # all in one place, or else wherever there is one
        placement = place(
            builder.occupancy, PlacementRequest(work, count, reservation.kinds, spread=True, may_preempt=may_preempt)
        )
        if placement is not None:
            builder.give(placement, work, why)
            builder.promise(placement.devices, work)
            builder.occupancy.move(placement.devices, unmarked(reservation.id))
            got += placement.devices
        if len(got) >= owed or (placement is None and count == 1):
            break
    if begins_in_s <= 0 and len(got) < owed:
        missing = owed - len(got)
        builder.wait(work, f"{missing} of its {reservation.devices} devices: nobody that has such may be preempted")
    return got


def _clear(builder: PlanBuilder, reservation: ReservationView) -> None:
    """Preempt other work on devices that are not lent."""
    occupancy = builder.occupancy
    for candidate in list(occupancy.candidates.values()):
        if candidate.job is not None and candidate.job.reservation == reservation.id:
            continue
        if any(
            occupancy.zone.get(device) in (reservation.id, unmarked(reservation.id)) for device in candidate.devices
        ):
            builder.evict(candidate, f"reservation {reservation.id} of {reservation.tenant} is in force, and not lent")


def run_reserved_jobs(builder: PlanBuilder) -> None:
    """Start jobs on their tenants' reservations; lent devices are returned to them."""
    waiting: dict[str, list[JobView]] = defaultdict(list)
    for job in builder.snapshot.jobs:
        if job.phase is JobPhase.QUEUED and job.reservation in builder.reserved and job.not_before <= builder.now:
            waiting[job.reservation or ""].append(job)
    for name, jobs in sorted(waiting.items()):
        may_preempt = preemptible_by_reserved_job(name)
        for job in sorted(jobs, key=lambda each: queue_order(each, builder.now, builder.rules)):
            work = f"job {job.id}"
            why = f"on reservation {name}"
            request = PlacementRequest(
                work, max(job.devices, 1), job.kinds, spread=True, zones=(name, unmarked(name)), may_preempt=may_preempt
            )
            placement = place(builder.occupancy, request)
            if placement is None:
                builder.wait(work, f"{job.devices} devices of reservation {name}: others of its jobs have them")
            elif builder.give(placement, work, f"job {job.id} runs on reservation {name}, which had lent it"):
                builder.start_jobs.append(StartJob(job.id, placement.devices, why))
            else:
                builder.wait(work, f"devices of reservation {name} that are being given back")


def lendable(builder: PlanBuilder) -> tuple[str, ...]:
    """The zones that preemptible work may use: the ordinary one, and reservations that are lent."""
    return (ORDINARY, *(name for name, each in sorted(builder.reserved.items()) if each.lend))


def firm_room(builder: PlanBuilder) -> int:
    """The number of devices available to work that can't be preempted.

    Those up, less minimum replicas, and all that is reserved now or will be.
    """
    snapshot, occupancy = builder.snapshot, builder.occupancy
    ours = sum(occupancy.total.values())
    minimum = sum(model.min_replicas * model.devices for model in snapshot.models)
    reserved = sum(each.devices for each in snapshot.reservations if each.end > builder.now)
    return ours - minimum - reserved
