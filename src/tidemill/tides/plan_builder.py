"""Builds a plan step by step."""

from collections.abc import Sequence

from tidemill.tides.occupancy import Occupancy
from tidemill.tides.placement import Placement
from tidemill.tides.preemption import PreemptionCandidate
from tidemill.tides.quota import QueueQuotas
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
    """The decisions so far, and the occupancy that they are based on."""

    def __init__(self, snapshot: FleetSnapshot, rules: Rules) -> None:
        self.snapshot = snapshot
        self.now = snapshot.now
        self.rules = rules
        self.occupancy = Occupancy(snapshot, rules.soon_s)
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
        self.lend_replicas: dict[str, LendReplica] = {}
        self.reserve: list[AssignReservation] = []
        self.waiting: list[WaitNote] = []
        self.searches = 0

    def on_reservation(self, job: JobView) -> bool:
        """True if a job runs on a reservation that is in force."""
        return job.reservation is not None and job.reservation in self.reserved

    def give(self, placement: Placement, work: str, why: str) -> bool:
        """Preempt the work that a placement needs to preempt.

        True when it can start now; else its devices are promised.
        """
        for candidate in placement.victims:
            self._tell(candidate, why)
        if not placement.ready:
            self.promise(placement.devices, work)
        return placement.ready

    def promise(self, devices: Sequence[str], work: str) -> None:
        for device in devices:
            self.occupancy.promised[device] = work

    def evict(self, candidate: PreemptionCandidate, why: str) -> None:
        """Preempt a job, or stop a replica."""
        self.occupancy.vacate(candidate.name, candidate.devices)
        self._tell(candidate, why)

    def _tell(self, candidate: PreemptionCandidate, why: str) -> None:
        if candidate.job is not None:
            self.preempt_jobs.append(PreemptJob(candidate.job.id, why))
            if not self.on_reservation(candidate.job):
                self.queues.remove(candidate.job, len(candidate.job.on))
        if candidate.replica is not None:
            self.lend_replicas.pop(candidate.replica.id, None)
            self.stop_replicas.append(StopReplica(candidate.replica.id, why))

    def wait(self, work: str, why: str) -> None:
        self.waiting.append(WaitNote(work, why))
