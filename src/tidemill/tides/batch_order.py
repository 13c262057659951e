"""The order in which lines of batches are sent.

So that deadlines hold, and lines that begin alike come one after the other, so that the beginning is computed once
(HyGen's and BlendServe's prefix sharing, arXiv 2501.14808, 2411.16102).

The two don't conflict as long as time is left: a line whose deadline is further off than *all* lines take together may
be sent at any place. Those are put by prefix. The others go first, by deadline, and only equal deadlines by prefix. So
every deadline that earliest-deadline-first keeps is kept.
"""

from collections.abc import Hashable, Sequence

import msgspec


class BatchLineView(msgspec.Struct, frozen=True, gc=False):
    """A waiting line."""

    work: float
    """Tokens of prefill that it is expected to cost."""
    deadline: float
    """Unix time, seconds."""
    prefix: str = ""
    """Equal for lines whose prompts begin alike; empty: with no other."""


def order(lines: Sequence[BatchLineView], now: float, rate: float, margin: float = 0.7) -> list[int]:
    """The indexes of the lines, in the order to send them.

    `rate` is the work a second that batches get; of the time to a deadline, the share `margin` is counted on.
    """
    if not lines:
        return []
    total_s = sum(line.work for line in lines) / max(rate, 1e-9)
    free_from = now + total_s / margin
    urgent = [index for index, line in enumerate(lines) if line.deadline < free_from]
    others = [index for index, line in enumerate(lines) if line.deadline >= free_from]
    urgent.sort(key=lambda index: (lines[index].deadline, lines[index].prefix, index))
    first: dict[Hashable, tuple[float, int]] = {}
    for index in others:
        line = lines[index]
        group: Hashable = line.prefix or index
        first[group] = min(first.get(group, (line.deadline, index)), (line.deadline, index))
    others.sort(key=lambda index: (first[lines[index].prefix or index], lines[index].deadline, index))
    return urgent + others
