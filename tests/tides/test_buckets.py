"""Times in buckets: each in its own, and quantiles right to a tenth."""

import statistics

from hypothesis import given
from hypothesis import strategies as st

from tidemill.tides.buckets import Buckets, add_up, bucket_of, edge_of, quantile_us


@given(st.integers(0, 2**40))
def test_a_time_lies_in_its_bucket(micros: int) -> None:
    bucket = bucket_of(micros)
    low, high = edge_of(bucket), edge_of(bucket + 1)
    assert low <= max(micros, 1) < high
    assert high - low <= max(low / 8, 1)


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=200))
def test_the_median_is_right_to_a_tenth(times: list[int]) -> None:
    buckets: Buckets = {}
    for each in times:
        add_up(buckets, {bucket_of(each): 1})
    found = quantile_us(buckets, 0.5)
    exact = statistics.median_low(times)
    assert found is not None and abs(found - exact) <= max(exact / 8, 1)


def test_no_samples_no_quantile() -> None:
    assert quantile_us({}, 0.95) is None
