"""Weighted fair queueing between tenants."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.tides.fairness import MAX_FLOWS, FairClock


def served(weights: dict[str, int], work: dict[str, list[int]], requests: int) -> dict[str, int]:
    """The work that each tenant gets out of so many turns, when all of them always have something waiting."""
    clock, got = FairClock(), dict.fromkeys(weights, 0)
    for number in range(requests):
        flow = clock.next_of(weights)
        size = work[flow][number % len(work[flow])]
        clock.serve(flow, size, weights[flow])
        got[flow] += size
    return got


@given(
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    sizes=st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=5), min_size=5, max_size=5),
)
def test_backlogged_tenants_get_work_by_their_weights(weights: list[int], sizes: list[list[int]]) -> None:
    """The bound of start-time fair queueing: two backlogged flows differ by their largest requests at the most."""
    by_name = {f"t{number}": weight for number, weight in enumerate(weights)}
    work = dict(zip(by_name, sizes, strict=False))
    got = served(by_name, work, 500)
    for one in by_name:
        for other in by_name:
            bound = max(work[one]) / by_name[one] + max(work[other]) / by_name[other]
            assert abs(got[one] / by_name[one] - got[other] / by_name[other]) <= bound + 1e-6


def test_many_small_requests_gain_nothing_over_a_few_large_ones() -> None:
    got = served({"small": 1, "large": 1}, {"small": [10], "large": [1000]}, 1010)
    assert got["small"] == pytest.approx(got["large"], rel=0.15)


def test_who_was_away_has_saved_up_nothing_and_owes_nothing() -> None:
    clock = FairClock()
    for _ in range(100):
        clock.serve("busy", 100, 1)
    turns = []
    for _ in range(10):
        flow = clock.next_of(["busy", "back"])
        clock.serve(flow, 100, 1)
        turns.append(flow)
    assert turns[0] == "back" and turns.count("back") in (5, 6)


def test_work_that_was_underestimated_is_made_good() -> None:
    """One tenant's answers are ten times as long as taken for; by work done, both get the same all the same."""
    clock, got = FairClock(), {"honest": 0, "long": 0}
    for _ in range(1000):
        flow = clock.next_of(got)
        clock.serve(flow, 100, 1)
        used = 1000 if flow == "long" else 100
        clock.correct(flow, used - 100, 1)
        got[flow] += used
    assert got["long"] == pytest.approx(got["honest"], rel=0.05)


def test_memory_is_bounded() -> None:
    clock, chance = FairClock(), random.Random(1)
    for number in range(3 * MAX_FLOWS):
        clock.serve(f"t{number}", chance.randint(1, 100), 1)
        clock.serve("regular", 1, 1)
    assert len(clock._ends) <= MAX_FLOWS + 1
