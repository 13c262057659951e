"""Batch replicas: for deadlines, and as backfill on idle devices."""

import heapq

from tidemill.tides.desired_replicas import DesiredBatchReplicas
from tidemill.tides.placement import PlacementRequest, place
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.preemption import preemptible_by_batches
from tidemill.tides.reservations import lendable
from tidemill.tides.serving import Serving
from tidemill.tides.state import ModelView, StartReplica


def keep_deadlines(builder: PlanBuilder, serving: Serving) -> None:
    """Start replicas for batches that would miss their deadlines. Jobs that borrow and are not urgent are
    preempted for them once they have run for a while."""
    may_preempt = preemptible_by_batches(builder.queues, builder.now, builder.rules)
    for model in builder.snapshot.models:
        need = serving.batches.get(model.name)
        if need is None:
            continue
        wanted = serving.batch_replicas(builder, model)
        have = _lent(builder, serving, model)
        room = model.max_replicas - len(serving.interactive[model.name]) - _starting(builder, model)
        missing = min(wanted, max(room, 0)) - have
        why = _deadline_in_words(need, builder.now)
        for _ in range(missing):
            work = f"batches of {model.name}"
            zones = lendable(builder)
            request = PlacementRequest(
                work, model.devices, model.kinds, spans=model.spans, zones=zones, kept=False, may_preempt=may_preempt
            )
            placement = place(builder.occupancy, request)
            if placement is None:
                builder.wait(work, f"devices for {missing} replicas: {why}; nobody may be preempted for them")
                break
            missing -= 1
            if builder.give(placement, work, why):
                builder.start_replicas.append(StartReplica(model.name, placement.devices, why, batch_only=True))
            else:
                builder.wait(work, f"devices that are being given back: {why}")


def fill(builder: PlanBuilder, serving: Serving) -> None:
    """Start batch replicas on idle devices, where loading a model is worth it."""
    occupancy, rules = builder.occupancy, builder.rules
    heap: list[tuple[float, str, int]] = []
    models = {model.name: model for model in builder.snapshot.models}
    for model in models.values():
        need = serving.batches.get(model.name)
        if need is None or need.work <= 0:
            continue
        have = _lent(builder, serving, model)
        heap.append((_weight(model, need, have), model.name, have))
    heapq.heapify(heap)
    while heap:
        _, name, have = heapq.heappop(heap)
        model, need = models[name], serving.batches[name]
        total = len(serving.interactive[name]) + _starting(builder, model) + have
        if total >= model.max_replicas or not _worth(model, need, have + 1, rules.batch_worth, rules.batch_gain):
            continue
        # What waits for a gang to come together may be used until then, what is coming is not waited for.
        zones = lendable(builder)
        held = PlacementRequest(
            f"batches of {name}", model.devices, model.kinds, spans=model.spans, zones=zones, held=True
        )
        placement = place(occupancy, held)
        if placement is None:
            continue
        if placement.ready:
            why = f"{need.work:,.0f} tokens of batches are left, and nobody else wants these devices"
            builder.start_replicas.append(StartReplica(name, placement.devices, why, batch_only=True))
        else:
            builder.promise(placement.devices, f"batches of {name}")
        heapq.heappush(heap, (_weight(model, need, have + 1), name, have + 1))


def _lent(builder: PlanBuilder, serving: Serving, model: ModelView) -> int:
    here = sum(1 for each in serving.lent[model.name] if f"replica {each.id}" not in builder.occupancy.gone)
    return here + sum(1 for each in builder.start_replicas if each.model == model.name and each.batch_only)


def _starting(builder: PlanBuilder, model: ModelView) -> int:
    return sum(1 for each in builder.start_replicas if each.model == model.name and not each.batch_only)


def _weight(model: ModelView, need: DesiredBatchReplicas, have: int) -> float:
    """The sort key of models to fill; the lowest goes first.

    That is the model with the most time that its batches still take, at the rate that they need.
    """
    return (have + 1) * max(model.capacity, 1.0) / max(need.rate, 1e-9)


def _worth(model: ModelView, need: DesiredBatchReplicas, replicas: int, worth: float, gain: float) -> bool:
    """True if the backlog keeps so many batch replicas busy long enough after their start."""
    if model.capacity <= 0:
        return replicas <= 1
    return need.work >= replicas * model.capacity * gain * worth * model.startup_s


def _deadline_in_words(need: DesiredBatchReplicas, now: float) -> str:
    if need.deadline is None:
        return f"{need.work:,.0f} tokens of batches"
    hours = (need.deadline - now) / 3600
    return f"{need.work:,.0f} tokens of batches, a deadline in {hours:.1f} h asks for {need.rate:,.0f} a second"
