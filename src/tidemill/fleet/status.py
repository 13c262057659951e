"""How the fleet stands, for those who look at it: nodes, devices, replicas, models, and what waits."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from tidemill.fleet.backend import Node
from tidemill.fleet.controller import LastPlan
from tidemill.fleet.replica import Replica


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A machine."""

    name: str
    up: bool
    drained: bool
    devices: int
    why: str


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A device, what it does, until when and why."""

    device: str
    node: str
    kind: str
    memory_bytes: int
    holder: str
    """`replica ID`, `job ID`, `free`, `lost`, `drained`."""
    until: str | None
    """When that is expected to change, ISO 8601 in UTC; None: nobody knows."""
    why: str
    reserved_by: str | None


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A replica of our own."""

    name: str
    model: str
    version: str
    phase: str
    devices: tuple[str, ...]
    requests: int
    """Interactive requests in flight."""
    lines: int
    """Lines of batches in flight."""
    batch_only: bool
    beside: bool
    """It shares its devices with another one, and gets what that leaves."""
    since: str
    why: str


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A model with engines of our own, and what is planned for it. Work is in tokens of prefill a second."""

    name: str
    ready: int
    min_replicas: int
    max_replicas: int
    waiting: int
    """Interactive requests that wait."""
    now: float
    """Work that arrives."""
    expected: float
    high: float
    """The quantile of what is expected that replicas are kept for."""
    capacity: float
    """Work that one replica does within the objective, measured; 0: not known yet."""
    startup_s: float
    late: float
    """Share of the last minutes' requests that missed the objective."""


class WaitStatus(msgspec.Struct, frozen=True):
    """What a piece of work waits for."""

    work: str
    """`job ID`, `model NAME`, `batches of NAME`, `reservation ID`."""
    why: str


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as of the last plan."""

    nodes: tuple[NodeStatus, ...]
    devices: tuple[DeviceStatus, ...]
    replicas: tuple[ReplicaStatus, ...]
    models: tuple[ModelStatus, ...]
    waiting: tuple[WaitStatus, ...]


def fleet_status(
    nodes: Sequence[Node], replicas: Sequence[Replica], drained: Mapping[str, str], last: LastPlan | None
) -> FleetStatus:
    """How the fleet stands. `drained`: nodes and devices that were taken out, and why."""
    notes = {note.device: note for note in last.plan.devices} if last is not None else {}
    views = {view.id: view for view in last.snapshot.devices} if last is not None else {}
    shared = {
        device.id: each.name
        for each in replicas
        if each.recipe.shares and not each.colocated
        for device in each.devices
    }
    devices = []
    for node in nodes:
        for device in node.devices:
            note, view = notes.get(device.id), views.get(device.id)
            out = drained.get(device.id, drained.get(node.name))
            holder, why = ("free", "it is looked at for the first time") if note is None else (note.holder, note.why)
            if device.id in shared and node.up:
                beside = shared[device.id]
                if holder == "free":
                    holder, why = f"replica {beside}", "it shares its slots: jobs run beside it, on what it leaves"
                else:
                    why = f"{why}; beside replica {beside}, on what that leaves"
            if out is not None and node.up:
                holder, why = "drained", f"{out or 'the operator has taken it out'}{_rest(holder, why)}"
            devices.append(
                DeviceStatus(
                    device=device.id,
                    node=node.name,
                    kind=device.kind,
                    memory_bytes=device.memory_bytes,
                    holder=holder,
                    until=_instant(note.until) if note is not None and note.until is not None else None,
                    why=why,
                    reserved_by=view.reserved_by if view is not None else None,
                )
            )
    return FleetStatus(
        nodes=tuple(
            NodeStatus(
                name=node.name, up=node.up, drained=node.name in drained, devices=len(node.devices), why=node.why
            )
            for node in nodes
        ),
        devices=tuple(devices),
        replicas=tuple(_replica(each) for each in sorted(replicas, key=lambda each: (each.model, each.index))),
        models=_models(last),
        waiting=_waiting(last),
    )


def _rest(holder: str, why: str) -> str:
    """What else is to be said of a device that was taken out: who was on it."""
    _, _, was = why.partition("; ")
    return f"; {was}" if holder == "lost" and was else ""


def _instant(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat()


def _replica(replica: Replica) -> ReplicaStatus:
    return ReplicaStatus(
        name=replica.name,
        model=replica.model,
        version=replica.version.name,
        phase=replica.phase.value,
        devices=tuple(device.id for device in replica.devices),
        requests=replica.use.people,
        lines=replica.use.filler,
        batch_only=replica.batch_only,
        beside=replica.colocated,
        since=_instant(replica.since),
        why=replica.why,
    )


def _models(last: LastPlan | None) -> tuple[ModelStatus, ...]:
    if last is None:
        return ()
    ready = [view.model for view in last.snapshot.replicas if view.phase.value == "ready" and not view.batch_only]
    return tuple(
        ModelStatus(
            name=view.name,
            ready=ready.count(view.name),
            min_replicas=view.min_replicas,
            max_replicas=view.max_replicas,
            waiting=view.waiting,
            now=round(view.now, 3),
            expected=round(view.demand.expected, 3),
            high=round(view.demand.high, 3),
            capacity=round(view.capacity, 3),
            startup_s=round(view.startup_s, 3),
            late=round(view.late, 4),
        )
        for view in last.snapshot.models
    )


def _waiting(last: LastPlan | None) -> tuple[WaitStatus, ...]:
    if last is None:
        return ()
    return tuple(WaitStatus(note.work, note.why) for note in (*last.plan.waiting, *last.failures))
