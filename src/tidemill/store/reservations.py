"""Reservations: whole devices that are kept for a tenant for a time.

They are paid for used or not.

booked -> active -> ended
booked, active -> cancelled (by the operator, or as the balance does not cover it)
"""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, case, insert, select, update

from tidemill.clock import from_micros, to_micros
from tidemill.errors import Conflict, NotFound
from tidemill.store.tables.jobs import reservations
from tidemill.suggestions import did_you_mean


class ReservationState(StrEnum):
    BOOKED = "booked"
    """Its time has not begun."""
    ACTIVE = "active"
    ENDED = "ended"
    CANCELLED = "cancelled"


OPEN = (ReservationState.BOOKED, ReservationState.ACTIVE)


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that are kept for a tenant."""

    reservation_id: str
    tenant_id: str
    kind: str
    devices: int
    starts_at: datetime
    ends_at: datetime
    """When it was given up, if it was."""
    lend: bool = False
    """The tenant consents that idle ones are lent to preemptible work."""
    price_id: str
    state: ReservationState = ReservationState.BOOKED
    reason: str = ""
    created_at: datetime
    site: str = ""
    """Of several platforms on one store, the one whose devices these are (see `store.job_files`); empty: any."""


def create_reservation(connection: Connection, reservation: Reservation) -> None:
    """Book it."""
    values = msgspec.structs.asdict(reservation) | {"state": reservation.state.value}
    for name in ("starts_at", "ends_at", "created_at"):
        values[name] = to_micros(values[name])
    connection.execute(insert(reservations).values(**values))


def find_reservation(connection: Connection, reservation_id: str, *, lock: bool = False) -> Reservation:
    """A reservation by its id; with `lock` nobody else changes it until the commit.

    Raises NotFound with the nearest one.
    """
    query = select(reservations).where(reservations.c.reservation_id == reservation_id)
    row = connection.execute(query.with_for_update() if lock else query).first()
    if row is None:
        known = [str(each) for each in connection.execute(select(reservations.c.reservation_id)).scalars()]
        hint = did_you_mean(reservation_id, known)
        raise NotFound(f"There is no reservation {reservation_id[:80]!r}.", hint=hint, param="reservation")
    return _reservation(row)


def list_reservations(
    connection: Connection,
    *,
    tenant_id: str | None = None,
    states: Sequence[ReservationState] = (),
    site: str | None = None,
) -> list[Reservation]:
    """Reservations by their beginning."""
    query = select(reservations)
    if tenant_id is not None:
        query = query.where(reservations.c.tenant_id == tenant_id)
    if states:
        query = query.where(reservations.c.state.in_([state.value for state in states]))
    if site is not None:
        query = query.where(reservations.c.site.in_([site, ""]))
    query = query.order_by(reservations.c.starts_at, reservations.c.reservation_id)
    return [_reservation(row) for row in connection.execute(query)]


def claim_strays(connection: Connection, site: str) -> None:
    """Open reservations that were booked before there were sites belong to this one from now on."""
    states = [state.value for state in OPEN]
    strays = (reservations.c.site == "", reservations.c.state.in_(states))
    connection.execute(update(reservations).where(*strays).values(site=site))


def step_reservation(
    connection: Connection,
    reservation_id: str,
    leaving: Sequence[ReservationState],
    state: ReservationState,
    reason: str = "",
) -> bool:
    """Move a reservation on; False when it is in another state by now."""
    where = (
        reservations.c.reservation_id == reservation_id,
        reservations.c.state.in_([each.value for each in leaving]),
    )
    changed = connection.execute(update(reservations).where(*where).values(state=state.value, reason=reason[:500]))
    return changed.rowcount == 1


def give_up(connection: Connection, reservation_id: str, reason: str, *, now: datetime) -> bool:
    """End a reservation before its time, at `now`, or at its start if that is to come.

    False when it was over.

    Its meter is ended by the job book, at that instant however late it comes to it.
    """
    if not step_reservation(connection, reservation_id, OPEN, ReservationState.CANCELLED, reason):
        return False
    at, starts_at, ends_at = to_micros(now), reservations.c.starts_at, reservations.c.ends_at
    connection.execute(
        update(reservations)
        .where(reservations.c.reservation_id == reservation_id)
        .values(ends_at=case((starts_at > at, starts_at), (ends_at > at, at), else_=ends_at))
    )
    return True


def cancel_reservation(connection: Connection, reservation_id: str, reason: str, *, now: datetime) -> Reservation:
    """Give a reservation up (see `give_up`). Raises NotFound; Conflict when it is over."""
    if not give_up(connection, reservation_id, reason, now=now):
        found = find_reservation(connection, reservation_id)
        raise Conflict(f"The reservation {reservation_id} is over: {found.state}.", hint="There is nothing to cancel.")
    return find_reservation(connection, reservation_id)


def _reservation(row: Row[Any]) -> Reservation:
    values: dict[str, Any] = dict(row._mapping)
    for name in ("starts_at", "ends_at", "created_at"):
        values[name] = from_micros(values[name])
    values["state"] = ReservationState(row.state)
    return Reservation(**values)
