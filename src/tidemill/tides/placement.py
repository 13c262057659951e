"""Placement: which devices a piece of work gets.

The best kind, one node, and nodes that are in use already, so that whole ones are left for gangs. A model's minimum of
replicas is spread instead, where that costs nobody more.
"""

from collections.abc import Collection, Iterable, Sequence

import msgspec

from tidemill.tides.occupancy import ORDINARY, DevicePool, Occupancy
from tidemill.tides.preemption import PreemptionCandidate, PreemptionRule, minimal_preemptions, preemption_cost


class PlacementRequest(msgspec.Struct, frozen=True, gc=False):
    """A request for devices, and what it may preempt."""

    work: str
    """`job ID`, `model NAME`, `reservation ID`."""
    count: int
    kinds: tuple[str, ...] = ()
    spread: bool = False
    """One node is better, several will do. False: one node, or equal parts of several (see `spans`)."""
    spans: bool = False
    """Equal parts of as few nodes as can be will do when every node is too small."""
    apart: frozenset[str] = frozenset()
    """Nodes that it is rather not on: what it is there to stand in for is on them, and would be lost with it."""
    zones: tuple[str, ...] = (ORDINARY,)
    held: bool = False
    """It may have what is held for a gang."""
    kept: bool = True
    """It may have what the last plan has promised to others."""
    now: bool = False
    """Only what is free now, nothing that is coming."""
    only: frozenset[str] | None = None
    """Of these devices; None: of all."""
    may_preempt: PreemptionRule | None = None
    """None: nobody is preempted."""

    def among(self, devices: Collection[str]) -> Collection[str]:
        """The devices among these that the request may use."""
        return devices if self.only is None else self.only.intersection(devices)


class Placement(msgspec.Struct, frozen=True, gc=False):
    """The result of a placement."""

    devices: tuple[str, ...]
    ready: bool
    """They are all free now; else it waits for those that are coming."""
    victims: tuple[PreemptionCandidate, ...] = ()


def place(occupancy: Occupancy, request: PlacementRequest) -> Placement | None:
    """Assign devices to a request; None if too few are available.

    Free ones, else with those that are coming, else with those of others who are preempted (the caller tells these).
    With None nothing has changed but promises released.
    """
    # What was promised to a job before its reservation was in force is not of that.
    mine = [device for device in occupancy.release(request.work) if occupancy.zone[device] in request.zones]
    if not request.now and len(mine) >= request.count:
        own = DevicePool(occupancy)
        for device in mine:
            own.add(device)
        devices = pick(occupancy, [own], request)
        if devices is not None:
            occupancy.keep_again(request.work, [device for device in mine if device not in devices])
            return Placement(devices, occupancy.take(devices))
    layers: list[DevicePool] = [occupancy.free[zone] for zone in request.zones]
    tries: list[list[DevicePool]] = [list(layers)]
    if request.held:
        tries.append([*layers, occupancy.held_free])
    if not request.now:
        layers += [occupancy.coming[zone] for zone in request.zones]
        tries.append(list(layers))
    if request.kept and ORDINARY in request.zones:
        layers += [occupancy.kept_free] if request.now else [occupancy.kept_free, occupancy.kept_coming]
        tries.append(layers)
    for each in tries:
        devices = pick(occupancy, each, request)
        if devices is not None:
            return Placement(devices, occupancy.take(devices))
    if request.may_preempt is None:
        return None
    victims = find_preemptions(occupancy, layers, request)
    if victims is None:
        return None
    for candidate in victims:
        occupancy.vacate(candidate.name, candidate.devices)
    devices = pick(occupancy, layers, request)
    if devices is None:
        raise AssertionError(f"{request.work}: the preempted are not enough")
    return Placement(devices, occupancy.take(devices), tuple(victims))


def kinds_of(occupancy: Occupancy, request: PlacementRequest) -> Sequence[str]:
    """Kinds of devices to try, the preferred one first."""
    return request.kinds or sorted(occupancy.total, key=lambda kind: (-occupancy.total[kind], kind))


