"""Preemption: what may be preempted for what, and in which order.

Everything that takes devices from somebody else goes through this file. Each kind of claimant has a rule below, from
the most to the least important: reservations, jobs on a reservation, replicas for people, replicas for the deadlines
of batches, jobs. What may be preempted is a `PreemptionCandidate`; of several, `minimal_preemptions` chooses those
that lose least, and no more than are needed. Where they have to be is a matter of `tides.placement`.

The terms are those of Kueue (kueue.sigs.k8s.io, Preemption).
"""

from collections.abc import Callable, Sequence

import msgspec

from tidemill.tides.quota import QueueQuotas, behind, is_urgent
from tidemill.tides.rules import Rules
from tidemill.tides.state import JobView, ModelView, ReplicaView

DRAIN_S = 30.0
"""What a replica is taken to need to drain."""


class PreemptionTier:
    """The order of preemption. Within a tier, lower priority and less loss go first."""

    LENT = 0
    """Replicas lent to batches that will be done in time without them."""
    SURPLUS = 1
    """Replicas that their model does not need now."""
    JOB = 2
    NEEDED_BATCH = 3
    """Replicas that batches need for their deadlines."""
    URGENT_JOB = 4
    """Jobs whose deadline is urgent."""
    ABOVE_MINIMUM = 5
    """Replicas that their model needs, beyond its minimum."""


class PreemptionCandidate(msgspec.Struct, frozen=True, gc=False):
    """A job or a replica that can be preempted as a whole."""

    name: str
    """`job ID`, `replica ID`."""
    devices: tuple[str, ...]
    tier: int
    priority: int
    loss_s: float
    """Device-seconds of work that are lost or idle if it is preempted."""
    job: JobView | None = None
    replica: ReplicaView | None = None

    @property
    def rank(self) -> tuple[int, int, float, str]:
        """The sort key of preemption; the lowest goes first."""
        return (self.tier, self.priority, self.loss_s / len(self.devices), self.name)


PreemptionRule = Callable[[PreemptionCandidate], bool]
"""True if a candidate may be preempted by the claimant that the rule was made for."""


def job_candidate(job: JobView, now: float, rules: Rules) -> PreemptionCandidate:
    """A running job, as a candidate."""
    tier = PreemptionTier.URGENT_JOB if is_urgent(job, now, rules) else PreemptionTier.JOB
    lost_s = job.unsaved_s + rules.restart_s
    return PreemptionCandidate(f"job {job.id}", job.on, tier, job.priority, lost_s * len(job.on), job=job)


def replica_candidate(replica: ReplicaView, tier: int, priority: int, loss_s: float) -> PreemptionCandidate:
    """A replica, as a candidate of that tier."""
    return PreemptionCandidate(f"replica {replica.id}", replica.devices, tier, priority, loss_s, replica=replica)


# Who may preempt whom


def preemptible_by_reservation(begins_in_s: float, rules: Rules) -> PreemptionRule:
    """A rule that allows all candidates, each as late as its grace time allows."""

    def may_preempt(candidate: PreemptionCandidate) -> bool:
        needs_s = candidate.job.grace_s if candidate.job is not None else DRAIN_S
        return begins_in_s <= needs_s + rules.margin_s

    return may_preempt


def preemptible_by_reserved_job(reservation: str) -> PreemptionRule:
    """A rule that allows all work on lent devices of the reservation, except its own jobs."""

    def may_preempt(candidate: PreemptionCandidate) -> bool:
        return candidate.job is None or candidate.job.reservation != reservation

    return may_preempt


def preemptible_by_model(model: ModelView, *, below_minimum: bool) -> PreemptionRule:
    """A rule that allows jobs and other models' replicas; those above a minimum only for a minimum.

    Of its own replicas those that are lent to batches.
    """

    def may_preempt(candidate: PreemptionCandidate) -> bool:
        if candidate.replica is not None and candidate.replica.model == model.name:
            return candidate.tier in (PreemptionTier.LENT, PreemptionTier.NEEDED_BATCH)
        return candidate.tier != PreemptionTier.ABOVE_MINIMUM or below_minimum

    return may_preempt


