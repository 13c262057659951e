"""The plan: what must hold of every plan, whatever the fleet and the work are."""

import random
from collections.abc import Sequence

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.tides.fleets import NOW, actions, carried_out, check, devices, fleets, job, model, settled, snapshot
from tidemill.tides.plan import plan
from tidemill.tides.rules import Rules
from tidemill.tides.state import BacklogView, FleetSnapshot, JobView, QueueView

KINDS = ("h100", "h20")
LEND = Rules(lend_replicas=True)


@given(fleets(KINDS), st.booleans())
@examples(1.5)
def test_every_plan_can_be_carried_out(before: FleetSnapshot, lend: bool) -> None:
    check(before, plan(before, Rules(lend_replicas=lend)))


@given(fleets(), st.booleans())
@examples(1.5)
def test_a_plan_that_was_carried_out_asks_for_nothing_more(before: FleetSnapshot, lend: bool) -> None:
    rules = Rules(lend_replicas=lend)
    first = plan(before, rules)
    if first.reserve:  # devices that have become a reservation's can be lent from then on
        before = carried_out(before, first)
        first = plan(before, rules)
        assert not first.reserve
    back = {lent.replica for lent in first.lend_replicas if not lent.batch_only}
    models = {each.model for each in before.replicas if each.id in back}
    assume(not any(each.waiting and each.name in models for each in before.models))  # they are on it by the next plan
    after = carried_out(before, first)
    again = plan(after, rules)
    check(after, again)
    assert actions(again) == []


@given(fleets(KINDS))
def test_the_same_snapshot_gives_the_same_plan(before: FleetSnapshot) -> None:
    copied = msgspec.json.decode(msgspec.json.encode(before), type=FleetSnapshot)
    assert plan(before) == plan(copied)


@given(fleets(KINDS), st.booleans())
def test_plans_come_to_rest(before: FleetSnapshot, lend: bool) -> None:
    """With nothing new to do, a fleet doesn't go on exchanging one piece of work for another."""
    rules = Rules(lend_replicas=lend)
    now = msgspec.structs.replace(
        before, jobs=tuple(msgspec.structs.replace(each, remaining_s=None, deadline=None) for each in before.jobs)
    )
    for _ in range(12):
        decided = plan(now, rules)
        check(now, decided)
        now = settled(carried_out(now, decided), 60)
        now = msgspec.structs.replace(now, models=tuple(msgspec.structs.replace(m, waiting=0) for m in now.models))
    assert actions(plan(now, rules)) == []


def test_a_large_fleet() -> None:
    """A thousand devices, a thousand jobs, thirty models: all rules hold there, too."""
    chance = random.Random(1)
    views = devices(*[8] * 125)
    ids = [view.id for view in views]
    jobs: list[JobView] = []
    at = 0
    while at < 900:
        size = chance.choice([1, 2, 4, 8, 8])
        jobs.append(_some_job(chance, len(jobs), ids[at : at + size]))
        at += size
    jobs += [_some_job(chance, len(jobs) + number, ()) for number in range(1000)]
    before = snapshot(
        views,
        models=[model(f"m{n}", chance.uniform(0, 20_000), devices=chance.choice([1, 2, 4, 8])) for n in range(30)],
        jobs=jobs,
        queues=[QueueView(name=f"q{n}", quota=chance.choice([0, 8, 32])) for n in range(40)],
        backlogs=[BacklogView(model="m1", parts=((1e9, NOW + 86_400),))],
    )
    decided = plan(before)
    check(before, decided)
    assert decided.start_replicas and decided.preempt_jobs
    after = carried_out(before, decided)
    assert actions(plan(after)) == []


def _some_job(chance: random.Random, number: int, on: Sequence[str]) -> JobView:
    return job(
        f"j{number}",
        len(on) or chance.choice([1, 1, 2, 4, 8, 16, 64]),
        on,
        queue=f"q{chance.randrange(40)}",
        preemptible=chance.random() < 0.8,
        gang=chance.random() < 0.8,
        submitted_at=NOW - chance.uniform(0, 1e5),
        remaining_s=chance.choice([None, chance.uniform(100, 1e5)]),
        deadline=chance.choice([None, None, NOW + chance.uniform(0, 1e5)]),
        priority=chance.choice([0, 0, 1, 2]),
    )