def pick(occupancy: Occupancy, layers: Sequence[DevicePool], request: PlacementRequest) -> tuple[str, ...] | None:
    """Select devices for a claim, preferring earlier pools; they are not assigned yet."""
    kinds = kinds_of(occupancy, request)
    if not request.apart:
        tries = [(kind, request.apart) for kind in kinds]
    elif request.kinds:  # a better kind counts for more than another node
        tries = [(kind, apart) for kind in kinds for apart in (request.apart, frozenset())]
    else:
        tries = [(kind, apart) for apart in (request.apart, frozenset()) for kind in kinds]
    for kind, apart in tries:
        chosen = _of_kind(occupancy, layers, request, kind, apart)
        if chosen is not None:
            return tuple(sorted(chosen, key=occupancy.order.__getitem__))
    return None


def _of_kind(
    occupancy: Occupancy, layers: Sequence[DevicePool], request: PlacementRequest, kind: str, apart: Collection[str]
) -> list[str] | None:
    if sum(pool.count(kind) for pool in layers) < request.count:
        return None
    by_node: dict[str, list[str]] = {}
    now: dict[str, int] = {}
    for depth, pool in enumerate(layers):
        for node, devices in pool.kinds.get(kind, {}).items():
            if node in apart:
                continue
            usable = request.among(devices)
            by_node.setdefault(node, []).extend(sorted(usable, key=occupancy.order.__getitem__))
            if depth == 0:
                now[node] = len(usable)
    if apart and sum(len(devices) for devices in by_node.values()) < request.count:
        return None
    chosen = _one_node(occupancy, by_node, now, request.count)
    if chosen is None and request.spread:
        return _few_nodes(occupancy, by_node, request.count)
    if chosen is None and _must_span(occupancy, request, kind):
        return _equal_parts(occupancy, by_node, now, kind, request.count)
    return chosen


def _must_span(occupancy: Occupancy, request: PlacementRequest, kind: str) -> bool:
    return request.spans and 0 < occupancy.largest.get(kind, 0) < request.count


