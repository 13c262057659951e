"""Requests of a simulated day."""

from pathlib import Path

import pytest

from tidemill.errors import BadInput
from tidemill.planner.arrivals import ArrivalBin, Day, Trace, daily_curve, history_of, read_trace, requests_of

TRACE = Trace(tuple(ArrivalBin(index % 5, 1000.0 * (index % 5), 200.0 * (index % 5)) for index in range(300)), 2.0)


def test_a_trace_is_read_into_bins(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:47.6805900,26,6\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    trace = read_trace(path, 2.0)
    assert trace.bins == (ArrivalBin(2, 400, 50), ArrivalBin(), ArrivalBin(1, 396, 109))
    assert trace.rate == pytest.approx(0.5) and trace.prompt == pytest.approx(796 / 3)


@pytest.mark.parametrize("text", ["", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "a,b\n1,2\n", "TIMESTAMP\nnever\n"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match="trace.csv"):
        read_trace(path, 2.0)
    with pytest.raises(BadInput):
        read_trace(tmp_path / "none.csv", 2.0)


def test_the_trough_is_below_half_of_the_peak() -> None:
    day = [daily_curve(minute * 60.0) for minute in range(1440)]
    assert max(day) == pytest.approx(1.0, abs=0.02) and min(day) < 0.5 * max(day)


def test_a_day_has_the_rate_that_was_asked_for_and_is_the_same_for_the_same_seed() -> None:
    day = Day(peak_rate=20.0)
    bins = requests_of(day, TRACE, seed=1)
    assert bins == requests_of(day, TRACE, seed=1) != requests_of(day, TRACE, seed=2)
    evening = bins[round(18.5 * 1800) : round(19.5 * 1800)]
    assert sum(each.requests for each in evening) / 3600 == pytest.approx(20.0, rel=0.05)
    requests = sum(each.requests for each in evening)
    assert sum(each.prompt for each in evening) / requests == pytest.approx(1000, rel=0.01)


def test_a_surge_lasts_an_hour() -> None:
    calm, wild = (requests_of(Day(peak_rate=20.0, surge_at_s=at, surge=2.0), TRACE, 1) for at in (None, 36_000.0))
    ratio = [other.requests / one.requests for one, other in zip(calm, wild, strict=True) if one.requests]
    assert max(ratio) == pytest.approx(2.0) and min(ratio) == pytest.approx(1.0)
    changed = [index for index, (one, other) in enumerate(zip(calm, wild, strict=True)) if one != other]
    assert changed[0] >= 18_000 and changed[-1] < 19_800


def test_history_has_a_value_for_each_bin_of_each_day() -> None:
    values = history_of(3, lambda each: each.prompt, Day(peak_rate=20.0), TRACE, seed=1)
    assert len(values) == 3 * 288 and min(values) > 0
