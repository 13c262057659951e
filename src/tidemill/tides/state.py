"""The planner's input: devices, models, replicas and work at one moment; and its output.

Plain values, from the live fleet or a simulated one; instants are seconds of any clock that all of a snapshot shares
(live: Unix time).

Demand and capacity are rates of *work*, in tokens of prefill a second (see `tides.routing.RequestWork`): an answer's
token weighs as much as `Policy.decode_weight` tokens of a prompt.
"""

from enum import StrEnum

import msgspec


class Objective(msgspec.Struct, frozen=True):
    """A latency objective: at most this, for this share of the requests."""

    ttft_s: float = 2.0
    """Time to first token, seconds."""
    tpot_s: float = 0.1
    """Time per output token after the first, seconds."""
    percentile: float = 0.95


class DeviceView(msgspec.Struct, frozen=True):
    """One device: a GPU, an NPU, or a slot of a CPU."""

    id: str
    """`NODE/INDEX`."""
    node: str
    kind: str
    """A kind of the catalogue, e.g. `h800-sxm`, `cpu`."""
    up: bool = True
    """False: its node is lost, or the operator has taken it out."""
    reserved_by: str | None = None
    """The reservation that it belongs to now, if any."""


class Phase(StrEnum):
    """Where a replica is in its lifecycle."""

    STARTING = "starting"
    """Its process is being started."""
    WARMING = "warming"
    """The process runs and loads its weights."""
    READY = "ready"
    DRAINING = "draining"
    """It takes nothing new; what it works on may end."""
    ASLEEP = "asleep"
    """Its weights are out of its devices (vLLM's sleep mode), which others may have; it wakes there in seconds."""
    GONE = "gone"


class ReplicaView(msgspec.Struct, frozen=True):
    """One replica."""

    id: str
    model: str
    devices: tuple[str, ...]
    phase: Phase
    in_flight: int = 0
    """Interactive requests that it works on."""
    filler: int = 0
    """Lines of batches that it works on."""
    since: float = 0.0
    """When it came into this phase."""
    batch_only: bool = False
    """Lent to batches: no interactive request goes there."""
    version: str = ""
    colocated: bool = False
    """It is lent, and shares the devices of another replica, which has precedence: it gets what that leaves."""
    dozing: bool = False
    """It drains in order to sleep."""
    shared: bool = False
    """Its CPU slots are also whoever else's they are planned for, who then gets what it leaves. Plans never see it."""


class Demand(msgspec.Struct, frozen=True):
    """Expected interactive work, in tokens of prefill per second.

    Over the time that a new replica needs to get ready and the interval after it.
    """

    expected: float = 0.0
    high: float = 0.0
    """The quantile that replicas are kept for."""


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A served model, and its needs."""

    name: str
    devices: int = 1
    """That one replica takes, all of one kind and node (or of several, see `spans`)."""
    spans: bool = False
    """A replica may be in equal parts on several nodes, where its devices are more than any node has."""
    kinds: tuple[str, ...] = ()
    """Kinds of devices that it runs on, the best first; empty: any."""
    min_replicas: int = 1
    max_replicas: int = 1
    objective: Objective = Objective()
    capacity: float = 0.0
    """Work a second that one replica does within the objective, measured; 0: not known yet."""
    slots: int | None = None
    """Requests that one replica works on at a time."""
    demand: Demand = Demand()
    now: float = 0.0
    """Work a second that arrives now (a short average)."""
    waiting: int = 0
    """Interactive requests that wait for a replica or a slot."""
    late: float = 0.0
    """Share of the last minutes' requests that missed the objective, 0 to 1."""
    idle_s: float = 0.0
    """Seconds since the last interactive request; how long a model at zero has been asked for nothing."""
    scale_down_s: float = 300.0
    """How long it must have needed less before a replica is given up."""
    peak: float | None = None
    """The most work a second that was expected or came within the last `scale_down_s`; None: not kept. With it many
    replicas can be given up at once and at the right moment; without, the last change of the replicas has to be so
    long ago."""
    startup_s: float = 30.0
    """Seconds until a new replica is ready, measured."""
    priority: int = 0
    """Of models that both need a device, the higher gets it."""
    sleepers: int = 0
    """Replicas that are given up and may sleep instead of ending, at most so many at a time."""


