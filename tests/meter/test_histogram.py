"""Histograms count each time once, in the first bucket that reaches to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.meter.histogram import Histogram, milliseconds

BOUNDS = milliseconds(0.1, 1, 2.5, 10)
times = st.lists(st.integers(-5, 20_000))


def of(noted: list[int]) -> Histogram:
    histogram = Histogram(BOUNDS)
    for us in noted:
        histogram.note(us)
    return histogram


@given(times)
def test_a_bucket_has_what_is_at_most_its_bound_and_beyond_the_one_before(noted: list[int]) -> None:
    counts = of(noted).counts
    for at, bound in enumerate(BOUNDS):
        assert sum(counts[: at + 1]) == sum(us <= bound for us in noted)
    assert sum(counts) == len(noted)


@given(times, times)
def test_adding_is_counting_all(first: list[int], second: list[int]) -> None:
    total = of(first)
    total.add(of(second))
    assert total == of(first + second)


def test_a_clock_that_was_set_back_makes_no_negative_sum() -> None:
    assert of([-5_000_000]).sum_us == 0


def test_other_bounds_are_not_added() -> None:
    with pytest.raises(ValueError, match="bounds"):
        of([1]).add(Histogram((1, 2)))
