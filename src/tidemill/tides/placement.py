"""Which devices a piece of work gets: the best kind, one node, and nodes that are in use already, so that whole ones
are left for gangs. A model's minimum of replicas is spread instead, where that costs nobody more."""

from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from tidemill.tides.occupancy import ORDINARY, DevicePool, Occupancy, PreemptionCandidate


class PlacementRequest(msgspec.Struct, frozen=True, gc=False):
    """What a piece of work wants, and whom it may make give way."""

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
    may: Callable[[PreemptionCandidate], bool] | None = None
    """None: nobody gives way."""

    def among(self, devices: Collection[str]) -> Collection[str]:
        """Those of these devices that it may have."""
        return devices if self.only is None else self.only.intersection(devices)


class Placement(msgspec.Struct, frozen=True, gc=False):
    """What it gets."""

    devices: tuple[str, ...]
    ready: bool
    """They are all free now; else it waits for those that are coming."""
    victims: tuple[PreemptionCandidate, ...] = ()


def place(board: Occupancy, claim: PlacementRequest) -> Placement | None:
    """Give devices out: free ones, else with those that are coming, else with those of others who give way (the
    caller tells these). None, and nothing changed but promises released, when there are not so many to be had."""
    # What was promised to a job before its reservation was in force is not of that.
    mine = [device for device in board.release(claim.work) if board.zone[device] in claim.zones]
    if not claim.now and len(mine) >= claim.count:
        own = DevicePool(board)
        for device in mine:
            own.add(device)
        devices = pick(board, [own], claim)
        if devices is not None:
            board.keep_again(claim.work, [device for device in mine if device not in devices])
            return Placement(devices, board.take(devices))
    layers: list[DevicePool] = [board.free[zone] for zone in claim.zones]
    tries: list[list[DevicePool]] = [list(layers)]
    if claim.held:
        tries.append([*layers, board.held_free])
    if not claim.now:
        layers += [board.coming[zone] for zone in claim.zones]
        tries.append(list(layers))
    if claim.kept and ORDINARY in claim.zones:
        layers += [board.kept_free] if claim.now else [board.kept_free, board.kept_coming]
        tries.append(layers)
    for each in tries:
        devices = pick(board, each, claim)
        if devices is not None:
            return Placement(devices, board.take(devices))
    if claim.may is None:
        return None
    victims = _who_gives_way(board, layers, claim)
    if victims is None:
        return None
    for unit in victims:
        board.vacate(unit.name, unit.devices)
    devices = pick(board, layers, claim)
    if devices is None:
        raise AssertionError(f"{claim.work}: those that give way are not enough")
    return Placement(devices, board.take(devices), tuple(victims))


def kinds_of(board: Occupancy, claim: PlacementRequest) -> Sequence[str]:
    """Kinds to try, the best first."""
    return claim.kinds or sorted(board.total, key=lambda kind: (-board.total[kind], kind))


def pick(board: Occupancy, layers: Sequence[DevicePool], claim: PlacementRequest) -> tuple[str, ...] | None:
    """Devices for a claim from pools, the earlier pools rather; they are not taken yet."""
    kinds = kinds_of(board, claim)
    if not claim.apart:
        tries = [(kind, claim.apart) for kind in kinds]
    elif claim.kinds:  # a better kind counts for more than another node
        tries = [(kind, apart) for kind in kinds for apart in (claim.apart, frozenset())]
    else:
        tries = [(kind, apart) for apart in (claim.apart, frozenset()) for kind in kinds]
    for kind, apart in tries:
        chosen = _of_kind(board, layers, claim, kind, apart)
        if chosen is not None:
            return tuple(sorted(chosen, key=board.order.__getitem__))
    return None