class JobPhase(StrEnum):
    """Where a job is in its lifecycle, as far as a plan needs it."""

    QUEUED = "queued"
    RUNNING = "running"
    STOPPING = "stopping"
    """It was asked to checkpoint and go; it still holds its devices."""


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job that waits for devices or has them."""

    id: str
    tenant: str
    queue: str
    devices: int
    kinds: tuple[str, ...] = ()
    gang: bool = True
    """All its devices at once, or none; False: it runs on as many as there are, at least one."""
    preemptible: bool = True
    priority: int = 0
    deadline: float | None = None
    remaining_s: float | None = None
    """What is left to run, seconds on all its devices; None: unknown."""
    grace_s: float = 30.0
    """What it gets to checkpoint."""
    submitted_at: float = 0.0
    not_before: float = 0.0
    """A retry waits until then."""
    phase: JobPhase = JobPhase.QUEUED
    on: tuple[str, ...] = ()
    """The devices that it holds."""
    started_at: float = 0.0
    """When this attempt began."""
    unsaved_s: float = 0.0
    """Work that a kill now would lose: seconds since the last checkpoint that is known of."""
    reservation: str | None = None
    """It runs on what its tenant has reserved."""


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """A queue of jobs: its quota, and how it borrows."""

    name: str
    quota: int = 0
    """Devices that are its own; 0: it only borrows."""
    borrow: int | None = None
    """Devices that it may have beyond its quota, of what others leave; None: as many as there are."""
    weight: float = 1.0
    """Its share of what is to be borrowed, relative to the others'."""


class ReservationView(msgspec.Struct, frozen=True, kw_only=True):
    """Whole devices that a tenant rents for a time: guaranteed, paid for used or not."""

    id: str
    tenant: str
    devices: int
    kinds: tuple[str, ...] = ()
    start: float
    end: float
    lend: bool = False
    """The tenant consents that idle ones are lent to preemptible work."""


class BacklogView(msgspec.Struct, frozen=True, kw_only=True):
    """Unfinished batches of one model, most urgent first.

    Each part is (work left in tokens of prefill, deadline).
    """

    model: str
    parts: tuple[tuple[float, float], ...] = ()


class DevicePromise(msgspec.Struct, frozen=True):
    """A device kept for a piece of work until all its devices are free."""

    device: str
    work: str
    """`job ID`, `model NAME`, `reservation ID`."""


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The input of a plan."""

    now: float
    devices: tuple[DeviceView, ...]
    models: tuple[ModelView, ...] = ()
    replicas: tuple[ReplicaView, ...] = ()
    jobs: tuple[JobView, ...] = ()
    queues: tuple[QueueView, ...] = ()
    reservations: tuple[ReservationView, ...] = ()
    backlogs: tuple[BacklogView, ...] = ()
    promises: tuple[DevicePromise, ...] = ()
    """Those of the last plan. A plan without them is as right, but may change its mind about which device is whose."""


# What comes out


class StartReplica(msgspec.Struct, frozen=True):
    model: str
    devices: tuple[str, ...]
    why: str
    batch_only: bool = False
    wake: str | None = None
    """This replica sleeps there: wake it instead."""


class StopReplica(msgspec.Struct, frozen=True):
    """Drain a replica, then stop it."""

    replica: str
    why: str
    sleep: bool = False
    """Put it to sleep instead of ending it."""


class LendReplica(msgspec.Struct, frozen=True):
    """Lend a replica to batches, or take it back for interactive requests; nothing is restarted."""

    replica: str
    batch_only: bool
    why: str


class StartJob(msgspec.Struct, frozen=True):
    job: str
    devices: tuple[str, ...]
    why: str


class PreemptJob(msgspec.Struct, frozen=True):
    """Let a job checkpoint within its grace time, then stop and requeue it."""

    job: str
    why: str


class AssignReservation(msgspec.Struct, frozen=True):
    """The devices that a reservation in force has from now on: mark these, and no others, as its own
    (`DeviceView.reserved_by`). Before they are marked, they are not lent."""

    reservation: str
    devices: tuple[str, ...]
    why: str


class DeviceNote(msgspec.Struct, frozen=True):
    """A note about a device: what it does, until when, and why."""

    device: str
    holder: str
    """`replica ID`, `job ID`, `free`, `lost`."""
    until: float | None
    """When that is expected to change; None: nobody knows."""
    why: str


class WaitNote(msgspec.Struct, frozen=True):
    """A note about waiting work: what it waits for."""

    work: str
    """`job ID`, `model NAME`, `batches of NAME`, `reservation ID`."""
    why: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The actions to take now, and the reasons. Empty tuples: nothing."""

    start_replicas: tuple[StartReplica, ...] = ()
    stop_replicas: tuple[StopReplica, ...] = ()
    start_jobs: tuple[StartJob, ...] = ()
    preempt_jobs: tuple[PreemptJob, ...] = ()
    lend_replicas: tuple[LendReplica, ...] = ()
    """Only with `Rules.lend_replicas`."""
    reserve: tuple[AssignReservation, ...] = ()
    promises: tuple[DevicePromise, ...] = ()
    """To be handed back with the next snapshot."""
    devices: tuple[DeviceNote, ...] = ()
    """One for each device of the snapshot, in its order."""
    waiting: tuple[WaitNote, ...] = ()
