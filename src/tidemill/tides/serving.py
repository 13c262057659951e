"""Replicas for interactive requests: they come first."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tidemill.tides.desired_replicas import SERVING, DesiredBatchReplicas, DesiredReplicas, batch_need, replicas_needed
from tidemill.tides.occupancy import ORDINARY, PreemptionCandidate, PreemptionTier
from tidemill.tides.placement import PlacementRequest
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.sleepers import Sleepers
from tidemill.tides.state import LendReplica, ModelView, Phase, ReplicaView, StartReplica, StopReplica

_LIFE = {Phase.STARTING: 0, Phase.WARMING: 1, Phase.READY: 2}
LINE_S = 10.0
"""What a line of a batch that has to be sent again is taken to have cost."""


class Serving:
    """The replicas of the models, sorted by what they are for, and what the models need."""

    def __init__(self, draft: PlanBuilder) -> None:
        self.mine: dict[str, list[ReplicaView]] = defaultdict(list)
        """For interactive requests, by model."""
        self.lent: dict[str, list[ReplicaView]] = defaultdict(list)
        """For batches, by model; the best first."""
        self.broken: list[ReplicaView] = []
        """On a device that is lost or was taken out."""
        self.unknown: list[ReplicaView] = []
        """Of a model that is no longer served."""
        board, models = draft.board, {model.name for model in draft.snapshot.models}
        for replica in draft.snapshot.replicas:
            if replica.phase not in SERVING:
                continue
            views = [board.device.get(device) for device in replica.devices]
            if replica.batch_only and any(
                board.holder.get(device) != f"replica {replica.id}" for device in replica.devices
            ):
                continue  # beside another one, on what that leaves of its devices
            if any(view is None or not view.up for view in views):
                self.broken.append(replica)
            elif replica.model not in models:
                self.unknown.append(replica)
            elif replica.batch_only:
                self.lent[replica.model].append(replica)
            else:
                self.mine[replica.model].append(replica)
        for lent in self.lent.values():
            lent.sort(key=lambda each: (-_LIFE[each.phase], each.filler, each.id))
        self.needs: dict[str, DesiredReplicas] = {
            model.name: replicas_needed(model, self.mine[model.name], draft.now, draft.rules)
            for model in draft.snapshot.models
        }
        backlogs = {backlog.model: backlog for backlog in draft.snapshot.backlogs}
        self.batches: dict[str, DesiredBatchReplicas] = {
            model.name: batch_need(backlogs[model.name], draft.now, model.startup_s, draft.rules)
            for model in draft.snapshot.models
            if model.name in backlogs
        }

    def batch_replicas(self, draft: PlanBuilder, model: ModelView, times: float = 1.0) -> int:
        """Replicas that the deadlines of a model's batches need beside what fits into the interactive ones, at so many
        times the rate that they ask for."""
        need = self.batches.get(model.name)
        if need is None or need.rate <= 0:
            return 0
        if model.capacity <= 0:
            return 0 if self.mine[model.name] else 1
        ready = sum(1 for replica in self.mine[model.name] if replica.phase is Phase.READY)
        idle = max(ready * model.capacity - max(model.now, model.demand.expected), 0.0)
        beside = need.rate * times - idle * draft.rules.batch_inside
        # Rounded, not up: what half a replica would do in time can wait a while yet.
        return max(math.ceil(beside / (model.capacity * draft.rules.batch_gain) - 0.5), 0)


def offer_replicas(draft: PlanBuilder, serving: Serving) -> None:
    """Say which replicas could give way, and at what loss."""
    for model in draft.snapshot.models:
        needed = serving.batch_replicas(draft, model, draft.rules.batch_keep)
        for rank, replica in enumerate(serving.lent[model.name]):
            tier = PreemptionTier.NEEDED_BATCH if rank < needed else PreemptionTier.LENT
            draft.board.offer(_unit(replica, tier, model.priority, replica.filler * LINE_S))
        _offer_mine(draft, serving, model)


def _offer_mine(draft: PlanBuilder, serving: Serving, model: ModelView) -> None:
    """Those for people that could give way: what is not needed, and what is beyond the minimum."""
    need, board = serving.needs[model.name], draft.board
    ordered = in_order_of_leaving(draft, _staying(draft, serving.mine[model.name]), model)
    for rank, replica in enumerate(ordered):
        board.withdraw(f"replica {replica.id}")
        left = len(ordered) - rank - 1
        if left >= need.count:
            board.offer(_unit(replica, PreemptionTier.SURPLUS, model.priority, model.startup_s))
        elif left >= model.min_replicas:
            board.offer(_unit(replica, PreemptionTier.ABOVE_MINIMUM, model.priority, 10 * model.startup_s))


def _staying(draft: PlanBuilder, replicas: Iterable[ReplicaView]) -> list[ReplicaView]:
    """Those that this plan has not told to go."""
    return [each for each in replicas if f"replica {each.id}" not in draft.board.gone]


def _unit(replica: ReplicaView, tier: int, priority: int, loss_s: float) -> PreemptionCandidate:
    return PreemptionCandidate(f"replica {replica.id}", replica.devices, tier, priority, loss_s, replica=replica)


def in_order_of_leaving(draft: PlanBuilder, replicas: Sequence[ReplicaView], model: ModelView) -> list[ReplicaView]:
    """Those that are not ready yet, then the least busy, the youngest; last of all a minimum of them that is on as many
    nodes as it can be."""
    ordered = sorted(replicas, key=lambda each: (_LIFE[each.phase], each.in_flight + each.filler, -each.since, each.id))
    last: list[ReplicaView] = []
    nodes: set[str] = set()
    for replica in reversed(ordered):
        here = _nodes_of(draft, replica.devices)
        if len(last) < model.min_replicas and replica.phase is Phase.READY and not here & nodes:
            last.append(replica)
            nodes |= here
    return [each for each in ordered if each not in last] + last[::-1]


def _nodes_of(draft: PlanBuilder, devices: Iterable[str]) -> frozenset[str]:
    views = (draft.board.device.get(device) for device in devices)
    return frozenset(view.node for view in views if view is not None)


def give_up(draft: PlanBuilder, serving: Serving) -> None:
    """Stop the replicas that nobody needs, or lend them to batches that have work for them; take those back that people
    need again."""
    for replica in serving.unknown:
        draft.evict(_unit(replica, PreemptionTier.SURPLUS, 0, 0.0), f"{replica.model} is no longer served")
    for model in draft.snapshot.models:
        need, mine = serving.needs[model.name], serving.mine[model.name]
        batch = serving.batches.get(model.name, DesiredBatchReplicas())
        here = _staying(draft, mine)
        for replica in in_order_of_leaving(draft, here, model)[: max(len(here) - need.keep, 0)]:
            mine.remove(replica)
            if draft.rules.turn and batch.work > 0 and replica.phase is Phase.READY:
                why = f"lent to batches of {model.name}; {need.count} replicas are enough: {need.why}"
                draft.turn_replicas[replica.id] = LendReplica(replica.id, True, why)
                serving.lent[model.name].append(replica)
                draft.board.withdraw(f"replica {replica.id}")
                draft.board.offer(_unit(replica, PreemptionTier.LENT, model.priority, replica.filler * LINE_S))
            else:
                why = f"{need.count} of {len(here)} replicas are enough: {need.why}"
                draft.evict(_unit(replica, PreemptionTier.SURPLUS, 0, 0.0), why)
        _take_back(draft, serving, model)
        for replica in _staying(draft, serving.lent[model.name]):
            if batch.work <= 0 and replica.filler == 0:
                serving.lent[model.name].remove(replica)
                draft.evict(
                    _unit(replica, PreemptionTier.LENT, 0, 0.0), f"no lines of batches for {model.name} are left"
                )


def serve_people(draft: PlanBuilder, serving: Serving, sleepers: Sleepers) -> None:
    """Start replicas where a model has too few; make others give way for them."""
    claims: list[tuple[tuple[bool, int, bool, float, str, int], ModelView]] = []
    on: dict[str, frozenset[str]] = {}
    """The nodes that the replicas of a model are on, or will be."""
    for model in draft.snapshot.models:
        need = serving.needs[model.name]
        have = len(_staying(draft, serving.mine[model.name]))
        on[model.name] = _nodes_of(draft, (device for each in serving.mine[model.name] for device in each.devices))
        for rank in range(have, need.count):
            order = (
                rank >= model.min_replicas,
                -model.priority,
                not model.waiting,
                rank / need.count,
                model.name,
                rank,
            )
            claims.append((order, model))
    refused: dict[str, int] = defaultdict(int)
    started: dict[str, int] = defaultdict(int)
    late: dict[str, int] = defaultdict(int)
    for order, model in sorted(claims, key=lambda each: each[0]):
        if refused[model.name]:
            refused[model.name] += 1
            continue
        below_minimum = not order[0]

        def may(unit: PreemptionCandidate, below_minimum: bool = below_minimum, model: ModelView = model) -> bool:
            if unit.replica is not None and unit.replica.model == model.name:
                return unit.tier in (PreemptionTier.LENT, PreemptionTier.NEEDED_BATCH)
            return unit.tier != PreemptionTier.ABOVE_MINIMUM or below_minimum

        work, need = f"model {model.name}", serving.needs[model.name]
        # One node's loss shall not take all of a minimum; what is beyond it is packed, so that gangs find whole nodes.
        apart = on[model.name] if below_minimum else frozenset()
        claim = PlacementRequest(work, model.devices, model.kinds, spans=model.spans, apart=apart, may=may)
        grant = sleepers.place(claim, model.name)
        if grant is None:
            refused[model.name] += 1
            continue
        on[model.name] |= _nodes_of(draft, grant.devices)
        if draft.give(grant, work, f"{model.name} needs {need.count} replicas: {need.why}"):
            wake = sleepers.on(model.name, grant.devices)
            draft.start_replicas.append(StartReplica(model.name, grant.devices, need.why, wake=wake))
            started[model.name] += 1
        else:
            late[model.name] += 1
    _say_who_waits(draft, serving, refused, late)
    _let_broken_go(draft, serving)


def _take_back(draft: PlanBuilder, serving: Serving, model: ModelView) -> None:
    """Replicas lent to batches are taken back where people lack some, which takes no time: for the minimum those on
    other nodes rather than those beside the ones that people have."""
    need, here = serving.needs[model.name], _staying(draft, serving.mine[model.name])
    missing = need.count - len(here)
    if not draft.rules.turn or missing <= 0:
        return
    usable = [
        each
        for each in _staying(draft, serving.lent[model.name])
        if all(draft.board.zone[device] == ORDINARY for device in each.devices)  # a tenant lends to batches only
    ]
    nodes = _nodes_of(draft, (device for each in here for device in each.devices))
    taken = min(len(usable), missing)
    for rank in range(len(here), len(here) + taken):
        beside = [bool(nodes & _nodes_of(draft, each.devices)) for each in usable]
        replica = usable.pop(beside.index(False) if rank < model.min_replicas and False in beside else 0)
        nodes |= _nodes_of(draft, replica.devices)
        serving.lent[model.name].remove(replica)
        serving.mine[model.name].append(replica)
        if draft.turn_replicas.pop(replica.id, None) is None:
            draft.turn_replicas[replica.id] = LendReplica(replica.id, False, need.why)
    _offer_mine(draft, serving, model)


def _say_who_waits(draft: PlanBuilder, serving: Serving, refused: Mapping[str, int], late: Mapping[str, int]) -> None:
    for model in draft.snapshot.models:
        need = serving.needs[model.name]
        kinds = " or ".join(model.kinds) or "any kind"
        where = "one node, or equal parts of several," if model.spans else "one node"
        size = "1 device" if model.devices == 1 else f"{model.devices} devices of {where}"
        if refused[model.name]:
            draft.wait(
                f"model {model.name}",
                f"{refused[model.name]} more replicas of {size} each ({kinds}), to have {need.count}: {need.why}; "
                "nothing is free and nothing that holds such devices may be made to give way",
            )
        if late[model.name]:
            draft.wait(
                f"model {model.name}",
                f"devices that are being given back, for {late[model.name]} more replicas, to have {need.count}: "
                f"{need.why}",
            )


def _let_broken_go(draft: PlanBuilder, serving: Serving) -> None:
    """A replica on a device that was taken out serves until there are others."""
    for replica in serving.broken:
        need = serving.needs.get(replica.model)
        ready = sum(1 for each in serving.mine[replica.model] if each.phase is Phase.READY)
        if need is None or replica.batch_only or ready >= need.count:
            draft.stop_replicas.append(
                StopReplica(replica.id, "a device that it is on was taken out or lost, and others serve")
            )
