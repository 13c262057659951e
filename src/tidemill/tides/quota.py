"""The order of jobs: queues with quota, borrowing and reclaim.

The terms and the order are those of Kueue (kueue.sigs.k8s.io): a queue may borrow beyond its quota, who is within its
quota reclaims from borrowers, and borrowers share by weight. The rule for gangs is EASY backfill (Lifka, "The ANL/IBM
SP scheduling system", 1995) where preemption can't help: the first in the queue has its devices kept together, and
later ones may use them only if they end before they are needed, or may be preempted then.
"""

import math
from collections.abc import Iterable

import msgspec

from tidemill.tides.rules import Rules
from tidemill.tides.state import JobPhase, JobView, QueueView


class QueueUse(msgspec.Struct):
    """A queue, and the devices that its jobs use."""

    view: QueueView
    used: int = 0
    firm: int = 0
    """Of these, by jobs that can't be preempted."""

    @property
    def limit(self) -> float:
        return math.inf if self.view.borrow is None else self.view.quota + self.view.borrow

    def owns(self, more: int) -> bool:
        """True if the queue stays within its quota with so many more devices."""
        return self.used + more <= self.view.quota

    @property
    def borrowing(self) -> bool:
        return self.used > self.view.quota

    def weight_used(self, more: int = 0) -> float:
        """Borrowed devices relative to the weight, with so many more or fewer devices."""
        return max(self.used + more - self.view.quota, 0) / max(self.view.weight, 1e-9)


class QueueQuotas:
    """All queues; an undeclared one has no quota and borrows."""

    def __init__(self, views: Iterable[QueueView], running: Iterable[JobView]) -> None:
        self.by_name = {view.name: QueueUse(view) for view in views}
        for job in running:
            if job.phase is JobPhase.RUNNING:
                self.add(job, len(job.on))

    def __getitem__(self, name: str) -> QueueUse:
        share = self.by_name.get(name)
        if share is None:
            share = self.by_name[name] = QueueUse(QueueView(name=name))
        return share

    def add(self, job: JobView, devices: int) -> None:
        share = self[job.queue]
        share.used += devices
        if not job.preemptible:
            share.firm += devices

    def remove(self, job: JobView, devices: int) -> None:
        self.add(job, -devices)

    @property
    def quota(self) -> int:
        """The quota of all queues together."""
        return sum(share.view.quota for share in self.by_name.values())

    @property
    def firm(self) -> int:
        """Number of devices of jobs that can't be preempted."""
        return sum(share.firm for share in self.by_name.values())

    @property
    def firm_borrowed(self) -> int:
        """Number of borrowed devices that can't be reclaimed."""
        return sum(max(share.firm - share.view.quota, 0) for share in self.by_name.values())


def laxity_s(job: JobView, now: float) -> float | None:
    """Seconds that a job can wait and still meet its deadline; None without a deadline."""
    return None if job.deadline is None else job.deadline - now - (job.remaining_s or 0.0)


def is_urgent(job: JobView, now: float, rules: Rules) -> bool:
    """True if a job's deadline is near enough to go before others, and can still be met."""
    laxity = laxity_s(job, now)
    if laxity is None:
        return False
    left = job.remaining_s or 0.0
    if job.remaining_s is not None and job.phase is JobPhase.RUNNING:
        # What was left when it began: else it would be urgent no longer once it has run for a while, and be
        # preempted until it is urgent again.
        left += max(now - job.started_at, 0.0)
    return -rules.hopeless_share * left - rules.margin_s <= laxity < rules.urgent_s + rules.urgent_share * left


def priority_order(job: JobView, rules: Rules) -> tuple[float, str]:
    """The sort key by priority and age: one level of priority is worth `ageing_s` of waiting.

    It doesn't change while time passes, so that no two jobs ever take devices from each other in turns.
    """
    return (job.submitted_at - job.priority * rules.ageing_s, job.id)


def queue_order(job: JobView, now: float, rules: Rules) -> tuple[bool, float, float, str]:
    """The sort key of jobs in one queue: urgent ones by their slack, then the others."""
    urgent = is_urgent(job, now, rules)
    return (not urgent, (laxity_s(job, now) or 0.0) if urgent else 0.0, *priority_order(job, rules))


def behind(job: JobView, other: JobView, rules: Rules) -> bool:
    """True if a job comes after another by priority and age."""
    return priority_order(job, rules) > priority_order(other, rules)
