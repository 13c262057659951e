"""Replicas for interactive requests, which come first."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tidemill.tides.desired_replicas import SERVING, DesiredBatchReplicas, DesiredReplicas, batch_need, replicas_needed
from tidemill.tides.occupancy import ORDINARY
from tidemill.tides.placement import PlacementRequest
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.preemption import PreemptionTier, preemptible_by_model, replica_candidate
from tidemill.tides.sleepers import Sleepers
from tidemill.tides.state import LendReplica, ModelView, Phase, ReplicaView, StartReplica, StopReplica

_PHASE_ORDER = {Phase.STARTING: 0, Phase.WARMING: 1, Phase.READY: 2}
LINE_S = 10.0
"""What a line of a batch that has to be sent again is taken to have cost."""


class Serving:
    """The models' replicas by purpose, and the models' needs."""

    def __init__(self, builder: PlanBuilder) -> None:
        self.interactive: dict[str, list[ReplicaView]] = defaultdict(list)
        """For interactive requests, by model."""
        self.lent: dict[str, list[ReplicaView]] = defaultdict(list)
        """For batches, by model; the best first."""
        self.broken: list[ReplicaView] = []
        """On a device that is lost or was taken out."""
        self.unknown: list[ReplicaView] = []
        """Of a model that is no longer served."""
        occupancy, models = builder.occupancy, {model.name for model in builder.snapshot.models}
        for replica in builder.snapshot.replicas:
            if replica.phase not in SERVING:
                continue
            views = [occupancy.device.get(device) for device in replica.devices]
            if replica.batch_only and any(
                occupancy.holder.get(device) != f"replica {replica.id}" for device in replica.devices
            ):
                continue  # beside another one, on what that leaves of its devices
            if any(view is None or not view.up for view in views):
                self.broken.append(replica)
            elif replica.model not in models:
                self.unknown.append(replica)
            elif replica.batch_only:
                self.lent[replica.model].append(replica)
            else:
                self.interactive[replica.model].append(replica)
        for lent in self.lent.values():
            lent.sort(key=lambda each: (-_PHASE_ORDER[each.phase], each.filler, each.id))
        self.needs: dict[str, DesiredReplicas] = {
            model.name: replicas_needed(model, self.interactive[model.name], builder.now, builder.rules)
            for model in builder.snapshot.models
        }
        backlogs = {backlog.model: backlog for backlog in builder.snapshot.backlogs}
        self.batches: dict[str, DesiredBatchReplicas] = {
            model.name: batch_need(backlogs[model.name], builder.now, model.startup_s, builder.rules)
            for model in builder.snapshot.models
            if model.name in backlogs
        }

    def batch_replicas(self, builder: PlanBuilder, model: ModelView, times: float = 1.0) -> int:
        """The number of batch replicas that deadlines need beside the interactive ones.

        At so many times the rate that they ask for.
        """
        need = self.batches.get(model.name)
        if need is None or need.rate <= 0:
            return 0
        if model.capacity <= 0:
            return 0 if self.interactive[model.name] else 1
        ready = sum(1 for replica in self.interactive[model.name] if replica.phase is Phase.READY)
        idle = max(ready * model.capacity - max(model.now, model.demand.expected), 0.0)
        missing = need.rate * times - idle * builder.rules.batch_inside
        # Rounded, not up: what half a replica would do in time can wait a while yet.
        return max(math.ceil(missing / (model.capacity * builder.rules.batch_gain) - 0.5), 0)


def offer_replicas(builder: PlanBuilder, serving: Serving) -> None:
    """Offer replicas for preemption, with their losses."""
    for model in builder.snapshot.models:
        needed = serving.batch_replicas(builder, model, builder.rules.batch_keep)
        for rank, replica in enumerate(serving.lent[model.name]):
            tier = PreemptionTier.NEEDED_BATCH if rank < needed else PreemptionTier.LENT
            builder.occupancy.offer(replica_candidate(replica, tier, model.priority, replica.filler * LINE_S))
        _offer_interactive(builder, serving, model)


def _offer_interactive(builder: PlanBuilder, serving: Serving, model: ModelView) -> None:
    """Offer interactive replicas for preemption: unneeded ones, and those above the minimum."""
    need, occupancy = serving.needs[model.name], builder.occupancy
    ordered = in_order_of_leaving(builder, _staying(builder, serving.interactive[model.name]), model)
    for rank, replica in enumerate(ordered):
        occupancy.withdraw(f"replica {replica.id}")
        left = len(ordered) - rank - 1
        if left >= need.count:
            occupancy.offer(replica_candidate(replica, PreemptionTier.SURPLUS, model.priority, model.startup_s))
        elif left >= model.min_replicas:
            occupancy.offer(
                replica_candidate(replica, PreemptionTier.ABOVE_MINIMUM, model.priority, 10 * model.startup_s)
            )


def _staying(builder: PlanBuilder, replicas: Iterable[ReplicaView]) -> list[ReplicaView]:
    """The replicas that this plan does not stop."""
    return [each for each in replicas if f"replica {each.id}" not in builder.occupancy.gone]


def in_order_of_leaving(builder: PlanBuilder, replicas: Sequence[ReplicaView], model: ModelView) -> list[ReplicaView]:
    """The order of scaling down: not ready first, then the least busy, then the youngest.

    Last of all a minimum of them that is on as many nodes as it can be.
    """
    ordered = sorted(
        replicas, key=lambda each: (_PHASE_ORDER[each.phase], each.in_flight + each.filler, -each.since, each.id)
    )
    last: list[ReplicaView] = []
    nodes: set[str] = set()
    for replica in reversed(ordered):
        here = _nodes_of(builder, replica.devices)
        if len(last) < model.min_replicas and replica.phase is Phase.READY and not here & nodes:
            last.append(replica)
            nodes |= here
    return [each for each in ordered if each not in last] + last[::-1]


def _nodes_of(builder: PlanBuilder, devices: Iterable[str]) -> frozenset[str]:
    views = (builder.occupancy.device.get(device) for device in devices)
    return frozenset(view.node for view in views if view is not None)


def scale_down(builder: PlanBuilder, serving: Serving) -> None:
    """Stop replicas that are not needed, or lend them to batches with work.

    Take those back that people need again.
    """
    for replica in serving.unknown:
        builder.evict(
            replica_candidate(replica, PreemptionTier.SURPLUS, 0, 0.0), f"{replica.model} is no longer served"
        )
    for model in builder.snapshot.models:
        need, interactive = serving.needs[model.name], serving.interactive[model.name]
        batch = serving.batches.get(model.name, DesiredBatchReplicas())
        here = _staying(builder, interactive)
        for replica in in_order_of_leaving(builder, here, model)[: max(len(here) - need.keep, 0)]:
            interactive.remove(replica)
            if builder.rules.lend_replicas and batch.work > 0 and replica.phase is Phase.READY:
                why = f"lent to batches of {model.name}; {need.count} replicas are enough: {need.why}"
                builder.lend_replicas[replica.id] = LendReplica(replica.id, True, why)
                serving.lent[model.name].append(replica)
                builder.occupancy.withdraw(f"replica {replica.id}")
                builder.occupancy.offer(
                    replica_candidate(replica, PreemptionTier.LENT, model.priority, replica.filler * LINE_S)
                )
            else:
                why = f"{need.count} of {len(here)} replicas are enough: {need.why}"
                builder.evict(replica_candidate(replica, PreemptionTier.SURPLUS, 0, 0.0), why)
        _take_back(builder, serving, model)
        for replica in _staying(builder, serving.lent[model.name]):
            if batch.work <= 0 and replica.filler == 0:
                serving.lent[model.name].remove(replica)
                builder.evict(
                    replica_candidate(replica, PreemptionTier.LENT, 0, 0.0),
                    f"no lines of batches for {model.name} are left",
                )


def scale_up(builder: PlanBuilder, serving: Serving, sleepers: Sleepers) -> None:
    """Start replicas for models that have too few, preempting others for them."""
    claims: list[tuple[tuple[bool, int, bool, float, str, int], ModelView]] = []
    on: dict[str, frozenset[str]] = {}
    """The nodes that the replicas of a model are on, or will be."""
    for model in builder.snapshot.models:
        need = serving.needs[model.name]
        have = len(_staying(builder, serving.interactive[model.name]))
        on[model.name] = _nodes_of(
            builder, (device for each in serving.interactive[model.name] for device in each.devices)
        )
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
        work, need = f"model {model.name}", serving.needs[model.name]
        # One node's loss shall not take all of a minimum; what is beyond it is packed, so that gangs find whole nodes.
        apart = on[model.name] if below_minimum else frozenset()
        request = PlacementRequest(
            work,
            model.devices,
            model.kinds,
            spans=model.spans,
            apart=apart,
            may_preempt=preemptible_by_model(model, below_minimum=below_minimum),
        )
        placement = sleepers.place(request, model.name)
        if placement is None:
            refused[model.name] += 1
            continue
        on[model.name] |= _nodes_of(builder, placement.devices)
        if builder.give(placement, work, f"{model.name} needs {need.count} replicas: {need.why}"):
            wake = sleepers.on(model.name, placement.devices)
            builder.start_replicas.append(StartReplica(model.name, placement.devices, need.why, wake=wake))
            started[model.name] += 1
        else:
            late[model.name] += 1
    _say_who_waits(builder, serving, refused, late)
    _let_broken_go(builder, serving)


def _take_back(builder: PlanBuilder, serving: Serving, model: ModelView) -> None:
    """Take back replicas lent to batches where interactive requests need them; it takes no time.

    For the minimum those on other nodes rather than those beside the ones that people have.
    """
    need, here = serving.needs[model.name], _staying(builder, serving.interactive[model.name])
    missing = need.count - len(here)
    if not builder.rules.lend_replicas or missing <= 0:
        return
    usable = [
        each
        for each in _staying(builder, serving.lent[model.name])
        if all(builder.occupancy.zone[device] == ORDINARY for device in each.devices)  # a tenant lends to batches only
    ]
    nodes = _nodes_of(builder, (device for each in here for device in each.devices))
    taken = min(len(usable), missing)
    for rank in range(len(here), len(here) + taken):
        shares = [bool(nodes & _nodes_of(builder, each.devices)) for each in usable]
        replica = usable.pop(shares.index(False) if rank < model.min_replicas and False in shares else 0)
        nodes |= _nodes_of(builder, replica.devices)
        serving.lent[model.name].remove(replica)
        serving.interactive[model.name].append(replica)
        if builder.lend_replicas.pop(replica.id, None) is None:
            builder.lend_replicas[replica.id] = LendReplica(replica.id, False, need.why)
    _offer_interactive(builder, serving, model)


def _say_who_waits(builder: PlanBuilder, serving: Serving, refused: Mapping[str, int], late: Mapping[str, int]) -> None:
    for model in builder.snapshot.models:
        need = serving.needs[model.name]
        kinds = " or ".join(model.kinds) or "any kind"
        where = "one node, or equal parts of several," if model.spans else "one node"
        size = "1 device" if model.devices == 1 else f"{model.devices} devices of {where}"
        if refused[model.name]:
            builder.wait(
                f"model {model.name}",
                f"{refused[model.name]} more replicas of {size} each ({kinds}), to have {need.count}: {need.why}; "
                "nothing is free, and nobody that holds such devices may be preempted",
            )
        if late[model.name]:
            builder.wait(
                f"model {model.name}",
                f"devices that are being given back, for {late[model.name]} more replicas, to have {need.count}: "
                f"{need.why}",
            )


def _let_broken_go(builder: PlanBuilder, serving: Serving) -> None:
    """Stop replicas on drained devices once others are ready."""
    for replica in serving.broken:
        need = serving.needs.get(replica.model)
        ready = sum(1 for each in serving.interactive[replica.model] if each.phase is Phase.READY)
        if need is None or replica.batch_only or ready >= need.count:
            builder.stop_replicas.append(
                StopReplica(replica.id, "a device that it is on was taken out or lost, and others serve")
            )
