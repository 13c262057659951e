"""Queues of jobs and reserved devices, as operators set them. Plain values in and out."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection

from tidemill.control.names import check_text, read_amount, read_expiry, tenant_named
from tidemill.errors import BadInput
from tidemill.ledger.devices import MAX_DEVICES, DeviceTier, check_hour
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import format_amount
from tidemill.ledger.period import zone_named
from tidemill.store import queues as queue_store
from tidemill.store import reservations as reservation_store
from tidemill.store.device_prices import agreed_price, current_device_prices, device_price_versions
from tidemill.store.ids import new_id
from tidemill.store.queues import Queue
from tidemill.store.reservations import OPEN, Reservation
from tidemill.store.tenants import MAX_WEIGHT, Tenant, check_name, list_tenants
from tidemill.suggestions import did_you_mean

Json = dict[str, Any]
NOW = "now"


def set_queue(
    connection: Connection,
    *,
    name: str,
    tenant: str | None,
    quota: int,
    borrow: int | None,
    weight: int,
    now: datetime,
) -> Json:
    """Make a queue, or change it. Raises NotFound, BadInput, Conflict."""
    owner = None if tenant is None else tenant_named(connection, tenant)
    for param, value, high in (("quota", quota, MAX_DEVICES), ("borrow", borrow or 0, MAX_DEVICES)):
        if not 0 <= value <= high:
            raise BadInput(f"{param} must be from 0 to {high:,}, not {value:,}.", param=param)
    if not 1 <= weight <= MAX_WEIGHT:
        raise BadInput(f"weight must be from 1 to {MAX_WEIGHT}, not {weight}.", param="weight")
    name = check_name("queue", name)
    for each in list_tenants(connection):
        if each.name == name and (owner is None or owner.tenant_id != each.tenant_id):
            raise BadInput(
                f"{name!r} is the queue of the tenant of that name.", hint="Name it with --tenant.", param="queue"
            )
    queue = queue_store.set_queue(
        connection,
        Queue(
            name=name,
            tenant_id=None if owner is None else owner.tenant_id,
            quota=quota,
            borrow=borrow,
            weight=weight,
            created_at=now,
        ),
    )
    return queue_json(queue, {} if owner is None else {owner.tenant_id: owner})


def list_queues(connection: Connection) -> Json:
    """The queues that were set."""
    owners = _owners(connection)
    return {"queues": [queue_json(each, owners) for each in queue_store.list_queues(connection)]}


def remove_queue(connection: Connection, queue: str) -> Json:
    """Remove a queue that has no unfinished jobs. Raises NotFound, Conflict."""
    removed = queue_store.remove_queue(connection, check_text("queue", queue, longest=255))
    return queue_json(removed, _owners(connection))


def queue_json(queue: Queue, owners: dict[str, Tenant]) -> Json:
    return {
        "name": queue.name,
        "tenant": None if queue.tenant_id is None else owners[queue.tenant_id].name,
        "quota": queue.quota,
        "borrow": queue.borrow,
        "weight": queue.weight,
        "created_at": queue.created_at.isoformat(),
    }


def create_reservation(
    connection: Connection,
    *,
    tenant: str,
    kind: str,
    devices: int,
    start: str,
    end: str,
    lend: bool,
    price: str | None,
    site: str,
    zone: str,
    now: datetime,
) -> Json:
    """Keep devices for a tenant, at the standard price of their kind unless another was agreed.

    Raises NotFound, BadInput.
    """
    owner = tenant_named(connection, tenant)
    kind = check_text("kind", kind, longest=64)
    if not 1 <= devices <= MAX_DEVICES:
        raise BadInput(f"devices must be from 1 to {MAX_DEVICES:,}, not {devices:,}.", param="devices")
    starts_at = now if start.strip().lower() == NOW else _read_start(start, zone=zone, now=now)
    ends_at = read_expiry("to", end, zone=zone, now=starts_at)
    if price is not None:
        try:
            hour = check_hour(read_amount("price", price))
        except LedgerError as error:
            raise BadInput(f"price: {error}.", param="price") from error
    else:
        prices = current_device_prices(connection, now)
        standard = prices.get((kind, owner.currency, DeviceTier.STANDARD))
        if standard is None:
            known = sorted({each for each, currency, _ in prices if currency == owner.currency})
            hint = did_you_mean(kind, known) or "Add it to [device_prices], or set a price with --price."
            raise BadInput(f"kind: {kind!r} has no price in {owner.currency}.", hint=hint, param="kind")
        hour = standard.hour
    agreed = agreed_price(connection, kind=kind, currency=owner.currency, hour=hour, now=now)
    reservation = Reservation(
        reservation_id=new_id("res"),
        tenant_id=owner.tenant_id,
        kind=kind,
        devices=devices,
        starts_at=starts_at,
        ends_at=ends_at,
        lend=lend,
        price_id=agreed.price_id,
        created_at=now,
        site=site,
    )
    reservation_store.create_reservation(connection, reservation)
    return _described(connection, [reservation])[0]


def list_reservations(connection: Connection, tenant: str | None, *, over: bool = False) -> Json:
    """The reservations of a tenant, or of all; with `over` those too that have ended. Raises NotFound."""
    tenant_id = None if tenant is None else tenant_named(connection, tenant).tenant_id
    found = reservation_store.list_reservations(connection, tenant_id=tenant_id, states=() if over else OPEN)
    return {"reservations": _described(connection, found)}


def cancel_reservation(connection: Connection, reservation: str, *, now: datetime) -> Json:
    """Give a reservation up; it is billed until now. Raises NotFound, Conflict."""
    given = check_text("reservation", reservation, longest=255)
    cancelled = reservation_store.cancel_reservation(connection, given, "cancelled by the operator", now=now)
    return _described(connection, [cancelled])[0]


def _described(connection: Connection, found: list[Reservation]) -> list[Json]:
    owners = _owners(connection)
    versions = device_price_versions(connection, {each.price_id for each in found})
    prices = {version.price_id: version for version in versions}
    return [
        {
            "id": each.reservation_id,
            "tenant": owners[each.tenant_id].name,
            "kind": each.kind,
            "devices": each.devices,
            "starts_at": each.starts_at.isoformat(),
            "ends_at": each.ends_at.isoformat(),
            "lend": each.lend,
            "state": each.state.value,
            "reason": each.reason,
            "price_id": each.price_id,
            "price_per_hour": format_amount(prices[each.price_id].hour),
            "currency": prices[each.price_id].currency,
        }
        for each in found
    ]


def _owners(connection: Connection) -> dict[str, Tenant]:
    return {each.tenant_id: each for each in list_tenants(connection)}


def _read_start(text: str, *, zone: str, now: datetime) -> datetime:
    """A time from now, a day (from its beginning), or an instant. Raises BadInput, also for what is over."""
    try:
        begins = datetime.fromisoformat(text.strip())
    except ValueError:
        return read_expiry("from", text, zone=zone, now=now)
    begins = (begins if begins.tzinfo else begins.replace(tzinfo=zone_named(zone))).astimezone(UTC)
    if not now <= begins or begins.year > now.year + 100:
        raise BadInput(f"from: {text[:80]} is in the past, or too far in the future.", param="from")
    return begins
