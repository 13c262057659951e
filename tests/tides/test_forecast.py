"""Forecasts from binned history."""

import math
import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tidemill.tides.forecast import OUTLOOK, DemandSeries, ForecastSettings, forecast, quantile

BIN_S = 300.0
DAY = 288
END = 1_000 * 86_400.0


def wave(index: int) -> float:
    """A day with a trough at a quarter of its peak; weekends have half."""
    base = 2500 + 1500 * math.sin(2 * math.pi * (index % DAY) / DAY)
    return base * (0.5 if index // DAY % 7 in (5, 6) else 1.0)


def noisy_days(days: int, seed: int, noise: float = 0.1) -> list[float]:
    """Noise of its own for each bin, and a level of its own for each day."""
    chance = random.Random(seed)
    levels = [math.exp(chance.gauss(0, 0.05)) for _ in range(days)]
    return [wave(index) * levels[index // DAY] * math.exp(chance.gauss(0, noise)) for index in range(days * DAY)]


def asked_through(values: Sequence[float], first: int, every: int, ahead: int) -> list[tuple[float, float, float]]:
    """(expected, high, what came at the most), as asked in the course of time."""
    found = []
    for known in range(first, len(values) - ahead, every):
        demand = forecast(DemandSeries(END, tuple(values[:known])), ahead * BIN_S)
        found.append((demand.expected, demand.high, max(values[known : known + ahead])))
    return found


def test_it_beats_the_last_value_an_hour_ahead() -> None:
    values = noisy_days(17, seed=1)
    first, every, ahead = 15 * DAY, 7, 12
    found = asked_through(values, first, every, ahead)
    ours = sum(abs(expected - came) for expected, _, came in found)
    last = sum(
        abs(values[known - 1] - max(values[known : known + ahead]))
        for known in range(first, len(values) - ahead, every)
    )
    assert ours < 0.8 * last


def test_the_quantile_is_exceeded_about_as_often_as_it_says() -> None:
    """Of a window of several bins the highest is asked for, so it may be more often than for one bin."""
    exceeded = [
        came > high for seed in (1, 2, 3) for _, high, came in asked_through(noisy_days(16, seed), 15 * DAY, 5, 1)
    ]
    share = sum(exceeded) / len(exceeded)
    assert 0.005 <= share <= 0.12, share


def test_high_is_not_far_above_what_comes() -> None:
    found = asked_through(noisy_days(16, seed=4), 15 * DAY, 5, 1)
    assert sum(high for _, high, _ in found) < 1.4 * sum(came for _, _, came in found)


def test_weekdays_are_told_apart_after_two_weeks() -> None:
    values = [wave(index) for index in range(19 * DAY)]  # ends before a Saturday (day 19 % 7 == 5)
    noon = DAY // 4
    saturday = forecast(DemandSeries(END, tuple(values + [wave(19 * DAY + index) for index in range(noon)])), BIN_S)
    assert abs(saturday.expected - wave(19 * DAY + noon)) < 0.1 * wave(19 * DAY + noon)


def test_a_busy_day_is_noticed() -> None:
    values = [wave(index) for index in range(10 * DAY)]
    values[-6:] = [value * 1.5 for value in values[-6:]]
    soon = forecast(DemandSeries(END, tuple(values)), BIN_S)
    assert 1.3 * wave(10 * DAY) < soon.expected < 1.6 * wave(10 * DAY)


def test_one_burst_is_no_busy_day_and_one_day_no_habit() -> None:
    values = [wave(index) for index in range(10 * DAY)]
    values[-2] *= 20
    values[-DAY] *= 20
    soon = forecast(DemandSeries(END, tuple(values)), BIN_S)
    assert soon.expected < 1.1 * wave(10 * DAY)


def test_gaps_do_no_harm() -> None:
    chance = random.Random(1)
    values = [None if chance.random() < 0.3 or index // DAY == 4 else wave(index) for index in range(10 * DAY)]
    soon = forecast(DemandSeries(END, tuple(values)), BIN_S)
    assert 0.9 * wave(10 * DAY) < soon.expected < 1.1 * wave(10 * DAY)


def test_without_history_nothing_is_expected_and_with_a_little_what_there_was() -> None:
    assert forecast(DemandSeries(END), 60).high == 0
    few = forecast(DemandSeries(END, (100.0, 110.0, 105.0)), 60)
    assert 100 <= few.expected <= 110 and few.high > 1.2 * few.expected


bins = st.lists(st.one_of(st.none(), st.floats(0, 1e7)), max_size=600)


@given(bins, st.floats(1, 7200), st.floats(0.5, 0.99))
@examples(0.4)
def test_a_forecast_is_never_negative_nor_beyond_reason(
    values: list[float | None], horizon_s: float, share: float
) -> None:
    demand = forecast(DemandSeries(END, tuple(values)), horizon_s, ForecastSettings(quantile=share))
    known = [value for value in values if value is not None]
    assert 0 <= demand.expected <= demand.high
    assert math.isfinite(demand.high)
    if known:
        assert demand.expected <= 11 * max(known) + 1e-6
    else:
        assert demand.high == 0


@given(st.integers(2, 400), st.floats(0.0, 1e6))
@examples(0.4)
def test_what_never_changes_is_expected_to_stay(length: int, value: float) -> None:
    demand = forecast(DemandSeries(END, (value,) * length), BIN_S)
    assert math.isclose(demand.expected, value, rel_tol=1e-6, abs_tol=1e-6)
    assert demand.high <= value * (1 + OUTLOOK.spread) + 1e-6


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.01, 0.99))
def test_a_quantile_is_one_of_the_values_and_exceeded_by_few(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value > found for value in values) <= (1 - share) * len(values) + 1
