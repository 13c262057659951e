"""Figures of traffic: rates that fade, lateness, idleness, peaks, and what a replica is measured to do."""

from hypothesis import given
from hypothesis import strategies as st

from tidemill.fleet.traffic import CAPACITY_WINDOW_S, LATE_TAU_S, NOW_TAU_S, SAMPLES_S, CapacityMeter, ModelTraffic
from tidemill.tides.buckets import bucket_of


def steady(traffic: ModelTraffic, rate: int, seconds: int, begin: int = 0) -> int:
    for second in range(begin, begin + seconds):
        traffic.heard(1, rate, 1, 0, float(second))
    return begin + seconds


def test_a_steady_rate_is_found_and_fades() -> None:
    traffic = ModelTraffic(0.0)
    end = steady(traffic, 100, 120)
    assert 80 < traffic.rate(float(end)) < 120
    assert 0.8 < traffic.arrivals(float(end)) < 1.2
    assert traffic.rate(end + NOW_TAU_S / 2) < 80
    assert traffic.rate(end + NOW_TAU_S + 1) == 0.0, "nobody is there any more"


def test_a_correction_below_zero_is_no_demand() -> None:
    traffic = ModelTraffic(0.0)
    traffic.heard(1, 1000, 0, 0, 0.0)
    traffic.heard(0, -1500, 1, 0, 1.0)
    assert traffic.rate(1.0) == 0.0


def test_idle_since_the_last_request() -> None:
    traffic = ModelTraffic(0.0)
    traffic.heard(1, 10, 0, 0, 5.0)
    traffic.busy(9.0)
    assert traffic.idle_s(10.0) == 1.0
    traffic.busy(2.0)  # said late
    assert traffic.idle_s(10.0) == 1.0


def test_lateness_is_that_of_the_last_minutes() -> None:
    traffic = ModelTraffic(0.0)
    traffic.heard(10, 10, 10, 5, 0.0)
    assert traffic.late(0.0) == 0.5
    traffic.heard(100, 10, 100, 0, 2 * LATE_TAU_S)
    assert traffic.late(2 * LATE_TAU_S) < 0.05
    assert traffic.late(20 * LATE_TAU_S) == 0.0, "of nobody, nobody is late"


def test_times_are_those_of_lately() -> None:
    traffic = ModelTraffic(0.0, percentile=0.5)
    assert traffic.ttft_s(0.0) is None
    traffic.sampled({bucket_of(100_000): 9, bucket_of(5_000_000): 1}, {bucket_of(20_000): 5}, 1.0)
    found = traffic.ttft_s(1.0)
    assert found is not None and 0.085 < found < 0.115
    assert traffic.ttft_s(SAMPLES_S + 1.5) == found
    assert traffic.ttft_s(3 * SAMPLES_S + 5) is None


@given(st.lists(st.tuples(st.floats(0.0, 50.0), st.floats(0.0, 100.0)), min_size=1, max_size=60))
def test_the_peak_is_the_highest_of_its_time(steps: list[tuple[float, float]]) -> None:
    traffic, now, seen = ModelTraffic(0.0), 0.0, []
    for passed, level in steps:
        now += passed
        seen.append((now, level))
        peak = traffic.peak(level, now, 60.0)
        exact = max(each for at, each in seen if at >= now - 60.0)
        assert exact * 0.99 - 1e-9 <= peak <= max(each for _, each in seen)


def window(meter: CapacityMeter, rate: int, begin: float, *, late: int = 0, busy: bool = True) -> float:
    """A window in which one replica does `rate` a second; gives its end."""
    steps = int(CAPACITY_WINDOW_S / 0.2)
    for step in range(steps + 1):
        done = rate // 5 if busy and step else 0
        meter.served("m/0", 1 if busy else 0, done, begin + step * 0.2)
    meter.ended(20, late)
    meter.close_window(begin + CAPACITY_WINDOW_S)
    return begin + CAPACITY_WINDOW_S


def test_what_a_busy_replica_does_is_its_capacity() -> None:
    meter = CapacityMeter()
    now = 0.0
    for _ in range(20):
        now = window(meter, 1000, now)
    assert 950 < meter.capacity <= 1000 * 1.05
    now = window(meter, 100, now, busy=False)
    assert meter.capacity > 950, "an idle replica shows nothing"
    window(meter, 200, now)
    assert meter.capacity > 950, "a slow hour shows nothing either, as long as nobody was late"


def test_what_makes_people_wait_is_too_much() -> None:
    meter = CapacityMeter(1000.0)
    now = 0.0
    for _ in range(20):
        now = window(meter, 700, now, late=10)
    assert 650 < meter.capacity < 1000 * 0.75
    assert CapacityMeter().capacity == 0.0, "not known is not nothing"
