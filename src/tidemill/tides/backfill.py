"""Batches: replicas for their deadlines, and replicas on what everybody else leaves."""

import heapq

from tidemill.tides.desired_replicas import DesiredBatchReplicas
from tidemill.tides.occupancy import PreemptionCandidate, PreemptionTier
from tidemill.tides.placement import PlacementRequest, place
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.reservations import lendable
from tidemill.tides.serving import Serving
from tidemill.tides.state import ModelView, StartReplica


def keep_deadlines(draft: PlanBuilder, serving: Serving) -> None:
    """Start replicas for batches that would miss their deadlines. Jobs that borrow, and whose own deadlines do not
    press, give way once they have run for a while."""

    def may(unit: PreemptionCandidate) -> bool:
        if unit.job is None:
            return unit.tier == PreemptionTier.LENT
        settled = draft.now - unit.job.started_at >= draft.rules.min_run_s
        return unit.tier == PreemptionTier.JOB and settled and draft.queues[unit.job.queue].borrowing

    for model in draft.snapshot.models:
        need = serving.batches.get(model.name)
        if need is None:
            continue
        wanted = serving.batch_replicas(draft, model)
        have = _lent(draft, serving, model)
        room = model.max_replicas - len(serving.mine[model.name]) - _starting(draft, model)
        missing = min(wanted, max(room, 0)) - have
        why = _deadline_in_words(need, draft.now)
        for _ in range(missing):
            work = f"batches of {model.name}"
            zones = lendable(draft)
            claim = PlacementRequest(
                work, model.devices, model.kinds, spans=model.spans, zones=zones, kept=False, may=may
            )
            grant = place(draft.board, claim)
            if grant is None:
                draft.wait(work, f"devices for {missing} replicas: {why}; nobody gives way to them")
                break
            missing -= 1
            if draft.give(grant, work, why):
                draft.start_replicas.append(StartReplica(model.name, grant.devices, why, batch_only=True))
            else:
                draft.wait(work, f"devices that are being given back: {why}")


def fill(draft: PlanBuilder, serving: Serving) -> None:
    """Give what is left to batches, where it pays to load a model for them."""
    board, rules = draft.board, draft.rules
    heap: list[tuple[float, str, int]] = []
    models = {model.name: model for model in draft.snapshot.models}
    for model in models.values():
        need = serving.batches.get(model.name)
        if need is None or need.work <= 0:
            continue
        have = _lent(draft, serving, model)
        heap.append((_weight(model, need, have), model.name, have))
    heapq.heapify(heap)
    while heap:
        _, name, have = heapq.heappop(heap)
        model, need = models[name], serving.batches[name]
        total = len(serving.mine[name]) + _starting(draft, model) + have
        if total >= model.max_replicas or not _worth(model, need, have + 1, rules.batch_worth, rules.batch_gain):
            continue
        # What waits for a gang to come together may be used until then, what is coming is not waited for.
        zones = lendable(draft)
        held = PlacementRequest(
            f"batches of {name}", model.devices, model.kinds, spans=model.spans, zones=zones, held=True
        )
        grant = place(board, held)
        if grant is None:
            continue
        if grant.ready:
            why = f"{need.work:,.0f} tokens of batches are left, and nobody else wants these devices"
            draft.start_replicas.append(StartReplica(name, grant.devices, why, batch_only=True))
        else:
            draft.promise(grant.devices, f"batches of {name}")
        heapq.heappush(heap, (_weight(model, need, have + 1), name, have + 1))


def _lent(draft: PlanBuilder, serving: Serving, model: ModelView) -> int:
    here = sum(1 for each in serving.lent[model.name] if f"replica {each.id}" not in draft.board.gone)
    return here + sum(1 for each in draft.start_replicas if each.model == model.name and each.batch_only)


def _starting(draft: PlanBuilder, model: ModelView) -> int:
    return sum(1 for each in draft.start_replicas if each.model == model.name and not each.batch_only)


def _weight(model: ModelView, need: DesiredBatchReplicas, have: int) -> float:
    """The least goes first: the model with the most time that its batches still take, at the rate that they need."""
    return (have + 1) * max(model.capacity, 1.0) / max(need.rate, 1e-9)


def _worth(model: ModelView, need: DesiredBatchReplicas, replicas: int, worth: float, gain: float) -> bool:
    """Whether so many replicas for batches are kept busy for a good while after they have started."""
    if model.capacity <= 0:
        return replicas <= 1
    return need.work >= replicas * model.capacity * gain * worth * model.startup_s


def _deadline_in_words(need: DesiredBatchReplicas, now: float) -> str:
    if need.deadline is None:
        return f"{need.work:,.0f} tokens of batches"
    hours = (need.deadline - now) / 3600
    return f"{need.work:,.0f} tokens of batches, a deadline in {hours:.1f} h asks for {need.rate:,.0f} a second"
