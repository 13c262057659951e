"""Requests or tokens per minute, shared by many processes without asking for each.

A strict sliding window.

A process is granted permits ahead of need, and may spend each of them until the grant's last second. What it reports
to the store is the whole of what it has: how much it spent in each of the last seconds, and what it holds. The store
counts spent permits in the second in which they were spent, and held ones in the last second in which they still may
be. So whatever a process does until its next report, or if it never reports again, it was counted at least as much,
and at least as late. Hence the invariant, over all processes:

    in each span of 60 seconds, no more is admitted than the limit allows

A report says everything anew, so a report that is lost, or whose answer is lost, does no harm. Seconds are whole
seconds of the store's clock; a process that is not sure of it takes the later one.
"""

from collections.abc import Iterable, Mapping

import msgspec

RATE_WINDOW_S = 60
"""A limit counts by the minute."""
AHEAD_S = 30
"""How long a permit may be kept: so long a process that cannot reach the store goes on, and so much later than a
minute the permits of a process that died are free again."""
RATE_SLICES = 4
"""A process gets at most this fraction of what is free, unless more is waiting for it."""
SHORTEST_PACE_S = 0.25
"""The pace is not judged by a shorter time than this."""
FADING = 0.01
"""What is left of the pace after a second without use: what an idle process holds, others may be waiting for."""

Booked = Mapping[int, int]
"""Permits by the second in which they count."""


def in_force(booked: Booked, second: int) -> int:
    """What of `booked` counts against the limit in `second`.

    A permit of second s was spent before s + 1, and so is more than a minute old from second s + 61 on. What lies
    further ahead than any grant was booked before the clock was put back, and would block for as long as that.
    """
    return sum(amount for at, amount in booked.items() if second - RATE_WINDOW_S <= at <= second + AHEAD_S)


class RateReport(msgspec.Struct, frozen=True):
    """All that a process has of a limit, and what it would like."""

    spent: dict[int, int]
    held: int
    need: int = 0
    """For requests that wait."""
    least: int = 1
    """The smallest amount that helps one of them."""
    want: int = 0
    """For requests that are expected; `need` included."""


class RateGrant(msgspec.Struct, frozen=True):
    """The store's answer to a report."""

    granted: int
    """Negative when the limit was lowered below what is out."""
    valid: int
    """The last second in which what the process holds now may be spent."""
    free: int
    """What is left for others."""
    elsewhere: int
    """What other processes hold and have not spent, as far as is known."""
    frees_in: int
    """Seconds until `least` is free, if it was not; 0 when it was."""


def booked_of(report: RateReport, valid: int) -> dict[int, int]:
    """What the store keeps of a report, when its permits are valid until `valid`."""
    booked = dict(report.spent)
    if report.held:
        booked[valid] = booked.get(valid, 0) + report.held
    return booked


def grant(limit: int, others: Iterable[Booked], report: RateReport, second: int) -> RateGrant:
    """Decide on a report in `second` of the store's clock, given what the store keeps of all other processes."""
    others = list(others)
    valid = second + AHEAD_S
    own = booked_of(report, valid)
    free = limit - in_force(own, second) - sum(in_force(each, second) for each in others)
    elsewhere = sum(amount for each in others for at, amount in each.items() if at > second)
    granted = 0
    if free < 0:
        granted = max(free, -report.held)
    elif not report.need or report.held + free >= report.least:
        granted = min(max(report.need, min(report.want, free // RATE_SLICES)), free)
    short = report.least - report.held - granted if report.need else 0
    frees_in = _frees_in([own, *others], short - (free - granted), second) if short > 0 else 0
    return RateGrant(granted, valid, max(free - granted, 0), elsewhere, frees_in)


def _frees_in(all_booked: list[Booked], missing: int, second: int) -> int:
    """Seconds until `missing` more permits are a minute old, if nothing else happens."""
    by_second: dict[int, int] = {}
    for each in all_booked:
        for at, amount in each.items():
            if second - RATE_WINDOW_S <= at <= second + AHEAD_S:
                by_second[at] = by_second.get(at, 0) + amount
    for at in sorted(by_second):
        missing -= by_second[at]
        if missing <= 0:
            return at + RATE_WINDOW_S + 1 - second
    return RATE_WINDOW_S + AHEAD_S + 1


class RateShare:
    """What one process has of one limit.

    Plain arithmetic: the caller knows the second and talks to the store.
    """

    __slots__ = ("_pace", "_paced_at", "_used", "dirty", "held", "last_used", "spent", "valid")

    def __init__(self) -> None:
        self.spent: dict[int, int] = {}
        """By second, of the last minute."""
        self.held = 0
        self.valid = -1
        """The last second in which what is held may be spent."""
        self.last_used = -1
        """The last second in which something was spent."""
        self.dirty = False
        """Something has changed since the last report."""
        self._used = 0
        self._pace = 0.0
        self._paced_at = 0.0

    def at_hand(self, second: int) -> int:
        """What may be spent now."""
        return self.held if second <= self.valid else 0

    def take(self, amount: int, second: int) -> bool:
        """Spend `amount`; False (and nothing changes) when it is not at hand."""
        if second > self.valid or amount > self.held:
            return False
        self.held -= amount
        self._spend(amount, second)
        return True

    def overrun(self, amount: int, second: int) -> None:
        """More was used than was taken. It has happened, so it counts, if need be beyond the limit."""
        self._spend(amount, second)

    def _spend(self, amount: int, second: int) -> None:
        self._used += amount
        self.spent[second] = self.spent.get(second, 0) + amount
        self.last_used = second
        self.dirty = True

    def refund(self, amount: int, second: int) -> None:
        """Less was used than was taken in `second`.

        It is at hand again only after the next report: until then the store counts it in that second, and so it must
        not be spent in a later one.
        """
        left = self.spent.get(second, 0) - amount
        if left > 0:
            self.spent[second] = left
        else:
            self.spent.pop(second, None)
        self.dirty = True

    def report(
        self,
        second: int,
        now: float,
        *,
        need: int = 0,
        least: int = 1,
        reserve_s: float = 0.0,
        cushion: int = 0,
    ) -> RateReport:
        """What to tell the store.

        Keeps what the pace of late uses up in `reserve_s` seconds, or `cushion` if that is more, or `need`; gives the
        rest back. `now` is any clock in seconds; it measures the pace.
        """
        for past in [at for at in self.spent if at < second - RATE_WINDOW_S]:
            del self.spent[past]
        for ahead in [at for at in self.spent if at > second]:  # it was spent by now, whatever was thought then
            self.spent[second] = self.spent.get(second, 0) + self.spent.pop(ahead)
        if second > self.valid:
            self.held = 0
        passed = max(now - self._paced_at, 0.0)
        self._pace = max(self._used / max(passed, SHORTEST_PACE_S), self._pace * FADING**passed)
        self._paced_at, self._used, self.dirty = now, 0, False
        wanted = max(int(self._pace * reserve_s), cushion) + need
        self.held = min(self.held, wanted)
        return RateReport(dict(self.spent), self.held, max(need - self.held, 0), least, wanted - self.held)

    def renewed(self, answer: RateGrant) -> None:
        """Take over what the store granted."""
        self.held += answer.granted
        self.valid = answer.valid

    def runs_low(self, within_s: float) -> bool:
        """What is held would not last for `within_s` seconds at the pace of late."""
        return self.held < self._pace * within_s
