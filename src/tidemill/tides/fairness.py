"""Weighted fair queueing between the tenants of a full model.

Start-time fair queueing (Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996) needs no idea of how fast the
server is, which nobody has of an engine. A tenant's next request may start at the virtual time at which its last one
would have ended, had the tenant its share of the model and no more; the earliest start is next. A tenant that comes
back after a while starts at the present: it has saved up nothing, and owes nothing. Work is counted in tokens, first
as estimated, then as used (as the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024, does).
"""

from collections.abc import Iterable

MAX_FLOWS = 4096
"""Tenants remembered; beyond, those that owe nothing are forgotten."""


class FairClock:
    """The virtual clock of one queue, with the finish time of each flow (a tenant)."""

    __slots__ = ("_ends", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._ends: dict[str, float] = {}

    def start_of(self, flow: str) -> float:
        """The virtual time at which a flow's next request may start."""
        return max(self.now, self._ends.get(flow, 0.0))

    def next_of(self, flows: Iterable[str]) -> str:
        """The flow to serve next; of equals the first. `flows` must not be empty."""
        return min(flows, key=self.start_of)

    def serve(self, flow: str, work: float, weight: float) -> None:
        """Account for a flow's request of so much work that starts."""
        start = self.start_of(flow)
        self.now = start
        self._ends[flow] = start + work / weight
        if len(self._ends) > MAX_FLOWS:
            self._ends = {each: end for each, end in self._ends.items() if end > self.now}

    def correct(self, flow: str, more_work: float, weight: float) -> None:
        """Correct a flow by the difference between a request's actual and assumed work."""
        if flow in self._ends:
            self._ends[flow] += more_work / weight
