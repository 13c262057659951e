"""Preemption: who may be preempted by whom, and which of them."""

import pytest

from tests.tides.fleets import NOW, job
from tidemill.tides.preemption import (
    PreemptionCandidate,
    PreemptionTier,
    job_candidate,
    may_preempt,
    minimal_preemptions,
    preemptible_by_batches,
    preemptible_by_job,
    preemptible_by_model,
    preemptible_by_reservation,
    preemptible_by_reserved_job,
    replica_candidate,
)
from tidemill.tides.quota import QueueQuotas
from tidemill.tides.rules import RULES
from tidemill.tides.state import JobPhase, JobView, ModelView, Phase, QueueView, ReplicaView

LONG_AGO = NOW - 10 * RULES.min_run_s


def running(name: str, *, queue: str = "q", priority: int = 0, since: float = LONG_AGO, devices: int = 1) -> JobView:
    on = tuple(f"n0/{index}" for index in range(devices))
    return JobView(
        id=name, tenant="t", queue=queue, devices=devices, priority=priority, phase=JobPhase.RUNNING, on=on,
        started_at=since, submitted_at=since,
    )  # fmt: skip


def queues(*views: QueueView, jobs: tuple[JobView, ...] = ()) -> QueueQuotas:
    return QueueQuotas(views, jobs)


def replica(tier: int, *, model: str = "m", since: float = LONG_AGO) -> PreemptionCandidate:
    view = ReplicaView(id=f"{model}/0", model=model, devices=("n0/0",), phase=Phase.READY, since=since)
    return replica_candidate(view, tier, 0, 0.0)


def test_a_reservation_preempts_as_late_as_the_grace_time_allows() -> None:
    victim = job_candidate(running("a"), NOW, RULES)
    assert victim.job is not None
    last_moment = victim.job.grace_s + RULES.margin_s
    assert preemptible_by_reservation(last_moment, RULES)(victim)
    assert not preemptible_by_reservation(last_moment + 1, RULES)(victim)


def test_a_reserved_job_preempts_all_but_its_own() -> None:
    own = PreemptionCandidate("job a", ("n0/0",), PreemptionTier.JOB, 0, 0.0, job=job("a", 1, reservation="r"))
    other = PreemptionCandidate("job b", ("n0/0",), PreemptionTier.JOB, 0, 0.0, job=job("b", 1))
    allowed = preemptible_by_reserved_job("r")
    assert [allowed(each) for each in (own, other, replica(PreemptionTier.LENT))] == [False, True, True]


@pytest.mark.parametrize(
    ("tier", "model", "below_minimum", "allowed"),
    [
        (PreemptionTier.LENT, "m", False, True),
        (PreemptionTier.NEEDED_BATCH, "m", False, True),
        (PreemptionTier.SURPLUS, "m", True, False),
        (PreemptionTier.SURPLUS, "other", False, True),
        (PreemptionTier.ABOVE_MINIMUM, "other", False, False),
        (PreemptionTier.ABOVE_MINIMUM, "other", True, True),
    ],
)
def test_a_model_preempts_other_models(tier: int, model: str, below_minimum: bool, allowed: bool) -> None:
    rule = preemptible_by_model(ModelView(name="m"), below_minimum=below_minimum)
    assert rule(replica(tier, model=model)) is allowed


def test_batches_preempt_jobs_that_borrow_and_have_run_for_a_while() -> None:
    borrows, fresh, owns = running("a"), running("b", since=NOW), running("c", queue="own")
    rule = preemptible_by_batches(queues(QueueView(name="own", quota=1), jobs=(borrows, fresh, owns)), NOW, RULES)
    assert [rule(job_candidate(each, NOW, RULES)) for each in (borrows, fresh, owns)] == [True, False, False]
    assert rule(replica(PreemptionTier.LENT)) and not rule(replica(PreemptionTier.SURPLUS))


def test_a_job_preempts_replicas_that_have_been_lent_for_a_while() -> None:
    rule = preemptible_by_job(job("a", 1), queues(), NOW, RULES)
    assert rule(replica(PreemptionTier.LENT))
    assert not rule(replica(PreemptionTier.LENT, since=NOW))
    assert not rule(replica(PreemptionTier.SURPLUS))


def test_a_quota_is_reclaimed_from_who_borrows_and_at_once() -> None:
    victim = running("v", queue="borrower", since=NOW)
    shares = queues(QueueView(name="owner", quota=2), jobs=(victim,))
    assert may_preempt(job("a", 2, queue="owner"), victim, shares, NOW, RULES)
    assert not may_preempt(job("a", 3, queue="owner"), victim, shares, NOW, RULES), "beyond its quota it only borrows"
    assert not may_preempt(job("a", 2, queue="owner"), running("v", queue="owner"), shares, NOW, RULES)


def test_never_a_job_that_is_not_preemptible_or_is_on_a_reservation() -> None:
    for victim in (job("v", 1, ["n0/0"], preemptible=False), job("v", 1, ["n0/0"], reservation="r")):
        shares = queues(QueueView(name="owner", quota=9), jobs=(victim,))
        assert not may_preempt(job("a", 1, queue="owner"), victim, shares, NOW, RULES)


def test_the_fewest_that_lose_least_are_preempted() -> None:
    def candidate(name: str, devices: int, loss_s: float, tier: int = PreemptionTier.JOB) -> PreemptionCandidate:
        return PreemptionCandidate(name, tuple(f"{name}/{index}" for index in range(devices)), tier, 0, loss_s)

    small, cheap, large = candidate("small", 1, 5.0), candidate("cheap", 1, 1.0), candidate("large", 4, 8.0)
    gains = [(each, len(each.devices)) for each in (small, cheap, large)]
    assert minimal_preemptions(gains, 0) == []
    assert minimal_preemptions(gains, 1) == [cheap]
    assert minimal_preemptions(gains, 2) == [large], "cheap is not needed beside it"
    assert minimal_preemptions(gains, 7) is None
    lent = candidate("lent", 1, 100.0, PreemptionTier.LENT)
    assert minimal_preemptions([*gains, (lent, 1)], 1) == [lent], "the lowest tier first, whatever it loses"
