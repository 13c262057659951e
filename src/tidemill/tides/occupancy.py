"""Device occupancy while a plan is made: free, being freed, preemptible.

Free now, coming free, or from somebody who may be preempted.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from tidemill.tides.preemption import PreemptionCandidate
from tidemill.tides.state import DevicePromise, DeviceView, FleetSnapshot, JobPhase, JobView, Phase

ORDINARY = ""
"""The zone of devices that belong to no reservation; the others are named by theirs."""


class DevicePool:
    """Available devices, by kind and node."""

    __slots__ = ("_occupancy", "kinds")

    def __init__(self, occupancy: "Occupancy") -> None:
        self._occupancy = occupancy
        self.kinds: dict[str, dict[str, dict[str, None]]] = {}

    def add(self, device: str) -> None:
        view = self._occupancy.device[device]
        self.kinds.setdefault(view.kind, {}).setdefault(view.node, {})[device] = None

    def discard(self, device: str) -> bool:
        """Remove a device; False if it was not in the pool."""
        view = self._occupancy.device[device]
        nodes = self.kinds.get(view.kind)
        on_node = nodes.get(view.node) if nodes else None
        if nodes is None or on_node is None or device not in on_node:
            return False
        del on_node[device]
        if not on_node:
            del nodes[view.node]
        return True

    def count(self, kind: str) -> int:
        return sum(len(devices) for devices in self.kinds.get(kind, {}).values())


class Occupancy:
    """The devices of a snapshot, and who holds them in the plan.

    `free` and `coming` are by zone. `kept_*` are those that the last plan has promised to work that has not had its
    turn yet in this one; `held_*` those that are kept together for a gang that waits.
    """

    def __init__(self, snapshot: FleetSnapshot, soon_s: float) -> None:
        self.device: dict[str, DeviceView] = {view.id: view for view in snapshot.devices}
        self.order: dict[str, int] = {view.id: index for index, view in enumerate(snapshot.devices)}
        self.size: dict[tuple[str, str], int] = defaultdict(int)
        """Devices of a kind that are up on a node."""
        self.total: dict[str, int] = defaultdict(int)
        """Devices of a kind that are up."""
        self.node_order: dict[str, int] = {}
        for view in snapshot.devices:
            self.node_order.setdefault(view.node, len(self.node_order))
            if view.up:
                self.size[view.kind, view.node] += 1
                self.total[view.kind] += 1
        self.largest: dict[str, int] = {}
        """Devices of a kind on its largest node."""
        for (kind, _), size in self.size.items():
            self.largest[kind] = max(self.largest.get(kind, 0), size)
        in_force = {each.id for each in snapshot.reservations if each.start <= snapshot.now < each.end}
        self.zone: dict[str, str] = {
            view.id: view.reserved_by if view.reserved_by in in_force else ORDINARY for view in snapshot.devices
        }
        self.free: dict[str, DevicePool] = defaultdict(lambda: DevicePool(self))
        self.coming: dict[str, DevicePool] = defaultdict(lambda: DevicePool(self))
        self.kept_free, self.kept_coming = DevicePool(self), DevicePool(self)
        self.held_free, self.held_coming = DevicePool(self), DevicePool(self)
        self.holder: dict[str, str] = {}
        """`job ID` or `replica ID` of each device that somebody has."""
        self.promised: dict[str, str] = {}
        """What this plan keeps each device for."""
        self.candidates: dict[str, PreemptionCandidate] = {}
        self._candidates_on: dict[str, dict[str, PreemptionCandidate]] = defaultdict(dict)
        self.gone: set[str] = set()
        """Jobs and replicas that this plan preempts or stops."""
        self.promises_to: dict[str, list[str]] = {}
        """What the last plan has promised to work that has not had its turn yet."""
        self._take_stock(snapshot, soon_s)

    def _take_stock(self, snapshot: FleetSnapshot, soon_s: float) -> None:
        leaving: set[str] = set()
        for replica in sorted(snapshot.replicas, key=lambda each: each.batch_only):  # beside another it holds nothing
            if replica.phase in (Phase.GONE, Phase.ASLEEP):
                continue
            for device in replica.devices:
                self.holder.setdefault(device, f"replica {replica.id}")
            if replica.phase is Phase.DRAINING:
                leaving.add(f"replica {replica.id}")
        for job in snapshot.jobs:
            for device in job.on:
                self.holder.setdefault(device, f"job {job.id}")
            if job.phase is JobPhase.STOPPING or ends_soon(job, soon_s):
                leaving.add(f"job {job.id}")
        for view in snapshot.devices:
            if not view.up:
                continue
            holder = self.holder.get(view.id)
            if holder is None:
                self.free[self.zone[view.id]].add(view.id)
            elif holder in leaving:
                self.coming[self.zone[view.id]].add(view.id)

    def keep(self, promises: Iterable[DevicePromise], alive: Mapping[str, object]) -> None:
        """Set aside devices that the last plan promised to work that still waits for them."""
        for promise in promises:
            device = promise.device
            if promise.work not in alive or device not in self.device:
                continue
            if self.free[ORDINARY].discard(device):
                self.kept_free.add(device)
            elif self.coming[ORDINARY].discard(device):
                self.kept_coming.add(device)
            else:
                continue
            self.promises_to.setdefault(promise.work, []).append(device)

    def release(self, work: str) -> list[str]:
        """Release the devices promised to this work, and return them."""
        mine = []
        for device in self.promises_to.pop(work, ()):
            if self.kept_free.discard(device):
                self.free[ORDINARY].add(device)
            elif self.kept_coming.discard(device):
                self.coming[ORDINARY].add(device)
            else:
                continue  # taken by more important work
            mine.append(device)
        return mine

    def keep_again(self, work: str, devices: Iterable[str]) -> None:
        """Promise the devices again that the work did not take."""
        for device in devices:
            if self.free[ORDINARY].discard(device):
                self.kept_free.add(device)
            elif self.coming[ORDINARY].discard(device):
                self.kept_coming.add(device)
            else:
                continue
            self.promises_to.setdefault(work, []).append(device)

    def release_all(self) -> None:
        for work in list(self.promises_to):
            self.release(work)

    def offer(self, candidate: PreemptionCandidate) -> None:
        """Mark a job or replica as preemptible."""
        if candidate.name in self.candidates:
            return
        self.candidates[candidate.name] = candidate
        for node in {self.device[device].node: None for device in candidate.devices if device in self.device}:
            self._candidates_on[node][candidate.name] = candidate

    def withdraw(self, name: str) -> None:
        self.candidates.pop(name, None)

    def candidates_on(self, node: str) -> list[PreemptionCandidate]:
        return [each for name, each in self._candidates_on.get(node, {}).items() if name in self.candidates]

    def vacate(self, name: str, devices: Iterable[str]) -> None:
        """Mark the devices of stopped work as being freed."""
        self.withdraw(name)
        self.gone.add(name)
        for device in devices:
            if device in self.device and self.device[device].up and self.holder.get(device) == name:
                self.coming[self.zone[device]].add(device)

    def take(self, devices: Iterable[str]) -> bool:
        """Assign devices. True if all of them are free now."""
        free = True
        for device in devices:
            zone = self.zone[device]
            self.promised.pop(device, None)
            if self.free[zone].discard(device) or self.kept_free.discard(device) or self.held_free.discard(device):
                continue
            if (
                self.coming[zone].discard(device)
                or self.kept_coming.discard(device)
                or self.held_coming.discard(device)
            ):
                free = False
            else:
                raise AssertionError(f"{device} is given out twice")
        return free

    def move(self, devices: Iterable[str], zone: str) -> None:
        """Move assigned devices to a reservation."""
        for device in devices:
            self.zone[device] = zone
            (self.coming if device in self.holder else self.free)[zone].add(device)

    def hold(self, devices: Iterable[str]) -> None:
        """Reserve devices for a waiting gang; work that it may preempt can use them until then."""
        for device in devices:
            zone = self.zone[device]
            self.promised.pop(device, None)
            if self.free[zone].discard(device) or self.kept_free.discard(device):
                self.held_free.add(device)
            elif self.coming[zone].discard(device) or self.kept_coming.discard(device):
                self.held_coming.add(device)

    def unhold(self) -> None:
        """Release the devices that are reserved for waiting gangs."""
        for held, pool in ((self.held_free, self.free[ORDINARY]), (self.held_coming, self.coming[ORDINARY])):
            devices = [device for nodes in held.kinds.values() for on_node in nodes.values() for device in on_node]
            for device in devices:
                held.discard(device)
                self.promised.pop(device, None)
                pool.add(device)


def ends_soon(job: JobView, soon_s: float) -> bool:
    return job.phase is JobPhase.RUNNING and job.remaining_s is not None and job.remaining_s <= soon_s
