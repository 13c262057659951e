"""Wall-clock time: a clock that tolerates jumps, and instants as datetimes or microseconds.

Datetimes are aware UTC; microseconds are integers since 1970.

Durations are measured by the monotonic clock everywhere. `JumpTolerantClock` is for instants that people have named:
one jump of the wall clock must not expire a deadline or end a reservation.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

FOLLOWED_S = 2.0
"""A step of the wall clock up to this size is followed at once: that is how clocks are kept right."""
BELIEVED_AFTER_S = 600.0
"""A larger one is believed when the wall clock has stood by it for so long."""


class JumpTolerantClock:
    """The wall clock, carried on by the monotonic one where that contradicts it."""

    def __init__(self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._offset = wall() - monotonic()
        self._doubt: tuple[float, float] | None = None
        """Since when (monotonic) the wall clock has had another offset, and which."""

    def seconds(self) -> float:
        """Unix time."""
        steady = self._monotonic()
        offset = self._wall() - steady
        if abs(offset - self._offset) <= FOLLOWED_S:
            self._offset, self._doubt = offset, None
        elif self._doubt is None or abs(offset - self._doubt[1]) > FOLLOWED_S:
            self._doubt = steady, offset
        elif steady - self._doubt[0] >= BELIEVED_AFTER_S:
            self._offset, self._doubt = offset, None
        return steady + self._offset

    def now(self) -> datetime:
        """The same, aware UTC."""
        return datetime.fromtimestamp(self.seconds(), UTC)


PROCESS_CLOCK = JumpTolerantClock()
"""The one of this process: instants of plans, replicas, jobs and reservations are all of it, and can be compared."""


def now_us() -> int:
    """The wall clock in microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def to_micros(instant: datetime) -> int:
    """Microseconds since 1970 UTC, exactly. Raises ValueError for a naive datetime."""
    if instant.tzinfo is None:
        raise ValueError("an instant must be aware; got a datetime without a time zone")
    return (instant - EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The aware UTC datetime of `micros` since 1970."""
    return EPOCH + timedelta(microseconds=micros)
