"""A plan in the making."""

from collections.abc import Sequence

from tidemill.tides.occupancy import Occupancy, PreemptionCandidate, PreemptionTier
from tidemill.tides.placement import Placement
from tidemill.tides.quota import QueueQuotas, presses
from tidemill.tides.rules import Rules
from tidemill.tides.state import (
    AssignReservation,
    FleetSnapshot,
    JobPhase,
    JobView,
    LendReplica,
    PreemptJob,
    StartJob,
    StartReplica,
    StopReplica,
    WaitNote,
)


class PlanBuilder:
    """What has been decided so far, and the board that it was decided on."""

    def __init__(self, snapshot: FleetSnapshot, rules: Rules) -> None:
        self.snapshot = snapshot
        self.now = snapshot.now
        self.rules = rules
        self.board = Occupancy(snapshot, rules.soon_s)
        self.running = [job for job in snapshot.jobs if job.phase is not JobPhase.QUEUED]
        self.begun: list[JobView] = []
        """Jobs that this plan starts, as they will be then."""
        self.reserved = {each.id: each for each in snapshot.reservations if each.start <= snapshot.now < each.end}
        """Reservations in force."""
        self.queues = QueueQuotas(snapshot.queues, (job for job in self.running if not self.on_reservation(job)))
        self.start_replicas: list[StartReplica] = []
        self.stop_replicas: list[StopReplica] = []
        self.start_jobs: list[StartJob] = []
        self.preempt_jobs: list[PreemptJob] = []
        self.turn_replicas: dict[str, LendReplica] = {}
        self.reserve: list[AssignReservation] = []
        self.waiting: list[WaitNote] = []
        self.searches = 0

    def on_reservation(self, job: JobView) -> bool:
        """It runs on what its tenant has reserved, and that is in force."""
        return job.reservation is not None and job.reservation in self.reserved

    def unit_of(self, job: JobView) -> PreemptionCandidate:
        """A running job, as somebody who may have to give way."""
        pressing = presses(job, self.now, self.rules)
        lost = job.unsaved_s + self.rules.restart_s
        return PreemptionCandidate(
            f"job {job.id}",
            job.on,
            PreemptionTier.URGENT_JOB if pressing else PreemptionTier.JOB,
            job.priority,
            lost * len(job.on),
            job=job,
        )

    def give(self, grant: Placement, work: str, why: str) -> bool:
        """Make those go that give way to a claim. True when it can start now; else its devices are promised."""
        for unit in grant.victims:
            self._tell(unit, why)
        if not grant.ready:
            self.promise(grant.devices, work)
        return grant.ready

    def promise(self, devices: Sequence[str], work: str) -> None:
        for device in devices:
            self.board.promised[device] = work

    def evict(self, unit: PreemptionCandidate, why: str) -> None:
        """Make a job or a replica go."""
        self.board.vacate(unit.name, unit.devices)
        self._tell(unit, why)

    def _tell(self, unit: PreemptionCandidate, why: str) -> None:
        if unit.job is not None:
            self.preempt_jobs.append(PreemptJob(unit.job.id, why))
            if not self.on_reservation(unit.job):
                self.queues.remove(unit.job, len(unit.job.on))
        if unit.replica is not None:
            self.turn_replicas.pop(unit.replica.id, None)
            self.stop_replicas.append(StopReplica(unit.replica.id, why))

    def wait(self, work: str, why: str) -> None:
        self.waiting.append(WaitNote(work, why))
