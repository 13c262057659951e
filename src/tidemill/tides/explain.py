"""Explains in words what each device does, until when and why."""

from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.serving import Serving
from tidemill.tides.sleepers import Sleepers
from tidemill.tides.state import DeviceNote, JobPhase, JobView, Phase, ReplicaView

_PHASES = {
    Phase.STARTING: "is being started",
    Phase.WARMING: "loads its weights",
    Phase.DRAINING: "ends what it works on, then gives the device back",
    Phase.GONE: "has ended",
}


def explain(builder: PlanBuilder, serving: Serving, sleepers: Sleepers) -> tuple[DeviceNote, ...]:
    """One note for each device, in the snapshot's order."""
    occupancy = builder.occupancy
    replicas = {replica.id: replica for replica in builder.snapshot.replicas}
    jobs = {job.id: job for job in builder.snapshot.jobs}
    going = {f"replica {each.replica}": each.why for each in builder.stop_replicas}
    dozing = {each.replica for each in builder.stop_replicas if each.sleep}
    going |= {f"job {each.job}": each.why for each in builder.preempt_jobs}
    lending = {f"replica {each.replica}": each.why for each in builder.lend_replicas.values()}
    coming: dict[str, str] = {}
    for start in builder.start_replicas:
        what = f"a replica of {start.model} starts on it" if start.wake is None else f"{start.wake} wakes on it"
        coming |= dict.fromkeys(start.devices, f"{what}: {start.why}")
    for begin in builder.start_jobs:
        coming |= dict.fromkeys(begin.devices, f"job {begin.job} starts on it: {begin.why}")
    notes = []
    for view in builder.snapshot.devices:
        holder = occupancy.holder.get(view.id)
        if not view.up:
            was = f"; {holder} was on it" if holder else ""
            notes.append(DeviceNote(view.id, "lost", None, f"its node is lost, or it was taken out{was}"))
            continue
        if holder is None:
            asleep = ", ".join(sleepers.at(view.id))
            why = _free(builder, view.id, coming) + (f"; {asleep} sleeps there" if asleep else "")
            notes.append(DeviceNote(view.id, "free", None, why))
            continue
        kind, _, name = holder.partition(" ")
        until: float | None = None
        if kind == "job":
            until, why = _job(builder, jobs[name])
        else:
            why = _replica(builder, serving, replicas[name])
        if holder in going:
            why = f"{'goes to sleep' if name in dozing else 'is preempted'}: {going[holder]}"
            until = builder.now + jobs[name].grace_s if kind == "job" else None
        elif holder in lending:
            why = lending[holder]
        if view.id in occupancy.promised:
            why += f"; then for {occupancy.promised[view.id]}"
        notes.append(DeviceNote(view.id, holder, until, why))
    return tuple(notes)


def _free(builder: PlanBuilder, device: str, coming: dict[str, str]) -> str:
    if device in coming:
        return coming[device]
    if device in builder.occupancy.promised:
        return f"kept for {builder.occupancy.promised[device]} until all that it needs is there"
    zone = builder.occupancy.zone[device]
    if zone:
        return f"belongs to reservation {zone}, which does not use it"
    return "no work wants it"


def _job(builder: PlanBuilder, job: JobView) -> tuple[float | None, str]:
    if job.phase is JobPhase.STOPPING:
        return (
            builder.now + job.grace_s,
            f"job {job.id} of {job.tenant} writes its checkpoint, then gives the device back",
        )
    until = None if job.remaining_s is None else builder.now + job.remaining_s
    ran = f"runs since {builder.now - job.started_at:,.0f} s"
    if builder.on_reservation(job):
        return until, f"job {job.id} of {job.tenant} {ran} on reservation {job.reservation}"
    share = builder.queues[job.queue]
    state = "borrows" if share.borrowing else "is within its quota"
    firm = "" if job.preemptible else ", can't be preempted"
    return until, (
        f"job {job.id} of {job.tenant} {ran}; queue {job.queue} {state} ({share.used} of {share.view.quota}){firm}"
    )


def _replica(builder: PlanBuilder, serving: Serving, replica: ReplicaView) -> str:
    if replica.phase is not Phase.READY:
        return f"replica of {replica.model} {_PHASES[replica.phase]}"
    if replica.batch_only:
        return f"works on batches of {replica.model}: {replica.filler} lines"
    need = serving.needs.get(replica.model)
    if need is None:
        return f"{replica.model} is no longer served"
    have = len(serving.interactive[replica.model])
    filler = f", {replica.filler} lines of batches beside" if replica.filler else ""
    return (
        f"serves {replica.model}: {replica.in_flight} requests{filler}; {need.count} replicas needed of {have}: "
        f"{need.why}"
    )
