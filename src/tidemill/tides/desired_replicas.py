"""The number of replicas that interactive requests and batch deadlines need."""

import math
from collections.abc import Sequence

import msgspec

from tidemill.tides.rules import Rules
from tidemill.tides.state import BacklogView, ModelView, Phase, ReplicaView

UNKNOWN_SLOTS = 8
"""Requests that a replica is taken to work on at a time when nobody has said."""
SERVING = (Phase.STARTING, Phase.WARMING, Phase.READY)
"""Phases of replicas that serve, or will."""


class DesiredReplicas(msgspec.Struct, frozen=True, gc=False):
    """The desired number of interactive replicas of a model, and why."""

    count: int
    keep: int
    """It gives up those beyond these; at least `count`."""
    why: str


def replicas_needed(model: ModelView, serving: Sequence[ReplicaView], now: float, rules: Rules) -> DesiredReplicas:
    """The desired replicas of a model that has these interactive ones (starting ones included).

    The work that is expected or comes now, at the share of a replica's capacity that is planned with; more when
    requests wait or miss the objective; never fewer than the minimum, nor more than the maximum. On the way down,
    what was needed in the last `scale_down_s` counts.
    """
    have = len(serving)
    ready = sum(1 for replica in serving if replica.phase is Phase.READY)
    work = max(model.now, model.demand.high)
    floor, ceiling = model.min_replicas, max(model.max_replicas, model.min_replicas)
    count, why = floor, f"at least {floor}"
    by_work = _by_work(model, work, have, rules)
    if by_work > count:
        count, why = by_work, _work_in_words(model, work)
    if model.waiting > 0:
        slots = model.slots or UNKNOWN_SLOTS
        fresh = any(r.phase is Phase.READY and now - r.since < rules.wait_settle_s for r in serving)
        waiting = max(ready + math.ceil(model.waiting / slots), 1) if not fresh else max(have, 1)
        if waiting > count:
            count, why = waiting, f"{_requests(model.waiting)} for a replica or a place"
    elif _too_late(model, serving, now, ready, rules) and ready + 1 > count:
        allowed = 1 - model.objective.percentile
        count, why = ready + 1, f"{model.late:.1%} of its requests miss the objective, {allowed:.1%} may"
    if count > ceiling:
        count, why = ceiling, f"{why}, at most {ceiling} allowed"
    return DesiredReplicas(count, min(max(_keep(model, serving, have, now, rules), count), ceiling), why)


def _by_work(model: ModelView, work: float, have: int, rules: Rules) -> int:
    if model.capacity > 0:
        if have == 0 and model.min_replicas == 0 and work < rules.wake_share * model.capacity:
            return 0
        return math.ceil(work / (model.capacity * rules.target) - 1e-9)
    return min(max(have, 1), max(model.max_replicas, 1)) if work > 0 else 0  # what one can do is not known yet


def _too_late(model: ModelView, serving: Sequence[ReplicaView], now: float, ready: int, rules: Rules) -> bool:
    """True if missed objectives call for one more replica.

    The last one has settled, and the others are busy.
    """
    if model.late <= 1 - model.objective.percentile + 1e-9 or ready < len(serving) or ready == 0:
        return False
    if any(now - replica.since < rules.late_settle_s for replica in serving):
        return False
    return model.capacity <= 0 or model.now >= rules.late_load * model.capacity * ready


def _keep(model: ModelView, serving: Sequence[ReplicaView], have: int, now: float, rules: Rules) -> int:
    """The number of existing replicas that a model keeps."""
    if model.late > (1 - model.objective.percentile) / 2 and model.idle_s < model.scale_down_s:
        return have  # with fewer it would get worse
    work = max(model.now, model.demand.high)
    if model.peak is not None:
        work = max(work, model.peak)
    elif any(now - replica.since < model.scale_down_s for replica in serving):
        return have
    if model.capacity > 0:
        keep = math.ceil(work / (model.capacity * rules.keep_target) - 1e-9)
    else:
        keep = have if work > 0 or model.idle_s < model.scale_down_s else 0
    if model.idle_s < model.scale_down_s or model.waiting > 0:
        keep = max(keep, 1)
    elif model.now <= 0 and model.demand.high < rules.wake_share * model.capacity:
        keep = 0
    return min(max(keep, model.min_replicas), have)


def _work_in_words(model: ModelView, work: float) -> str:
    source = "expected" if model.demand.high > model.now else "coming now"
    if model.capacity > 0:
        return f"{work:,.0f} tokens/s of work {source}, one replica does {model.capacity:,.0f}"
    return f"{work:,.0f} tokens/s of work {source}"


def _requests(count: int) -> str:
    return "1 request waits" if count == 1 else f"{count} requests wait"


class DesiredBatchReplicas(msgspec.Struct, frozen=True, gc=False):
    """The replicas that a model's batches need."""

    work: float = 0.0
    """Left to do, tokens of prefill."""
    rate: float = 0.0
    """Work a second that keeps every deadline."""
    deadline: float | None = None
    """The one that asks for this rate."""


def batch_need(backlog: BacklogView, now: float, startup_s: float, rules: Rules) -> DesiredBatchReplicas:
    """The work of a model's batches, and the rate at which their deadlines hold.

    Earliest deadline first: for each deadline, all that is due by then has to be done in the part of the time that is
    meant for it.
    """
    total, rate = 0.0, 0.0
    urgent: float | None = None
    for work, deadline in sorted(backlog.parts, key=lambda part: part[1]):
        total += work
        left_s = max((deadline - now) * rules.batch_margin - startup_s, 1.0)
        if deadline > now and total / left_s > rate:  # what has expired asks for nothing
            rate, urgent = total / left_s, deadline
        elif deadline <= now:
            total -= work
    return DesiredBatchReplicas(total, rate, urgent)
