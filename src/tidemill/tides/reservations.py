"""Reservations: devices that a tenant rents are there when they begin, and its alone unless it lends them."""

from collections import defaultdict

from tidemill.tides.occupancy import ORDINARY, PreemptionCandidate
from tidemill.tides.placement import PlacementRequest, place
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.quota import turn
from tidemill.tides.state import AssignReservation, JobPhase, JobView, ReservationView, StartJob

DRAIN_S = 30.0
"""What a replica is taken to need to drain."""


def unmarked(reservation: str) -> str:
    """The zone of devices that will be a reservation's, but are not marked yet: they are not lent."""
    return f"{reservation} unmarked"


def keep_reservations(draft: PlanBuilder) -> None:
    """Set aside what reservations in force, and those that begin soon, are owed; make others give it back in time."""
    for reservation in sorted(draft.snapshot.reservations, key=lambda each: (each.start, each.id)):
        if reservation.end <= draft.now:
            continue
        draft.board.release(f"reservation {reservation.id}")
        had = _its_own(draft, reservation)
        has = [device for device in had if draft.board.device[device].up][: reservation.devices]
        for device in had:
            if device not in has and draft.board.device[device].up:
                _hand_back(draft, device)
        if len(has) < reservation.devices:
            has += _call_back(draft, reservation, reservation.devices - len(has))
        if reservation.id in draft.reserved:
            if set(has) != {view.id for view in draft.snapshot.devices if view.reserved_by == reservation.id}:
                why = f"reservation {reservation.id} of {reservation.tenant} is in force"
                draft.reserve.append(AssignReservation(reservation.id, tuple(has), why))
            if not reservation.lend:
                _clear(draft, reservation)


def _its_own(draft: PlanBuilder, reservation: ReservationView) -> list[str]:
    """The devices that are marked as its own, and those that its jobs are on; used ones first."""
    board = draft.board
    if reservation.id in draft.reserved:
        for job in draft.running:
            for device in job.on if job.reservation == reservation.id else ():
                if device in board.device and board.zone[device] == ORDINARY:
                    board.zone[device] = unmarked(reservation.id)
    zones = (reservation.id, unmarked(reservation.id))
    its_jobs = {f"job {job.id}" for job in draft.running if job.reservation == reservation.id}
    own = [device for device, zone in board.zone.items() if zone in zones]
    return sorted(own, key=lambda device: (board.holder.get(device) not in its_jobs, board.order[device]))


def _hand_back(draft: PlanBuilder, device: str) -> None:
    """It has more than it is owed."""
    board = draft.board
    for pools in (board.free, board.coming):
        if pools[board.zone[device]].discard(device):
            pools[ORDINARY].add(device)
    board.zone[device] = ORDINARY


def _call_back(draft: PlanBuilder, reservation: ReservationView, owed: int) -> list[str]:
    """Free devices are kept for it from a while before its start; others are called back as late as is safe."""
    begins_in_s = reservation.start - draft.now
    rules = draft.rules
    work = f"reservation {reservation.id}"

    def may(unit: PreemptionCandidate) -> bool:
        needs_s = unit.job.grace_s if unit.job is not None else DRAIN_S
        return begins_in_s <= needs_s + rules.margin_s

    longest_s = max((unit.job.grace_s for unit in draft.board.units.values() if unit.job is not None), default=0.0)
    if begins_in_s > max(rules.ahead_s, longest_s + rules.margin_s):
        return []
    why = f"reservation {reservation.id} of {reservation.tenant} " + (
        "is in force" if begins_in_s <= 0 else f"begins in {begins_in_s:.0f} s"
    )
    got: list[str] = []
    for count in (owed, *[1] * owed):  # all in one place, or else wherever there is one
        grant = place(draft.board, PlacementRequest(work, count, reservation.kinds, spread=True, may=may))
        if grant is not None:
            draft.give(grant, work, why)
            draft.promise(grant.devices, work)
            draft.board.move(grant.devices, unmarked(reservation.id))
            got += grant.devices
        if len(got) >= owed or (grant is None and count == 1):
            break
    if begins_in_s <= 0 and len(got) < owed:
        missing = owed - len(got)
        draft.wait(
            work, f"{missing} of its {reservation.devices} devices: nobody that has such may be made to give way"
        )
    return got


def _clear(draft: PlanBuilder, reservation: ReservationView) -> None:
    """Nobody else stays on devices that are not lent."""
    board = draft.board
    for unit in list(board.units.values()):
        if unit.job is not None and unit.job.reservation == reservation.id:
            continue
        if any(board.zone.get(device) in (reservation.id, unmarked(reservation.id)) for device in unit.devices):
            draft.evict(unit, f"reservation {reservation.id} of {reservation.tenant} is in force, and not lent")


def run_reserved_jobs(draft: PlanBuilder) -> None:
    """Jobs that run on what their tenants have reserved; what is lent is given back to them."""
    waiting: dict[str, list[JobView]] = defaultdict(list)
    for job in draft.snapshot.jobs:
        if job.phase is JobPhase.QUEUED and job.reservation in draft.reserved and job.not_before <= draft.now:
            waiting[job.reservation or ""].append(job)
    for name, jobs in sorted(waiting.items()):

        def lent(unit: PreemptionCandidate, name: str = name) -> bool:
            return unit.job is None or unit.job.reservation != name

        for job in sorted(jobs, key=lambda each: turn(each, draft.now, draft.rules)):
            work = f"job {job.id}"
            why = f"on reservation {name}"
            claim = PlacementRequest(
                work, max(job.devices, 1), job.kinds, spread=True, zones=(name, unmarked(name)), may=lent
            )
            grant = place(draft.board, claim)
            if grant is None:
                draft.wait(work, f"{job.devices} devices of reservation {name}: others of its jobs have them")
            elif draft.give(grant, work, f"job {job.id} runs on reservation {name}, which had lent it"):
                draft.start_jobs.append(StartJob(job.id, grant.devices, why))
            else:
                draft.wait(work, f"devices of reservation {name} that are being given back")


def lendable(draft: PlanBuilder) -> tuple[str, ...]:
    """The zones that preemptible work may use."""
    return (ORDINARY, *(name for name, each in sorted(draft.reserved.items()) if each.lend))


def firm_room(draft: PlanBuilder) -> int:
    """Devices that work which can't be preempted may have: those up, less minimum replicas, and all that is reserved
    now or will be."""
    snapshot, board = draft.snapshot, draft.board
    ours = sum(board.total.values())
    minimum = sum(model.min_replicas * model.devices for model in snapshot.models)
    reserved = sum(each.devices for each in snapshot.reservations if each.end > draft.now)
    return ours - minimum - reserved
