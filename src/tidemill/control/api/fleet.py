"""/api/v1/fleet: nodes, devices and replicas, what each device does and why, and what work waits for."""

from typing import Annotated

from litestar import get, post
from litestar.params import JSONBody
from msgspec import Meta, convert

from tidemill.control.api.access import Running
from tidemill.control.api.schemas import FAILURES, Answer, Body, Instant
from tidemill.control.names import check_text

Work = Annotated[float, Meta(description="Tokens of prefill a second; an answer's token counts as five.")]


class NodeSchema(Answer):
    """A machine of the fleet."""

    name: str
    up: bool
    drained: Annotated[bool, Meta(description="Drained by the operator.")]
    devices: int
    why: Annotated[str, Meta(description="Why it is not up.")]


class DeviceSchema(Answer):
    """A device, what it does, until when and why."""

    device: Annotated[str, Meta(examples=["local/0"])]
    node: str
    kind: Annotated[str, Meta(examples=["h800-sxm", "cpu"])]
    memory_bytes: int
    holder: Annotated[str, Meta(description="`replica ID`, `job ID`, `free`, `lost` or `drained`.")]
    until: Annotated[Instant | None, Meta(description="When that is expected to change; null if unknown.")]
    why: str
    reserved_by: Annotated[str | None, Meta(description="The reservation that it belongs to.")]


class ReplicaSchema(Answer):
    """An engine of the platform's own."""

    name: str
    model: str
    version: str
    phase: Annotated[str, Meta(examples=["starting", "warming", "ready", "draining", "asleep"])]
    devices: list[str]
    requests: Annotated[int, Meta(description="Interactive requests in flight.")]
    lines: Annotated[int, Meta(description="Lines of batches in flight.")]
    batch_only: Annotated[bool, Meta(description="Only lines of batches go there.")]
    beside: Annotated[
        bool, Meta(description="It shares its devices with another replica, and uses what that one leaves.")
    ]
    since: Annotated[Instant, Meta(description="When it came into this phase.")]
    why: str


class FleetModel(Answer):
    """A model with engines of the platform's own, and what is planned for it."""

    name: str
    ready: Annotated[int, Meta(description="Replicas that serve.")]
    min_replicas: int
    max_replicas: int
    waiting: Annotated[int, Meta(description="Interactive requests that wait.")]
    now: Annotated[Work, Meta(description="Work that arrives.")]
    expected: Work
    high: Annotated[Work, Meta(description="What replicas are kept for: seldom is it more.")]
    capacity: Annotated[Work, Meta(description="Work of one replica within the objective; 0 if not known yet.")]
    startup_s: Annotated[float, Meta(description="Measured start time of a replica.")]
    late: Annotated[float, Meta(description="Share of the last minutes' requests that missed the objective.")]


class Waiting(Answer):
    """A piece of work, and what it waits for."""

    work: Annotated[str, Meta(examples=["job job_7k3m", "model qwen3-32b", "batches of qwen3-32b"])]
    why: str


class FleetSchema(Answer):
    """The fleet as of the last plan, at most a second ago."""

    nodes: list[NodeSchema]
    devices: list[DeviceSchema]
    replicas: list[ReplicaSchema]
    models: list[FleetModel]
    waiting: list[Waiting]


class Why(Answer):
    """What each device does, until when and why, and what each waiting piece of work waits for."""

    devices: list[DeviceSchema]
    waiting: list[Waiting]


class DrainBody(Body):
    """What is to be taken out."""

    name: Annotated[str, Meta(description="A node, or a device.", examples=["local/0"])]
    why: Annotated[str, Meta(description="Reason, shown with the device.")] = ""


class UndrainBody(Body):
    """What is to be put back."""

    name: str


class Drained(Answer):
    """What was taken out or put back."""

    name: str
    drained: bool


@get("/fleet", responses=FAILURES)
async def get_fleet(platform: Running) -> FleetSchema:
    """Nodes, devices, replicas and models, and what waits."""
    return convert(platform.fleet(), FleetSchema, from_attributes=True)


@get("/fleet/why", responses=FAILURES)
async def get_fleet_why(platform: Running) -> Why:
    """What each device does, until when and why; for each piece of work that waits, what it waits for."""
    return convert(platform.fleet(), Why, from_attributes=True)


@post("/fleet/drain", status_code=200, responses=FAILURES)
async def drain_fleet(platform: Running, data: JSONBody[DrainBody]) -> Drained:
    """Take a node or a device out: nothing new starts there.

    What runs there goes on elsewhere, or ends in order.
    """
    name = check_text("name", data.name, longest=160)
    await platform.drain(name, check_text("why", data.why, longest=512, empty=True))
    return Drained(name, True)


@post("/fleet/undrain", status_code=200, responses=FAILURES)
async def undrain_fleet(platform: Running, data: JSONBody[UndrainBody]) -> Drained:
    """Put a node or a device back."""
    name = check_text("name", data.name, longest=160)
    await platform.undrain(name)
    return Drained(name, False)
