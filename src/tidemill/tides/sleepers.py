"""Sleeping replicas: their weights are in host memory.

Whoever else may have their devices meanwhile.

An engine that loads its weights anew takes minutes; one that wakes takes seconds (vLLM's sleep mode, SGLang's memory
saver). So a replica that is given up may sleep instead of ending, and one that is wanted wakes, where its own devices
can be had.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial

import msgspec

from tidemill.tides.placement import Placement, PlacementRequest, place
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.preemption import PreemptionCandidate, PreemptionRule
from tidemill.tides.state import Phase, ReplicaView, StopReplica


class Sleepers:
    """The sleeping replicas by model, and those that this plan wakes."""

    def __init__(self, builder: PlanBuilder) -> None:
        self._builder = builder
        self._by_model: dict[str, list[ReplicaView]] = defaultdict(list)
        for replica in builder.snapshot.replicas:
            if replica.phase is Phase.ASLEEP:
                self._by_model[replica.model].append(replica)
        self._woken: set[str] = set()

    def place(self, request: PlacementRequest, model: str) -> Placement | None:
        """Find devices for a replica of the model.

        Free ones, else such as are coming, else of somebody who is preempted, the least important first; each time a
        sleeper's own rather than others.
        """
        occupancy = self._builder.occupancy
        homes = [frozenset(each.devices) for each in self._by_model[model] if each.id not in self._woken]
        if not homes:
            return place(occupancy, request)
        for each in self._tries(request):
            for home in (*homes, None):
                placement = place(occupancy, msgspec.structs.replace(each, only=home))
                if placement is not None:
                    return placement
        return None

    def _tries(self, request: PlacementRequest) -> Iterator[PlacementRequest]:
        may_preempt = request.may_preempt
        yield msgspec.structs.replace(request, may_preempt=None, now=True)
        yield msgspec.structs.replace(request, may_preempt=None)
        if may_preempt is not None:
            for most in sorted({candidate.tier for candidate in self._builder.occupancy.candidates.values()}):
                yield msgspec.structs.replace(request, may_preempt=partial(_up_to, most, may_preempt))

    def on(self, model: str, devices: tuple[str, ...]) -> str | None:
        """Wake the model's sleeping replica on these devices, and return it."""
        for each in self._by_model[model]:
            if each.id not in self._woken and set(each.devices) == set(devices):
                self._woken.add(each.id)
                return each.id
        return None

    def settle(self) -> None:
        """Turn stops of preempted replicas into sleep, up to each model's number, at the end of a plan.

        And sleepers that cannot be woken any more end.
        """
        builder = self._builder
        limit = {model.name: model.sleepers for model in builder.snapshot.models}
        asleep: Counter[str] = Counter()
        homes: dict[str, set[str]] = defaultdict(set)
        for name, sleepers in self._by_model.items():
            for each in sleepers:
                if each.id in self._woken:
                    continue
                gone = [device for device in each.devices if not self._up(device)]
                if gone or asleep[name] >= limit.get(name, 0):
                    why = f"{gone[0]} is lost or was taken out" if gone else "no more of its model may sleep"
                    builder.stop_replicas.append(StopReplica(each.id, why))
                else:
                    asleep[name] += 1
                    homes[name] |= set(each.devices)
        for replica in builder.snapshot.replicas:
            if replica.dozing:
                asleep[replica.model] += 1
                homes[replica.model] |= set(replica.devices)
        views = {replica.id: replica for replica in builder.snapshot.replicas}
        for index, stop in enumerate(builder.stop_replicas):
            view = views[stop.replica]
            if view.phase is not Phase.READY or asleep[view.model] >= limit.get(view.model, 0):
                continue
            if homes[view.model] & set(view.devices) or not all(map(self._up, view.devices)):
                continue
            asleep[view.model] += 1
            homes[view.model] |= set(view.devices)
            builder.stop_replicas[index] = msgspec.structs.replace(stop, sleep=True)

    def at(self, device: str) -> list[str]:
        """The replicas that sleep on a device."""
        return [
            each.id
            for sleepers in self._by_model.values()
            for each in sleepers
            if device in each.devices and each.id not in self._woken
        ]

    def _up(self, device: str) -> bool:
        view = self._builder.occupancy.device.get(device)
        return view is not None and view.up


def _up_to(most: int, may_preempt: PreemptionRule, candidate: PreemptionCandidate) -> bool:
    return candidate.tier <= most and may_preempt(candidate)