def preemptible_by_batches(queues: QueueQuotas, now: float, rules: Rules) -> PreemptionRule:
    """A rule for batches that would miss their deadline.

    Replicas that are lent to others, and jobs that borrow, are not urgent and have run for `Rules.min_run_s`.
    """

    def may_preempt(candidate: PreemptionCandidate) -> bool:
        if candidate.job is None:
            return candidate.tier == PreemptionTier.LENT
        settled = now - candidate.job.started_at >= rules.min_run_s
        return candidate.tier == PreemptionTier.JOB and settled and queues[candidate.job.queue].borrowing

    return may_preempt


def preemptible_by_job(job: JobView, queues: QueueQuotas, now: float, rules: Rules) -> PreemptionRule:
    """A rule that allows jobs by `may_preempt`, and replicas that are lent for a while.

    They are lent to batches for `Rules.min_fill_s` or longer.
    """

    def may_preempt_candidate(candidate: PreemptionCandidate) -> bool:
        if candidate.job is not None:
            return may_preempt(job, candidate.job, queues, now, rules)
        if candidate.tier != PreemptionTier.LENT or candidate.replica is None:
            return False
        return now - candidate.replica.since >= rules.min_fill_s

    return may_preempt_candidate


def may_preempt(job: JobView, victim: JobView, queues: QueueQuotas, now: float, rules: Rules) -> bool:
    """True if a waiting job may preempt a running one.

    A quota is reclaimed at once, but from a job that would soon be done and whose deadline is urgent: that is waited
    for as long as any job that has just begun.
    """
    if not victim.preemptible or victim.reservation is not None:
        return False
    held = len(victim.on) or victim.devices
    own, theirs = queues[job.queue], queues[victim.queue]
    settled = now - victim.started_at >= rules.min_run_s
    after = behind(victim, job, rules)
    overtook = after and victim.started_at >= job.submitted_at
    urgent = is_urgent(job, now, rules)
    if victim.queue == job.queue:
        if is_urgent(victim, now, rules) or not settled:
            return False
        return (after and victim.priority < job.priority) or overtook or (urgent and victim.priority <= job.priority)
    if not theirs.borrowing:
        return False
    if own.owns(job.devices):
        nearly = victim.remaining_s is not None and victim.remaining_s <= rules.min_run_s
        return not (nearly and is_urgent(victim, now, rules)) or urgent
    if is_urgent(victim, now, rules) or not settled:
        return False
    if urgent or (overtook and own.weight_used() < theirs.weight_used()):
        return True
    return theirs.weight_used(-held) >= own.weight_used(job.devices)


# Which of them


def minimal_preemptions(
    gains: Sequence[tuple[PreemptionCandidate, int]], need: int
) -> list[PreemptionCandidate] | None:
    """Candidates that free `need` devices together and lose little; None when all of them are not enough.

    `gains`: how many usable devices each would free. Taken are the first in rank until it is enough, less those that
    turn out not to be needed, or the best single one.
    """
    if need <= 0:
        return []
    ordered = sorted(gains, key=lambda each: each[0].rank)
    chosen: list[tuple[PreemptionCandidate, int]] = []
    freed = 0
    for candidate, gain in ordered:
        chosen.append((candidate, gain))
        freed += gain
        if freed >= need:
            break
    if freed < need:
        return None
    for candidate, gain in reversed(chosen[:]):
        if freed - gain >= need:
            chosen.remove((candidate, gain))
            freed -= gain
    several = [candidate for candidate, _ in chosen]
    single = min(
        ((candidate, gain) for candidate, gain in ordered if gain >= need),
        key=lambda each: (preemption_cost([each[0]], need), each[0].name),
        default=None,
    )
    if single is not None and preemption_cost([single[0]], need) < preemption_cost(several, need):
        return [single[0]]
    return several


def preemption_cost(candidates: Sequence[PreemptionCandidate], need: int) -> tuple[int, float, int]:
    """The cost of preempting these: the highest tier, the work lost, and devices freed beyond the need."""
    if not candidates:
        return (-1, 0.0, 0)
    return (
        max(candidate.tier for candidate in candidates),
        sum(candidate.loss_s for candidate in candidates),
        sum(len(candidate.devices) for candidate in candidates) - need,
    )
