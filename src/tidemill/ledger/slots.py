"""Concurrent requests, shared by many processes: each has a lease on some of the slots of a limit.

A process says anew each time how many slots it keeps, and gets some more if any are free. So a report that is lost,
or whose answer is lost, does no harm: it believes in no more slots than the store counts for it.
"""

import msgspec

LEASE_S = 300
"""Without a word from a process for so long (its machine is gone), its slots are free again; it takes no new request
on them by then. A process that only died is known to be dead at once (`meter.loader`)."""
SLOT_SLICES = 8
"""A process gets at most this fraction of the free slots, unless more are waited for."""


class SlotReport(msgspec.Struct, frozen=True):
    """What a process keeps, and what it would like."""

    keep: int
    used: int
    """Requests that are open on these slots."""
    need: int = 0
    """Requests that wait for a slot."""
    want: int = 0
    """Slots that more requests may soon need."""


class SlotGrant(msgspec.Struct, frozen=True):
    """The store's answer to a report."""

    granted: int
    """Negative when the limit was lowered below what is leased."""
    valid: int
    """The last second of the store's clock in which a request may begin on these slots."""
    free: int
    elsewhere: int
    """Slots that other processes have and do not use, as far as is known."""


def grant(limit: int, others: list[tuple[int, int]], report: SlotReport, second: int) -> SlotGrant:
    """Decide on a report, given the (slots, used) of the other processes' leases that are in force."""
    free = limit - report.keep - sum(amount for amount, _ in others)
    granted = max(min(max(report.need, min(report.want, free // SLOT_SLICES)), free), -report.keep)
    spare = sum(max(amount - used, 0) for amount, used in others)
    return SlotGrant(granted, second + LEASE_S, max(free - granted, 0), spare)


class SlotShare:
    """The slots of one limit that one process has.

    Invariant: a request begins only while used < leased. More are used than leased only after the limit was lowered.
    """

    __slots__ = ("_peak", "dirty", "leased", "used", "valid")

    def __init__(self) -> None:
        self.leased = 0
        self.used = 0
        self.valid = -1
        self.dirty = False
        """Something has changed since the last report."""
        self._peak = 0

    def at_hand(self, second: int) -> int:
        """Slots that a request may begin on now."""
        return max(self.leased - self.used, 0) if second <= self.valid else 0

    def take(self, second: int) -> bool:
        """Begin a request; False (and nothing changes) when there is no slot for it."""
        if self.used >= self.leased or second > self.valid:
            return False
        self.used += 1
        self._peak = max(self._peak, self.used)
        self.dirty = True
        return True

    def leave(self) -> None:
        """A request has ended."""
        self.used -= 1
        self.dirty = True

    def report(self, second: int, *, need: int = 0, want: int = 0) -> SlotReport:
        """What to tell the store. Keeps as many slots as were used at a time since the last report."""
        if second > self.valid:
            self.leased = self.used  # the lease has run out; what goes on must count all the same
        self.leased = min(self.leased, max(self._peak, self.used + need))
        self._peak, self.dirty = self.used, False
        missing = max(need - max(self.leased - self.used, 0), 0)
        return SlotReport(self.leased, self.used, missing, want)

    def renewed(self, answer: SlotGrant) -> None:
        """Take over what the store granted."""
        self.leased += answer.granted
        self.valid = answer.valid
