"""A histogram for hot paths: counts in a list, found by bisection; about 1 us per observation."""

from bisect import bisect_left

import msgspec


class Histogram(msgspec.Struct):
    """How often a time fell into each bucket.

    `bounds` are the upper ends in microseconds, ascending and inclusive; `counts` has one more, for what is longer than
    all of them.
    """

    bounds: tuple[int, ...]
    counts: list[int] = []
    sum_us: int = 0

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)

    def note(self, us: int) -> None:
        """Count a time in microseconds; one before it began, as clocks are set, is none."""
        us = max(us, 0)
        self.counts[bisect_left(self.bounds, us)] += 1
        self.sum_us += us

    def add(self, other: "Histogram") -> None:
        """Add the counts of a histogram with the same bounds. Raises ValueError for other bounds."""
        if other.bounds != self.bounds:
            raise ValueError("histograms with different bounds cannot be added")
        self.counts = [own + its for own, its in zip(self.counts, other.counts, strict=True)]
        self.sum_us += other.sum_us


def milliseconds(*bounds: float) -> tuple[int, ...]:
    """Bounds in microseconds, from milliseconds."""
    return tuple(round(bound * 1000) for bound in bounds)