def equal_parts(count: int, largest: int) -> tuple[int, int]:
    """Nodes, and devices of each, for equal parts on as few nodes as possible.

    `largest`: devices of the largest node, at least 1.
    """
    nodes = next(nodes for nodes in range(-(-count // largest), count + 1) if count % nodes == 0)
    return nodes, count // nodes


def _one_node(occupancy: Occupancy, by_node: dict[str, list[str]], now: dict[str, int], count: int) -> list[str] | None:
    """From the node where most of it is there now, of these from the fullest."""
    fitting = [node for node, devices in by_node.items() if len(devices) >= count]
    if not fitting:
        return None
    best = min(
        fitting, key=lambda node: (max(count - now.get(node, 0), 0), len(by_node[node]), occupancy.node_order[node])
    )
    return by_node[best][:count]


def _few_nodes(occupancy: Occupancy, by_node: dict[str, list[str]], count: int) -> list[str]:
    """From the nodes with most; the rest from the node that it fits best."""
    chosen: list[str] = []
    nodes = sorted(by_node, key=lambda node: (-len(by_node[node]), occupancy.node_order[node]))
    for position, node in enumerate(nodes):
        missing = count - len(chosen)
        if len(by_node[node]) < missing:
            chosen += by_node[node]
            continue
        last = min(
            (each for each in nodes[position:] if len(by_node[each]) >= missing),
            key=lambda each: (len(by_node[each]), occupancy.node_order[each]),
        )
        return chosen + by_node[last][:missing]
    return chosen


def _equal_parts(
    occupancy: Occupancy, by_node: dict[str, list[str]], now: dict[str, int], kind: str, count: int
) -> list[str] | None:
    """From the nodes where most of a part is there now, of these from the fullest."""
    nodes, part = equal_parts(count, occupancy.largest[kind])
    fitting = [node for node, devices in by_node.items() if len(devices) >= part]
    if len(fitting) < nodes:
        return None
    fitting.sort(key=lambda node: (max(part - now.get(node, 0), 0), len(by_node[node]), occupancy.node_order[node]))
    return [device for node in fitting[:nodes] for device in by_node[node][:part]]


# Whom to preempt


def find_preemptions(
    occupancy: Occupancy, layers: Sequence[DevicePool], request: PlacementRequest
) -> list[PreemptionCandidate] | None:
    """The jobs and replicas to preempt for a request, at the least loss.

    None when that is not enough either.
    """
    assert request.may_preempt is not None
    allowed = {candidate.name for candidate in occupancy.candidates.values() if request.may_preempt(candidate)}
    if not allowed:
        return None
    for kind in kinds_of(occupancy, request):
        if occupancy.total[kind] < request.count:
            continue
        have: dict[str, int] = {}
        for pool in layers:
            for node, devices in pool.kinds.get(kind, {}).items():
                have[node] = have.get(node, 0) + len(request.among(devices))
        found = _on_one_node(occupancy, kind, have, request, allowed)
        if found is None and request.spread:
            gains = _gains(occupancy, (occupancy.candidates[name] for name in allowed), kind, request)
            found = minimal_preemptions(gains, request.count - sum(have.values()))
        elif found is None and _must_span(occupancy, request, kind):
            found = _on_equal_parts(occupancy, kind, have, request, allowed)
        if found is not None:
            return found
    return None


def _on_one_node(
    occupancy: Occupancy, kind: str, have: dict[str, int], request: PlacementRequest, allowed: set[str]
) -> list[PreemptionCandidate] | None:
    found: list[tuple[tuple[int, float, int], int, bool, list[PreemptionCandidate]]] = []
    for (each, node), size in occupancy.size.items():
        if each != kind or size < request.count:
            continue
        there = [candidate for candidate in occupancy.candidates_on(node) if candidate.name in allowed]
        gains = _gains(occupancy, there, kind, request, node)
        candidates = minimal_preemptions(gains, request.count - have.get(node, 0))
        if candidates is not None:
            found.append(
                (
                    preemption_cost(candidates, request.count),
                    occupancy.node_order[node],
                    node in request.apart,
                    candidates,
                )
            )
    if not found:
        return None
    best = min(found, key=lambda each: each[:2])
    if best[2]:  # another node, if nobody more important goes there, and no more devices lose their work
        (tier, _, beyond), *_ = best
        others = [each for each in found if not each[2] and each[0][0] <= tier and each[0][2] <= beyond]
        best = min(others, key=lambda each: each[:2], default=best)
    return best[3]


def _on_equal_parts(
    occupancy: Occupancy, kind: str, have: dict[str, int], request: PlacementRequest, allowed: set[str]
) -> list[PreemptionCandidate] | None:
    nodes, part = equal_parts(request.count, occupancy.largest[kind])
    found: list[tuple[tuple[int, float, int], int, list[PreemptionCandidate]]] = []
    for (each, node), size in occupancy.size.items():
        if each != kind or size < part:
            continue
        there = [candidate for candidate in occupancy.candidates_on(node) if candidate.name in allowed]
        candidates = minimal_preemptions(_gains(occupancy, there, kind, request, node), part - have.get(node, 0))
        if candidates is not None:
            found.append((preemption_cost(candidates, part), occupancy.node_order[node], candidates))
    if len(found) < nodes:
        return None
    best = sorted(found, key=lambda each: each[:2])[:nodes]
    return list({candidate.name: candidate for _, _, candidates in best for candidate in candidates}.values())


def _gains(
    occupancy: Occupancy,
    candidates: Iterable[PreemptionCandidate],
    kind: str,
    request: PlacementRequest,
    node: str | None = None,
) -> list[tuple[PreemptionCandidate, int]]:
    """The number of usable devices that each candidate would free."""
    gains = []
    for candidate in candidates:
        gain = 0
        for device in candidate.devices:
            view = occupancy.device.get(device)
            if (
                view is not None
                and view.up
                and view.kind == kind
                and (node is None or view.node == node)
                and (request.only is None or device in request.only)
                and occupancy.zone[device] in request.zones
                and occupancy.holder.get(device) == candidate.name
            ):
                gain += 1
        if gain:
            gains.append((candidate, gain))
    return gains
