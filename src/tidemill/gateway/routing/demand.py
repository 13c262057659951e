"""Each model's traffic in one gateway process, as input of the planner.

Counts since the last report.

The hot path adds integers; nothing is kept for a single request.
"""

import msgspec

from tidemill.ledger.usage import DELIVERED, RequestStatus
from tidemill.meter.records import Settled
from tidemill.tides.buckets import Buckets, bucket_of
from tidemill.tides.routing import POLICY
from tidemill.tides.state import Objective

_DELIVERED = frozenset(status.value for status in DELIVERED)
_LOST = frozenset((RequestStatus.ENGINE_LOST.value, RequestStatus.ENGINE_ERROR.value))


class ModelSeen(msgspec.Struct):
    """One model's traffic since the last report, without lines of batches."""

    arrivals: int = 0
    """Interactive requests that were admitted."""
    work: int = 0
    """Work that they are, in tokens of prefill: as expected when they come, corrected when they end. So it may be
    below zero in one report."""
    ended: int = 0
    """Those that ended with an answer, or for want of one."""
    late: int = 0
    """Those of them that missed the objective."""
    ttft: Buckets = {}
    """Time to first token: how many in each bucket (`tides.buckets`, microseconds)."""
    tpot: Buckets = {}
    """Time per output token after the first, likewise."""


class ReplicaUse(msgspec.Struct):
    """The work of a gateway process at a replica: in flight, and done."""

    people: int = 0
    """Interactive requests in flight."""
    filler: int = 0
    """Lines of batches in flight."""
    done: int = 0
    """Work that has ended there since the last report, in tokens of prefill, lines included."""


class DemandReport(msgspec.Struct):
    """A gateway process's report to the planner."""

    replicas: dict[str, ReplicaUse] = {}
    seen: dict[str, ModelSeen] = {}


class DemandCounter:
    """The running counts of one model in one gateway process."""

    __slots__ = ("_seen", "_tpot_us", "_ttft_us")

    def __init__(self, objective: Objective) -> None:
        self._seen = ModelSeen()
        self.aim(objective)

    def aim(self, objective: Objective) -> None:
        """Set the objective that latencies are measured against."""
        self._ttft_us = round(objective.ttft_s * 1e6)
        self._tpot_us = round(objective.tpot_s * 1e6)

    def arrived(self, work: int) -> None:
        """Count an interactive request that was sent to an engine, with its expected work."""
        self._seen.arrivals += 1
        self._seen.work += work

    def ended(self, expected: int, settled: Settled, waited_us: int) -> None:
        """Count an ended request. `waited_us`: the time that it waited before admission."""
        seen = self._seen
        seen.work += work_done(settled) - expected
        if settled.status not in _DELIVERED:
            if settled.status in _LOST:
                seen.ended += 1
                seen.late += 1
            return
        seen.ended += 1
        first_us = settled.first_token_us
        if not first_us:
            return  # a whole answer of an upstream, or vectors: nobody saw its first token
        ttft_us = first_us - settled.opened.started_us + waited_us
        late = ttft_us > self._ttft_us
        bucket = bucket_of(ttft_us)
        seen.ttft[bucket] = seen.ttft.get(bucket, 0) + 1
        if settled.completion > 1:
            tpot_us = (settled.finished_us - first_us) // (settled.completion - 1)
            late = late or tpot_us > self._tpot_us
            bucket = bucket_of(tpot_us)
            seen.tpot[bucket] = seen.tpot.get(bucket, 0) + 1
        seen.late += late

    def take(self) -> ModelSeen | None:
        """The traffic since the last call; None if there was none."""
        seen = self._seen
        if not (seen.arrivals or seen.ended or seen.work):
            return None
        self._seen = ModelSeen()
        return seen


def work_done(settled: Settled) -> int:
    """The work of a request, in tokens of prefill."""
    return settled.prompt - settled.cached + POLICY.decode_weight * settled.completion
