"""How many filler requests a replica may have."""

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tidemill.tides.slack import ReplicaLoad, StepFit, StepTime, adapted, filler_slots
from tidemill.tides.state import Objective

OBJECTIVE = Objective(2.0, 0.05, 0.95)
STEPS = StepTime(0.01, 6e-5, 1e-4, 2e-8)


def loads() -> st.SearchStrategy[ReplicaLoad]:
    return st.builds(
        ReplicaLoad,
        interactive=st.integers(0, 80),
        filler=st.integers(0, 80),
        queued=st.sampled_from([0, 0, 0, 1, 20]),
        slots=st.one_of(st.none(), st.integers(1, 256)),
        arrivals=st.floats(0, 50),
        ttft_s=st.one_of(st.none(), st.floats(0, 10)),
        tpot_s=st.one_of(st.none(), st.floats(0, 1)),
        kv_free=st.one_of(st.none(), st.floats(0, 1e6)),
        kv_used=st.floats(0, 1e6),
        limit=st.floats(0.5, 256),
        steps=st.one_of(st.none(), st.just(STEPS)),
        batch_only=st.booleans(),
    )


@given(loads())
def test_there_is_always_room_for_the_interactive_requests(load: ReplicaLoad) -> None:
    allowed = filler_slots(load, OBJECTIVE)
    assert allowed >= 0
    if load.slots is not None and allowed:
        assert load.batch_only or load.interactive + allowed <= load.slots


@given(loads())
def test_none_enters_while_an_interactive_request_waits(load: ReplicaLoad) -> None:
    if load.queued and not load.batch_only:
        assert filler_slots(load, OBJECTIVE) == 0


@given(loads(), st.integers(1, 20))
def test_more_interactive_work_never_lets_more_fillers_in(load: ReplicaLoad, more: int) -> None:
    busier = msgspec.structs.replace(load, interactive=load.interactive + more)
    assert filler_slots(busier, OBJECTIVE) <= filler_slots(load, OBJECTIVE)
    faster = msgspec.structs.replace(load, arrivals=load.arrivals + more)
    assert filler_slots(faster, OBJECTIVE) <= filler_slots(load, OBJECTIVE)


@given(loads())
def test_a_step_stays_within_the_objective_as_far_as_fillers_can_help(load: ReplicaLoad) -> None:
    if load.steps is None or load.batch_only or not load.interactive:
        return
    allowed = filler_slots(load, OBJECTIVE)
    if allowed:
        others = max(load.kv_used - load.filler * load.kv_per_filler, 0.0)
        took = STEPS.seconds(0, load.interactive + allowed, others + allowed * load.kv_per_filler)
        assert took <= OBJECTIVE.tpot_s


@given(loads())
def test_the_limit_falls_when_the_objective_is_near_and_only_then(load: ReplicaLoad) -> None:
    after = adapted(load, OBJECTIVE)
    near = (load.ttft_s or 0) > OBJECTIVE.ttft_s or (load.tpot_s or 0) > OBJECTIVE.tpot_s
    if near or load.queued:
        assert after <= max(load.limit * 0.5, 0.5)
    assert after <= load.limit + 1


def test_an_empty_replica_is_filled() -> None:
    assert filler_slots(ReplicaLoad(slots=16), OBJECTIVE) == 16
    assert filler_slots(ReplicaLoad(slots=16, kv_free=5 * 4096.0), OBJECTIVE) == 5
    assert filler_slots(ReplicaLoad(slots=16, interactive=3, limit=9.0, arrivals=0.5), OBJECTIVE) == 9


def test_it_comes_to_as_many_as_the_objective_allows() -> None:
    """A replica whose tokens take 20 ms and 1 ms more for each filler: 25 make 45 ms, what is near to the objective."""
    limit, fillers = 1.0, 0
    seen = []
    for _ in range(200):
        took = 0.02 + 0.001 * fillers
        load = ReplicaLoad(interactive=10, filler=fillers, slots=256, ttft_s=0.3, tpot_s=took, limit=limit)
        limit = adapted(load, OBJECTIVE)
        fillers = filler_slots(msgspec.structs.replace(load, limit=limit), OBJECTIVE)
        seen.append(took)
    assert max(seen) <= OBJECTIVE.tpot_s
    assert sum(seen[50:]) / len(seen[50:]) >= 0.6 * OBJECTIVE.tpot_s


def test_step_times_are_found_from_noisy_steps() -> None:
    chance, fit = random.Random(1), StepFit()
    assert fit.fitted() is None
    for _ in range(500):
        prefill, batch = chance.choice([0, 512, 4096]), chance.randrange(1, 200)
        kv = batch * chance.uniform(500, 3000)
        fit.observe(prefill, batch, kv, STEPS.seconds(prefill, batch, kv) * chance.uniform(0.97, 1.03))
    found = fit.fitted()
    assert found is not None
    for prefill, batch, kv in ((0, 8, 8000), (4096, 100, 2e5), (512, 150, 3e5)):
        truth = STEPS.seconds(prefill, batch, kv)
        assert abs(found.seconds(prefill, batch, kv) - truth) < 0.1 * truth


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e3), st.floats(0, 1e7), st.floats(0, 1e3)), max_size=200))
def test_no_measurement_makes_a_step_time_that_is_no_number(steps: list[tuple[float, float, float, float]]) -> None:
    fit = StepFit()
    for step in steps:
        fit.observe(*step)
    found = fit.fitted(1)
    if steps:
        assert found is not None and 0 <= found.seconds(100, 10, 1000) < float("inf")


def test_prompts_that_will_come_between_leave_less_room() -> None:
    steps = StepTime(0.01, 5e-5, 1e-4, 0.0)
    quiet = ReplicaLoad(interactive=1, slots=500, limit=500.0, steps=steps, arrivals=0.1, prompt=2000.0, answer=30.0)
    found = [
        filler_slots(msgspec.structs.replace(quiet, arrivals=rate), OBJECTIVE) for rate in (0.1, 0.5, 1.0, 2.0, 4.0)
    ]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
    long = msgspec.structs.replace(quiet, arrivals=2.0, answer=600.0)
    assert filler_slots(long, OBJECTIVE) > found[3], "a long answer feels the mean of many bursts"
    heavy = msgspec.structs.replace(quiet, filler_prefill=20.0)
    assert filler_slots(heavy, OBJECTIVE) < found[0], "the fillers have prompts, too"
    assert filler_slots(msgspec.structs.replace(quiet, arrivals=50.0), OBJECTIVE) == 0
