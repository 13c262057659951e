"""The tide, and what it is compared with: policies that the simulated fleet can be run by.

The base lines decide by the same functions, robbed of what they don't have, so that differences are those of the
policy and not of the care with which it was written down.
"""

from collections.abc import Callable, Mapping

import msgspec

from tidemill.tides.plan import plan
from tidemill.tides.rules import Rules
from tidemill.tides.state import Demand, FleetSnapshot, ModelView, Plan

Decide = Callable[[FleetSnapshot], Plan]


class SchedulingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How a fleet is run."""

    name: str
    decide: Decide
    filler: bool = False
    """Lines of batches enter interactive replicas as slack allows."""
    forecast: bool = False
    work: bool = True
    """There are batches and jobs at all."""


def tide(rules: Rules) -> SchedulingPolicy:
    """Forecast, one plan for all, filler inside by slack."""
    return SchedulingPolicy(name="tide", decide=lambda snapshot: plan(snapshot, rules), filler=True, forecast=True)


def alone(peak: Mapping[str, int], rules: Rules) -> SchedulingPolicy:
    """Interactive work alone, with the replicas of its peak all day: what its objective is compared with."""
    return SchedulingPolicy(name="interactive alone", decide=lambda each: plan(_fixed(each, peak), rules), work=False)


def static(peak: Mapping[str, int], interactive_devices: int, rules: Rules) -> SchedulingPolicy:
    """Two fleets: one for interactive work at its peak, one for the rest."""

    def decide(snapshot: FleetSnapshot) -> Plan:
        ours, rest = _parted(snapshot, interactive_devices)
        return _both(plan(_fixed(ours, peak), rules), plan(rest, rules))

    return SchedulingPolicy(name="static partition", decide=decide)


def reactive(interactive_devices: int, rules: Rules) -> SchedulingPolicy:
    """Two fleets; replicas follow the load that is there, as a horizontal autoscaler does.

    What they leave is not lent.
    """

    def decide(snapshot: FleetSnapshot) -> Plan:
        ours, rest = _parted(snapshot, interactive_devices)
        return _both(plan(_as_it_comes(ours), rules), plan(rest, rules))

    return SchedulingPolicy(name="reactive autoscaling", decide=decide)


def kueue_like(rules: Rules) -> SchedulingPolicy:
    """One fleet, quota and reclaim: replicas follow the load that is there and preempt, jobs borrow.

    No forecast, and no filler inside.
    """
    firm = msgspec.structs.replace(rules, lend_replicas=False, batch_inside=0.0)
    return SchedulingPolicy(name="quota and reclaim", decide=lambda snapshot: plan(_as_it_comes(snapshot), firm))


def _fixed(snapshot: FleetSnapshot, count: Mapping[str, int]) -> FleetSnapshot:
    def kept(model: ModelView) -> ModelView:
        return msgspec.structs.replace(
            model,
            min_replicas=count[model.name],
            max_replicas=count[model.name],
            demand=Demand(),
            now=0.0,
            waiting=0,
            late=0.0,
        )

    return msgspec.structs.replace(snapshot, models=tuple(kept(model) for model in snapshot.models))


def _as_it_comes(snapshot: FleetSnapshot) -> FleetSnapshot:
    models = tuple(msgspec.structs.replace(model, demand=Demand(model.now, model.now)) for model in snapshot.models)
    return msgspec.structs.replace(snapshot, models=models)


def _parted(snapshot: FleetSnapshot, devices: int) -> tuple[FleetSnapshot, FleetSnapshot]:
    """The interactive part of the fleet with its models, and the rest with batches and jobs."""
    first = {view.id for view in snapshot.devices[:devices]}
    ours = msgspec.structs.replace(
        snapshot,
        devices=snapshot.devices[:devices],
        replicas=tuple(each for each in snapshot.replicas if not each.batch_only),
        jobs=(),
        backlogs=(),
        promises=tuple(each for each in snapshot.promises if each.device in first),
    )
    nobody = tuple(
        msgspec.structs.replace(model, min_replicas=0, demand=Demand(), now=0.0, waiting=0, late=0.0, idle_s=1e9)
        for model in snapshot.models
    )
    rest = msgspec.structs.replace(
        snapshot,
        devices=snapshot.devices[devices:],
        models=nobody,
        replicas=tuple(each for each in snapshot.replicas if each.batch_only),
        promises=tuple(each for each in snapshot.promises if each.device not in first),
    )
    return ours, rest


def _both(one: Plan, other: Plan) -> Plan:
    return Plan(
        start_replicas=one.start_replicas + other.start_replicas,
        stop_replicas=one.stop_replicas + other.stop_replicas,
        start_jobs=one.start_jobs + other.start_jobs,
        preempt_jobs=one.preempt_jobs + other.preempt_jobs,
        lend_replicas=one.lend_replicas + other.lend_replicas,
        reserve=one.reserve + other.reserve,
        promises=one.promises + other.promises,
        devices=one.devices + other.devices,
        waiting=one.waiting + other.waiting,
    )
