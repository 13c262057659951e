"""/api/v1/queues and /api/v1/reservations"""

from datetime import UTC, datetime
from typing import Annotated

from litestar import get, post
from litestar.params import FromQuery, JSONBody, QueryParameter
from msgspec import Meta, convert

from tidemill.control import reservations
from tidemill.control.api.access import Running, change, read
from tidemill.control.api.schemas import CONFLICT, FAILURES, Amount, Answer, Body, Currency, Instant, TenantRef


class QueueSchema(Answer):
    """A queue of jobs."""

    name: str
    tenant: Annotated[str | None, Meta(description="Whose jobs it takes; null: anybody's.")]
    quota: Annotated[int, Meta(description="Devices of its own.")]
    borrow: Annotated[int | None, Meta(description="Devices beyond these; null: as many as others leave.")]
    weight: int
    created_at: Instant


class Queues(Answer):
    """Queues, by name."""

    queues: list[QueueSchema]


class QueueRequest(Body):
    """A queue to be made or changed."""

    name: str
    tenant: Annotated[str | None, Meta(description="Only this tenant's jobs; anybody's when left out.")] = None
    quota: int = 0
    borrow: int | None = None
    weight: int = 1


class QueueRef(Body):
    """A queue to be removed."""

    queue: str


class ReservationSchema(Answer):
    """Devices that are kept for a tenant."""

    id: str
    tenant: str
    kind: str
    devices: int
    starts_at: Instant
    ends_at: Instant
    lend: Annotated[bool, Meta(description="Idle ones may be lent to preemptible work.")]
    state: Annotated[str, Meta(description="`booked`, `active`, `ended`, `cancelled`.")]
    reason: str
    price_id: str
    price_per_hour: Amount
    currency: Currency


class Reservations(Answer):
    """Reservations, by their beginning."""

    reservations: list[ReservationSchema]


class ReservationRequest(Body):
    """Devices to be kept for a tenant."""

    tenant: TenantRef
    kind: Annotated[str, Meta(examples=["h800-sxm"])]
    devices: int
    start: Annotated[str, Meta(description="`now`, a time from now, a day or an instant.", examples=["now"])]
    end: Annotated[
        str,
        Meta(description="A time from the start, a day (to its end) or an instant.", examples=["30d", "2027-01-31"]),
    ]
    lend: bool = False
    price: Annotated[str | None, Meta(description="Per device and hour; the standard price when left out.")] = None


class ReservationRef(Body):
    """A reservation to be given up."""

    reservation: str


@get("/queues", responses=FAILURES)
async def list_queues(platform: Running) -> Queues:
    """The queues that were set. Each tenant has one of its own name besides, which need not be set."""
    return convert(await read(platform, reservations.list_queues), Queues)


@post("/queues", status_code=200, responses=CONFLICT)
async def set_queue(platform: Running, data: JSONBody[QueueRequest]) -> QueueSchema:
    """Make a queue, or change it."""
    now = datetime.now(UTC)
    made = await change(
        platform,
        lambda connection: reservations.set_queue(
            connection,
            name=data.name,
            tenant=data.tenant,
            quota=data.quota,
            borrow=data.borrow,
            weight=data.weight,
            now=now,
        ),
    )
    platform.wake_jobs()
    return convert(made, QueueSchema)


@post("/queues/remove", status_code=200, responses=CONFLICT)
async def remove_queue(platform: Running, data: JSONBody[QueueRef]) -> QueueSchema:
    """Remove a queue that has no unfinished jobs; answers with it as it was."""
    removed = await change(platform, lambda connection: reservations.remove_queue(connection, data.queue))
    platform.wake_jobs()
    return convert(removed, QueueSchema)


@get("/reservations", responses=FAILURES)
async def list_reservations(
    platform: Running,
    tenant: FromQuery[str | None] = None,
    over: Annotated[bool, QueryParameter(description="Those too that have ended.")] = False,
) -> Reservations:
    """The reservations of all tenants, or with `tenant` (a name or an id) of one."""
    found = await read(platform, lambda connection: reservations.list_reservations(connection, tenant, over=over))
    return convert(found, Reservations)


@post("/reservations", status_code=200, responses=FAILURES)
async def create_reservation(platform: Running, data: JSONBody[ReservationRequest]) -> ReservationSchema:
    """Keep devices for a tenant from one instant to another. It pays for them, used or not."""
    now = datetime.now(UTC)
    made = await change(
        platform,
        lambda connection: reservations.create_reservation(
            connection,
            tenant=data.tenant,
            kind=data.kind,
            devices=data.devices,
            start=data.start,
            end=data.end,
            lend=data.lend,
            price=data.price,
            site=platform.job_limits.site,
            zone=platform.zone,
            now=now,
        ),
    )
    platform.wake_jobs()
    return convert(made, ReservationSchema)


@post("/reservations/cancel", status_code=200, responses=CONFLICT)
async def cancel_reservation(platform: Running, data: JSONBody[ReservationRef]) -> ReservationSchema:
    """Give a reservation up. It is billed until now."""
    now = datetime.now(UTC)
    cancelled = await change(
        platform, lambda connection: reservations.cancel_reservation(connection, data.reservation, now=now)
    )
    platform.wake_jobs()
    return convert(cancelled, ReservationSchema)
