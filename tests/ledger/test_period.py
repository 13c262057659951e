from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tidemill.ledger.period import Period, PeriodError, parse_period, period_of, zone_named

zones = st.sampled_from(
    [
        "UTC",
        "Asia/Shanghai",
        "America/New_York",
        "America/St_Johns",  # clocks once went back over the midnight of 1 November
        "America/Asuncion",  # the midnight of 1 October 2017 does not exist
        "Asia/Kathmandu",
        "Pacific/Apia",  # has left out a whole day
        "Australia/Lord_Howe",
        "Africa/Cairo",
    ]
)
month_texts = st.builds("{:04d}-{:02d}".format, st.integers(1990, 2090), st.integers(1, 12))
instants = st.datetimes(datetime(1990, 2, 1), datetime(2090, 11, 1), timezones=st.just(UTC))
MICROSECOND = timedelta(microseconds=1)


def test_a_month_in_shanghai() -> None:
    november = parse_period("2026-11", "Asia/Shanghai")
    assert november.start == datetime(2026, 10, 31, 16, tzinfo=UTC)
    assert november.end == datetime(2026, 11, 30, 16, tzinfo=UTC)
    assert november.start.tzinfo is UTC
    assert november.title == "November 2026"
    assert november.start in november
    assert november.end not in november
    assert not november.is_over(november.end - MICROSECOND)
    assert november.is_over(november.end)


def test_a_month_with_a_clock_change_is_an_hour_longer_or_shorter() -> None:
    def hours(month: str) -> float:
        period = parse_period(month, "Europe/Berlin")
        return (period.end - period.start) / timedelta(hours=1)

    assert (hours("2026-03"), hours("2026-10"), hours("2026-12")) == (31 * 24 - 1, 31 * 24 + 1, 31 * 24)


def test_a_midnight_that_does_not_exist_is_the_instant_the_clocks_leap() -> None:
    october = parse_period("2017-10", "America/Asuncion")
    assert october.start == datetime(2017, 10, 1, 4, tzinfo=UTC)
    assert october.start.astimezone(zone_named("America/Asuncion")).hour == 1
    assert period_of(october.start - MICROSECOND, "America/Asuncion").month == "2017-09"


def test_of_two_midnights_the_first_begins_the_month() -> None:
    november = parse_period("2009-11", "America/St_Johns")
    assert november.start == datetime(2009, 11, 1, 2, 30, tzinfo=UTC)
    repeated = november.start + timedelta(minutes=2)
    assert repeated.astimezone(zone_named("America/St_Johns")).month == 10
    assert period_of(repeated, "America/St_Johns") == november


@given(month_texts, zones)
def test_months_follow_each_other_without_gap_or_overlap(text: str, zone: str) -> None:
    period = parse_period(text, zone)
    assert period.month == text
    assert period.next.start == period.end
    assert period.previous.end == period.start
    assert period.next.previous == period
    assert timedelta(days=27) < period.end - period.start < timedelta(days=32)


@given(instants, zones)
@example(datetime(2009, 11, 1, 2, 31, tzinfo=UTC), "America/St_Johns")
def test_an_instant_falls_in_exactly_one_month(instant: datetime, zone: str) -> None:
    period = period_of(instant, zone)
    assert instant in period
    assert instant not in period.previous
    assert instant not in period.next
    assert parse_period(period.month, zone) == period
    assert period_of(period.start, zone) == period
    assert period_of(period.end - MICROSECOND, zone) == period
    assert period_of(period.end, zone) == period.next


def test_an_instant_in_another_zones_clock() -> None:
    instant = datetime(2026, 11, 30, 23, tzinfo=zone_named("America/New_York"))
    assert period_of(instant, "Asia/Shanghai").month == "2026-12"
    assert period_of(instant, "America/New_York").month == "2026-11"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("2026-1", "write 2026-01"),
        ("11/2026", "write 2026-11"),
        ("202611", "write 2026-11"),
        ("2026.11", "write 2026-11"),
        ("November", "such as 2026-11"),
        ("", "such as 2026-11"),
        ("2026-13", "2026-01 to 2026-12"),
        ("2026-00", "2026-01 to 2026-12"),
        ("0206-11", "too far away"),
        ("9999-12", "too far away"),
    ],
)
def test_what_is_no_month_is_refused_with_advice(text: str, advice: str) -> None:
    with pytest.raises(PeriodError, match=advice):
        parse_period(text, "Asia/Shanghai")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("asia/shanghai ", "Asia/Shanghai"),
        ("Shanghai", "Asia/Shanghai"),
        ("Europe/Berln", "Europe/Berlin"),
        ("America", "is not a time zone"),
        ("../etc/passwd", "is not a time zone"),
        ("", "is not a time zone"),
    ],
)
def test_unknown_zones_are_refused_with_the_nearest_name(name: str, advice: str) -> None:
    with pytest.raises(PeriodError, match=advice):
        zone_named(name)


def test_a_naive_instant_is_refused() -> None:
    with pytest.raises(PeriodError, match="no time zone"):
        period_of(datetime(2026, 11, 1), "UTC")


def test_a_period_is_a_value() -> None:
    assert parse_period(" 2026-11 ", "UTC") == Period(
        "2026-11", "UTC", datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
    )
