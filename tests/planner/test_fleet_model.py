"""The simulated replica."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.planner.arrivals import ArrivalBin
from tidemill.planner.fleet_model import SimulatedLoad, SimulatedModel, advance
from tidemill.tides.slack import StepTime
from tidemill.tides.state import Objective

SPEC = SimulatedModel(
    name="chat",
    devices=4,
    steps=StepTime(0.010, 5.9e-5, 8.0e-5, 2.0e-8),
    objective=Objective(2.0, 0.05, 0.95),
    slots=256,
    kv_tokens=8e5,
    startup_s=120.0,
    prompt=1155.0,
    output=211.0,
)


def evenly(rate: float, dt_s: float = 2.0) -> ArrivalBin:
    return ArrivalBin(rate * dt_s, rate * dt_s * SPEC.prompt, rate * dt_s * SPEC.output)


def run(rate: float, seconds: float = 300.0, fillers: float = 0.0) -> tuple[SimulatedLoad, float, float, float]:
    """Sequences at the end, share that was late, work a second, step time."""
    load, late, work, step = SimulatedLoad(fillers=fillers), 0.0, 0.0, 0.0
    steps = round(seconds / 2)
    for _ in range(steps):
        outcome = advance(load, SPEC, evenly(rate), 2.0)
        late += outcome.late / steps
        work += outcome.work / seconds
        step = outcome.step_s
    return load, late, work, step


def rate_at_capacity() -> float:
    return SPEC.capacity() / (SPEC.prompt + 5 * SPEC.output)


def test_requests_that_come_evenly_below_capacity_are_in_time_and_far_above_it_are_not() -> None:
    assert run(0.8 * rate_at_capacity())[1] < 0.01
    assert run(1.5 * rate_at_capacity())[1] > 0.5


def test_work_that_is_done_is_work_that_came() -> None:
    rate = 0.7 * rate_at_capacity()
    _, _, work, _ = run(rate, 3000.0)
    assert work == pytest.approx(rate * (SPEC.prompt + 5 * SPEC.output), rel=0.03)


def test_littles_law() -> None:
    rate = 0.5 * rate_at_capacity()
    load, _, _, step = run(rate, 3000.0)
    assert load.sequences == pytest.approx(rate * SPEC.output * step, rel=0.1)


def test_fillers_make_steps_longer_and_add_their_work() -> None:
    rate = 0.4 * rate_at_capacity()
    without, beside = run(rate), run(rate, fillers=20.0)
    assert beside[3] > without[3] and beside[2] > without[2] and beside[1] >= without[1]


def test_a_measured_capacity_is_less_where_requests_come_in_bursts() -> None:
    even = [evenly(10.0) for _ in range(300)]
    bursts = [evenly(60.0) if index % 6 == 0 else ArrivalBin() for index in range(300)]
    assert 0 < SPEC.measured(bursts, 2.0) < SPEC.measured(even, 2.0)


@given(
    st.floats(0, 300), st.floats(0, 300), st.floats(0, 1e6), st.floats(0, 500), st.floats(1, 8000), st.floats(1, 2000)
)
def test_no_load_makes_nonsense(
    sequences: float, fillers: float, queue: float, requests: float, prompt: float, output: float
) -> None:
    load = SimulatedLoad(sequences, queue, fillers)
    outcome = advance(load, SPEC, ArrivalBin(requests, requests * prompt, requests * output), 2.0)
    assert 0 <= outcome.late <= 1
    assert outcome.step_s >= SPEC.steps.base
    assert load.sequences >= 0 and load.queue >= 0
    assert outcome.work >= outcome.filler_work >= 0
