"""The control loop: observe the fleet, have `tides.plan` decide, and carry the plan out.

The loop is stateless: a plan is made from what is there, and a failed action is planned again with backoff. An action
that fails stops no other, and nothing stops the loop. Durations are of the monotonic clock, and instants that people
have named (deadlines, reservations) of the jump-tolerant one: a wall clock that jumps starts and stops nothing.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Protocol

import msgspec
import structlog

from tidemill.clock import PROCESS_CLOCK, JumpTolerantClock
from tidemill.fleet.backend import Device, Node
from tidemill.tides.plan import plan
from tidemill.tides.rules import RULES, Rules
from tidemill.tides.state import (
    BacklogView,
    DevicePromise,
    DeviceView,
    FleetSnapshot,
    JobView,
    ModelView,
    Phase,
    Plan,
    QueueView,
    ReplicaView,
    ReservationView,
    WaitNote,
)

INTERVAL_S = 1.0
LIVING = (Phase.STARTING, Phase.WARMING, Phase.READY)
SOON_S = 0.1
"""After an event (a request that waits for a model at zero, a job that came or ended) the next plan comes so soon."""
RETRY_S = (1.0, 5.0, 15.0, 60.0)
"""Waits after an action that failed, one after the other."""

log = structlog.get_logger()


class JobSource(Protocol):
    """Jobs, as the loop sees them (`work`)."""

    def views(self) -> Sequence[JobView]:
        """Queued and running jobs, from memory; cheap."""
        ...

    def queues(self) -> Sequence[QueueView]: ...
    def reservations(self) -> Sequence[ReservationView]: ...
    def start(self, job_id: str, devices: Sequence[Device], why: str) -> None:
        """Returns at once; what becomes of it is seen in `views`."""
        ...

    def preempt(self, job_id: str, why: str) -> None:
        """Likewise."""
        ...

    def on_change(self, changed: Callable[[], None]) -> None:
        """Have `changed` called when a job came, ended, or gave its devices back."""
        ...


class Replicas(Protocol):
    """Replicas, as the loop has them started and stopped (`fleet.replicas.ReplicaSet`)."""

    def views(self) -> Sequence[ReplicaView]: ...
    def start(
        self, model: str, devices: Sequence[Device], *, batch_only: bool = False, colocated: bool = False, why: str = ""
    ) -> str:
        """Start a replica; returns at once, and it is in `views`. Gives its name.

        `colocated`: it shares its devices with another one, and gets only what that leaves (`Launch.idle_class`).
        """
        ...

    def stop(self, name: str, why: str) -> object:
        """Drain a replica and end it; returns at once."""
        ...

    def sleep(self, name: str, why: str) -> object:
        """Drain a replica and take its weights out of its devices; returns at once."""
        ...

    def wake(self, name: str, why: str) -> object:
        """Have one that sleeps take its devices again; returns at once."""
        ...

    def set_batch_only(self, name: str, *, batch_only: bool, why: str) -> None:
        """Lend a replica to batches, or take it back."""
        ...


class FleetView(Protocol):
    """What of the fleet neither replicas nor jobs know."""

    def nodes(self) -> Sequence[Node]: ...
    def drained(self) -> Mapping[str, str]:
        """Nodes and devices that the operator has taken out, and why."""
        ...

    def models(self, now: float) -> Sequence[ModelView]:
        """The models that are planned for. `now`: monotonic seconds."""
        ...

    def backlogs(self) -> Sequence[BacklogView]: ...
    def colocated_models(self) -> Collection[str]:
        """Models whose lines run in a replica that is colocated with each ordinary one, on what that leaves
        (docs/fleet.md), and that have lines now."""
        ...

    def learn_startup(self, model: str, seconds: float) -> None:
        """A replica of the model took so long from its start until it was ready."""
        ...


class LastPlan(msgspec.Struct, frozen=True):
    """The last plan, and what it was made from."""

    snapshot: FleetSnapshot
    plan: Plan
    failures: tuple[WaitNote, ...] = ()
    """Actions that have failed and will be tried again."""


class FailingAction(msgspec.Struct):
    """An action that keeps failing."""

    reason: str
    times: int = 0
    until: float = 0.0
    """Monotonic: not tried before."""


class FleetController:
    """Plans and acts, every `interval_s` seconds and soon after an event."""

    def __init__(
        self,
        fleet: FleetView,
        replicas: Replicas,
        jobs: JobSource,
        *,
        rules: Rules = RULES,
        interval_s: float = INTERVAL_S,
        clock: JumpTolerantClock = PROCESS_CLOCK,
    ) -> None:
        self._fleet = fleet
        self._replicas = replicas
        self._jobs = jobs
        self._rules = rules
        self._interval_s = interval_s
        self._clock = clock
        self._event = asyncio.Event()
        self._promises: tuple[DevicePromise, ...] = ()
        self._reserved: dict[str, str] = {}
        """The reservation that a device belongs to."""
        self._failing: dict[str, FailingAction] = {}
        """By action: `model NAME`, `replica ID`, `job ID`."""
        self._young: dict[str, float] = {}
        """Replicas that are not ready yet, and since when they were seen, monotonic."""
        self._woken: set[str] = set()
        """Replicas that have slept: how long they took to wake says nothing of how long a start takes."""
        self.last: LastPlan | None = None
        jobs.on_change(self.poke)

    def poke(self) -> None:
        """Something has happened: plan soon."""
        self._event.set()

    async def run(self) -> None:
        """Plan and act until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            self._event.clear()
            try:
                self.step()
            except Exception:
                log.exception("the fleet could not be planned; what runs goes on")
            await self._pause(began)

    async def _pause(self, began: float) -> None:
        try:
            async with asyncio.timeout_at(began + self._interval_s):
                await self._event.wait()
        except TimeoutError:
            return
        await asyncio.sleep(max(began + SOON_S - asyncio.get_running_loop().time(), 0.0))

    def step(self) -> Plan:
        """One plan, carried out: every action is begun, none is waited for."""
        now = time.monotonic()
        self._watch_starts(self._replicas.views(), now)
        snapshot = self.look(now)
        decided = plan(_planned(snapshot), self._rules)
        self._promises = decided.promises
        self._mark(decided, snapshot)
        devices = {device.id: device for node in self._fleet.nodes() for device in node.devices}
        replicas, jobs = self._replicas, self._jobs
        act: Callable[[], object]
        for lent in decided.lend_replicas:
            act = partial(replicas.set_batch_only, lent.replica, batch_only=lent.batch_only, why=lent.why)
            self._do(f"replica {lent.replica}", now, act)
        for going in decided.stop_replicas:
            act = partial(replicas.sleep if going.sleep else replicas.stop, going.replica, going.why)
            self._do(f"replica {going.replica}", now, act)
        self._keep_colocated(snapshot, decided, devices, now)
        for start in decided.start_replicas:
            if start.wake is not None:
                self._woken.add(start.wake)
                self._do(f"replica {start.wake}", now, partial(replicas.wake, start.wake, start.why))
                continue
            place = [devices[each] for each in start.devices]
            act = partial(replicas.start, start.model, place, batch_only=start.batch_only, why=start.why)
            self._do(f"model {start.model}", now, act)
        for preempted in decided.preempt_jobs:
            self._do(f"job {preempted.job}", now, partial(jobs.preempt, preempted.job, preempted.why))
        for job in decided.start_jobs:
            place = [devices[each] for each in job.devices]
            self._do(f"job {job.job}", now, partial(jobs.start, job.job, place, job.why))
        self._forget(now)
        self.last = LastPlan(snapshot, decided, tuple(self._failures(now)))
        return decided

    def look(self, now: float) -> FleetSnapshot:
        """The fleet as it is. `now`: monotonic seconds."""
        drained = self._fleet.drained()
        devices = tuple(
            DeviceView(
                id=device.id,
                node=device.node,
                kind=device.kind,
                up=node.up and device.id not in drained and node.name not in drained,
                reserved_by=self._reserved.get(device.id),
            )
            for node in self._fleet.nodes()
            for device in node.devices
        )
        return FleetSnapshot(
            now=self._clock.seconds(),
            devices=devices,
            models=tuple(self._fleet.models(now)),
            # Colocated ones hold no devices, and plans need not know of them.
            replicas=tuple(
                view for view in self._replicas.views() if view.phase is not Phase.GONE and not view.colocated
            ),
            jobs=tuple(self._jobs.views()),
            queues=tuple(self._jobs.queues()),
            reservations=tuple(self._jobs.reservations()),
            backlogs=tuple(self._fleet.backlogs()),
            promises=self._promises,
        )

    def _mark(self, decided: Plan, snapshot: FleetSnapshot) -> None:
        """Note whose the devices of reservations are.

        It need not outlive a restart: the plan then says it again.
        """
        lasting = {each.id for each in snapshot.reservations}
        anew = {each.reservation for each in decided.reserve}
        self._reserved = {
            device: name for device, name in self._reserved.items() if name in lasting and name not in anew
        }
        for each in decided.reserve:
            self._reserved |= dict.fromkeys(each.devices, each.reservation)

    # Colocated replicas

    def _keep_colocated(
        self, snapshot: FleetSnapshot, decided: Plan, devices: Mapping[str, Device], now: float
    ) -> None:
        """Where a model has colocated replicas.

        One on the devices of each ordinary one, as long as there are lines.
        """
        going = {each.replica for each in decided.stop_replicas}
        hosts = {
            view.devices: view
            for view in snapshot.replicas
            if not view.batch_only and view.phase is Phase.READY and view.id not in going
        }
        wanted = self._fleet.colocated_models()
        served = set()
        for view in self._replicas.views():
            if not view.colocated:
                continue
            host = hosts.get(view.devices)
            if view.phase not in LIVING:
                served.add(view.devices)  # until it is gone no second one starts there
            elif host is not None and host.model == view.model and view.model in wanted:
                served.add(view.devices)
            else:
                why = "the replica that it was colocated with stops" if host is None else "no lines are left"
                self._do(f"replica {view.id}", now, partial(self._replicas.stop, view.id, why))
        for place, host in hosts.items():
            if host.model in wanted and place not in served:
                self._do(f"lines beside {host.id}", now, partial(self._start_colocated, host, place, devices))

    def _start_colocated(self, host: ReplicaView, place: Sequence[str], devices: Mapping[str, Device]) -> None:
        found = [devices[each] for each in place]
        why = f"lines of batches, on what {host.id} leaves"
        self._replicas.start(host.model, found, batch_only=True, colocated=True, why=why)

    def _watch_starts(self, views: Sequence[ReplicaView], now: float) -> None:
        """Learn how long replicas take until they are ready."""
        young: dict[str, float] = {}
        for view in views:
            if view.phase in (Phase.STARTING, Phase.WARMING):
                young[view.id] = self._young.get(view.id, now)
            elif view.phase is Phase.READY and view.id in self._woken:
                self._woken.discard(view.id)
            elif view.phase is Phase.READY and view.id in self._young and not view.batch_only:
                self._fleet.learn_startup(view.model, now - self._young[view.id])
        self._young = young

    # Actions

    def _do(self, action: str, now: float, act: Callable[[], object]) -> None:
        """Do it; one that fails is done again when the plan asks for it after a while."""
        failing = self._failing.get(action)
        if failing is not None and now < failing.until:
            return
        try:
            act()
        except Exception as error:
            failing = self._failing.setdefault(action, FailingAction(""))
            wait_s = RETRY_S[min(failing.times, len(RETRY_S) - 1)]
            failing.times += 1
            failing.until = now + wait_s
            failing.reason = str(error) or type(error).__name__
            log.warning("what the plan wants cannot be done", what=action, reason=failing.reason, retry_in_s=wait_s)
        else:
            self._failing.pop(action, None)

    def _failures(self, now: float) -> Sequence[WaitNote]:
        return [
            WaitNote(
                action,
                f"{failing.reason} This failed {failing.times} times, and is tried again in "
                f"{max(failing.until - now, 0.0):.0f} s.",
            )
            for action, failing in self._failing.items()
        ]

    def _forget(self, now: float) -> None:
        """What has not been tried again long after it could have been is no longer wanted."""
        for action, failing in list(self._failing.items()):
            if now > failing.until + RETRY_S[-1]:
                del self._failing[action]


def _planned(snapshot: FleetSnapshot) -> FleetSnapshot:
    """What of a fleet is a matter of planning.

    Not the replicas that share their slots with whatever else is there.
    """
    shared = {view.model for view in snapshot.replicas if view.shared}
    if not shared:
        return snapshot
    return msgspec.structs.replace(
        snapshot,
        models=tuple(view for view in snapshot.models if view.name not in shared),
        replicas=tuple(view for view in snapshot.replicas if view.model not in shared),
        backlogs=tuple(view for view in snapshot.backlogs if view.model not in shared),
    )
