"""A billing month: which instants belong to it, in the operator's time zone.

A month runs from the first midnight of its first day to the first midnight of the next month's, both as UTC
instants, so that months follow each other without a gap or an overlap whatever the clocks do. (In St. John's
the clock once went back from 00:01 on 1 November to 23:01 on 31 October: that hour is November's.)
"""

import re
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

import msgspec

from tidemill.ledger.errors import LedgerError
from tidemill.suggestions import nearest

_FIRST_YEAR, _LAST_YEAR = 1900, 2999
_MONTH = re.compile(r"([0-9]{4})-([0-9]{2})")
_NEARLY = re.compile(r"([0-9]{4})[-/. ]?([0-9]{1,2})|([0-9]{1,2})[-/. ]([0-9]{4})")
# Not calendar.month_name, which follows the process's locale.
_NAMES = (
    ("January", "February", "March", "April", "May", "June")
    + ("July", "August", "September", "October", "November", "December")
)  # fmt: skip


class PeriodError(LedgerError):
    """A month or a time zone that cannot be taken as written."""


class Period(msgspec.Struct, frozen=True):
    """One billing month: the instants from `start` up to and without `end`."""

    month: str
    """As written in commands and invoice numbers: `2026-11`."""
    zone: str
    """IANA name of the zone whose midnights bound the month."""
    start: datetime
    """Aware UTC."""
    end: datetime
    """Aware UTC; the first instant that is no longer in the month."""

    def __contains__(self, instant: datetime) -> bool:
        return self.start <= instant < self.end

    def is_over(self, as_of: datetime) -> bool:
        """Whether no instant of the month lies at or after `as_of`."""
        return as_of >= self.end

    @property
    def title(self) -> str:
        """For readers: `November 2026`."""
        year, month = self.month.split("-")
        return f"{_NAMES[int(month) - 1]} {year}"

    @property
    def previous(self) -> "Period":
        year, month = map(int, self.month.split("-"))
        return _period(year - (month == 1), (month - 2) % 12 + 1, self.zone)

    @property
    def next(self) -> "Period":
        year, month = map(int, self.month.split("-"))
        return _period(year + (month == 12), month % 12 + 1, self.zone)


def parse_period(text: str, zone: str) -> Period:
    """Read a month such as "2026-11" as a billing month in the IANA zone `zone`. Raises PeriodError."""
    match = _MONTH.fullmatch(text.strip())
    if not match:
        raise PeriodError(f"{text!r} is not a month; write {_suggestion(text)}")
    year, month = int(match[1]), int(match[2])
    if not 1 <= month <= 12:
        raise PeriodError(f"{text!r} is not a month: the months of {match[1]} are {match[1]}-01 to {match[1]}-12")
    return _period(year, month, zone)


def period_of(instant: datetime, zone: str) -> Period:
    """The billing month that `instant` (aware) falls in."""
    if instant.utcoffset() is None:
        raise PeriodError(f"{instant} has no time zone")
    local = instant.astimezone(zone_named(zone))
    period = _period(local.year, local.month, zone)
    # Where clocks went back over midnight, the wall shows the old month's date for a while after the new has
    # begun.
    return period.next if instant >= period.end else period


@lru_cache(maxsize=64)
def zone_named(name: str) -> tzinfo:
    """The IANA time zone of this name; UTC needs no database. Raises PeriodError with a near name."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # unknown; a path; a directory
        known = available_timezones()
        if not known:
            raise PeriodError(
                f"no time zone database on this machine to look up {name!r} in; install tzdata, or use UTC"
            ) from error
        by_lower = {zone.lower(): zone for zone in sorted(known)}
        by_lower |= {lower.rpartition("/")[2]: zone for lower, zone in by_lower.items() if "/" in lower} | by_lower
        near = nearest(name.lower(), by_lower)
        advice = f"did you mean {by_lower[near]}?" if near else "write an IANA name such as Asia/Shanghai or UTC"
        raise PeriodError(f"{name!r} is not a time zone; {advice}") from error


@lru_cache(maxsize=256)
def _period(year: int, month: int, zone: str) -> Period:
    if not _FIRST_YEAR <= year <= _LAST_YEAR:
        raise PeriodError(f"{year:04d}-{month:02d} is too far away; write a year from {_FIRST_YEAR} to {_LAST_YEAR}")
    return Period(
        month=f"{year:04d}-{month:02d}",
        zone=zone,
        start=_first_midnight(year, month, zone),
        end=_first_midnight(year + (month == 12), month % 12 + 1, zone),
    )


def _first_midnight(year: int, month: int, zone: str) -> datetime:
    # fold=0: of two midnights the first. A midnight that the clocks leap over is read with the offset before
    # the leap, which is the instant of the leap itself: the month's first instant all the same. (No zone has
    # ever leapt from before a month's first midnight to after it.)
    return datetime(year, month, 1, tzinfo=zone_named(zone), fold=0).astimezone(UTC)


def _suggestion(text: str) -> str:
    near = _NEARLY.fullmatch(text.strip())
    if near:
        year, month = (near[1], near[2]) if near[1] else (near[4], near[3])
        if 1 <= int(month) <= 12:
            return f"{year}-{int(month):02d}"
    return "year and month such as 2026-11"