def _of_kind(
    board: Occupancy, layers: Sequence[DevicePool], claim: PlacementRequest, kind: str, apart: Collection[str]
) -> list[str] | None:
    if sum(pool.count(kind) for pool in layers) < claim.count:
        return None
    by_node: dict[str, list[str]] = {}
    now: dict[str, int] = {}
    for depth, pool in enumerate(layers):
        for node, devices in pool.kinds.get(kind, {}).items():
            if node in apart:
                continue
            usable = claim.among(devices)
            by_node.setdefault(node, []).extend(sorted(usable, key=board.order.__getitem__))
            if depth == 0:
                now[node] = len(usable)
    if apart and sum(len(devices) for devices in by_node.values()) < claim.count:
        return None
    chosen = _one_node(board, by_node, now, claim.count)
    if chosen is None and claim.spread:
        return _few_nodes(board, by_node, claim.count)
    if chosen is None and _must_span(board, claim, kind):
        return _equal_parts(board, by_node, now, kind, claim.count)
    return chosen


def _must_span(board: Occupancy, claim: PlacementRequest, kind: str) -> bool:
    return claim.spans and 0 < board.largest.get(kind, 0) < claim.count


def equal_parts(count: int, largest: int) -> tuple[int, int]:
    """Nodes, and devices of each, for what is in equal parts on as few nodes as can be. `largest`: devices of the
    largest node, at least 1."""
    nodes = next(nodes for nodes in range(-(-count // largest), count + 1) if count % nodes == 0)
    return nodes, count // nodes


def _one_node(board: Occupancy, by_node: dict[str, list[str]], now: dict[str, int], count: int) -> list[str] | None:
    """From the node where most of it is there now, of these from the fullest."""
    fitting = [node for node, devices in by_node.items() if len(devices) >= count]
    if not fitting:
        return None
    best = min(fitting, key=lambda node: (max(count - now.get(node, 0), 0), len(by_node[node]), board.node_order[node]))
    return by_node[best][:count]


def _few_nodes(board: Occupancy, by_node: dict[str, list[str]], count: int) -> list[str]:
    """From the nodes with most; the rest from the node that it fits best."""
    chosen: list[str] = []
    nodes = sorted(by_node, key=lambda node: (-len(by_node[node]), board.node_order[node]))
    for position, node in enumerate(nodes):
        missing = count - len(chosen)
        if len(by_node[node]) < missing:
            chosen += by_node[node]
            continue
        last = min(
            (each for each in nodes[position:] if len(by_node[each]) >= missing),
            key=lambda each: (len(by_node[each]), board.node_order[each]),
        )
        return chosen + by_node[last][:missing]
    return chosen


def _equal_parts(
    board: Occupancy, by_node: dict[str, list[str]], now: dict[str, int], kind: str, count: int
) -> list[str] | None:
    """From the nodes where most of a part is there now, of these from the fullest."""
    nodes, part = equal_parts(count, board.largest[kind])
    fitting = [node for node, devices in by_node.items() if len(devices) >= part]
    if len(fitting) < nodes:
        return None
    fitting.sort(key=lambda node: (max(part - now.get(node, 0), 0), len(by_node[node]), board.node_order[node]))
    return [device for node in fitting[:nodes] for device in by_node[node][:part]]


# Who gives way


def _who_gives_way(
    board: Occupancy, layers: Sequence[DevicePool], claim: PlacementRequest
) -> list[PreemptionCandidate] | None:
    """The jobs and replicas that lose least by giving way to a claim; None when nobody's going is enough."""
    assert claim.may is not None
    allowed = {unit.name for unit in board.units.values() if claim.may(unit)}
    if not allowed:
        return None
    for kind in kinds_of(board, claim):
        if board.total[kind] < claim.count:
            continue
        have: dict[str, int] = {}
        for pool in layers:
            for node, devices in pool.kinds.get(kind, {}).items():
                have[node] = have.get(node, 0) + len(claim.among(devices))
        found = _on_one_node(board, kind, have, claim, allowed)
        if found is None and claim.spread:
            gains = _gains(board, (board.units[name] for name in allowed), kind, claim)
            found = cheapest(gains, claim.count - sum(have.values()))
        elif found is None and _must_span(board, claim, kind):
            found = _on_equal_parts(board, kind, have, claim, allowed)
        if found is not None:
            return found
    return None


def _on_one_node(
    board: Occupancy, kind: str, have: dict[str, int], claim: PlacementRequest, allowed: set[str]
) -> list[PreemptionCandidate] | None:
    found: list[tuple[tuple[int, float, int], int, bool, list[PreemptionCandidate]]] = []
    for (each, node), size in board.size.items():
        if each != kind or size < claim.count:
            continue
        there = [unit for unit in board.units_on(node) if unit.name in allowed]
        gains = _gains(board, there, kind, claim, node)
        units = cheapest(gains, claim.count - have.get(node, 0))
        if units is not None:
            found.append((_weight(units, claim.count), board.node_order[node], node in claim.apart, units))
    if not found:
        return None
    best = min(found, key=lambda each: each[:2])
    if best[2]:  # another node, if nobody more important goes there, and no more devices lose their work
        (tier, _, beyond), *_ = best
        others = [each for each in found if not each[2] and each[0][0] <= tier and each[0][2] <= beyond]
        best = min(others, key=lambda each: each[:2], default=best)
    return best[3]


def _on_equal_parts(
    board: Occupancy, kind: str, have: dict[str, int], claim: PlacementRequest, allowed: set[str]
) -> list[PreemptionCandidate] | None:
    nodes, part = equal_parts(claim.count, board.largest[kind])
    found: list[tuple[tuple[int, float, int], int, list[PreemptionCandidate]]] = []
    for (each, node), size in board.size.items():
        if each != kind or size < part:
            continue
        there = [unit for unit in board.units_on(node) if unit.name in allowed]
        units = cheapest(_gains(board, there, kind, claim, node), part - have.get(node, 0))
        if units is not None:
            found.append((_weight(units, part), board.node_order[node], units))
    if len(found) < nodes:
        return None
    best = sorted(found, key=lambda each: each[:2])[:nodes]
    return list({unit.name: unit for _, _, units in best for unit in units}.values())


def _gains(
    board: Occupancy, units: Iterable[PreemptionCandidate], kind: str, claim: PlacementRequest, node: str | None = None
) -> list[tuple[PreemptionCandidate, int]]:
    """How many usable devices each unit's going would free."""
    gains = []
    for unit in units:
        gain = 0
        for device in unit.devices:
            view = board.device.get(device)
            if (
                view is not None
                and view.up
                and view.kind == kind
                and (node is None or view.node == node)
                and (claim.only is None or device in claim.only)
                and board.zone[device] in claim.zones
                and board.holder.get(device) == unit.name
            ):
                gain += 1
        if gain:
            gains.append((unit, gain))
    return gains


def cheapest(gains: Sequence[tuple[PreemptionCandidate, int]], need: int) -> list[PreemptionCandidate] | None:
    """Units that free `need` devices together and lose little: the first in rank until it is enough, less those that
    turn out not to be needed, or the best single one."""
    if need <= 0:
        return []
    ordered = sorted(gains, key=lambda each: each[0].rank)
    chosen: list[tuple[PreemptionCandidate, int]] = []
    freed = 0
    for unit, gain in ordered:
        chosen.append((unit, gain))
        freed += gain
        if freed >= need:
            break
    if freed < need:
        return None
    for unit, gain in reversed(chosen[:]):
        if freed - gain >= need:
            chosen.remove((unit, gain))
            freed -= gain
    several = [unit for unit, _ in chosen]
    single = min(
        ((unit, gain) for unit, gain in ordered if gain >= need),
        key=lambda each: (_weight([each[0]], need), each[0].name),
        default=None,
    )
    if single is not None and _weight([single[0]], need) < _weight(several, need):
        return [single[0]]
    return several


def _weight(units: Sequence[PreemptionCandidate], need: int) -> tuple[int, float, int]:
    """How bad it is that these give way: the highest tier, the work lost, and devices freed beyond the need."""
    if not units:
        return (-1, 0.0, 0)
    return (
        max(unit.tier for unit in units),
        sum(unit.loss_s for unit in units),
        sum(len(unit.devices) for unit in units) - need,
    )
