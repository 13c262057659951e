"""Reservations as they come and go.

Begun and billed on time, ended on time, or when the balance is used up.

All blocks on the store, in one thread at a time. A reservation is billed for its booked time, from `starts_at` on, used
or not: also for the time in which the platform did not run, as the devices were kept all the same.
"""

import threading
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection

from tidemill.ledger.devices import DeviceTier
from tidemill.store.device_meters import (
    InsufficientBalance,
    MeterReading,
    MeterStart,
    begin_meters,
    open_meters,
    read_meters,
)
from tidemill.store.device_prices import device_price_versions
from tidemill.store.engine import Store
from tidemill.store.reservations import (
    OPEN,
    Reservation,
    ReservationState,
    claim_strays,
    find_reservation,
    give_up,
    list_reservations,
    step_reservation,
)
from tidemill.store.tenants import find_tenant
from tidemill.tides.state import ReservationView
from tidemill.work.jobs.attempt_store import SLACK_S, AttemptStore

ABANDONED_AFTER = timedelta(minutes=10)
"""When the platform whose devices a reservation had has not ended its meter for so long, it is gone, and another one on
the same store does so."""

log = structlog.get_logger()


class ReservationController:
    """The reservations of a site that are booked or active."""

    def __init__(self, store: Store, ledger: AttemptStore, zone: str, site: str) -> None:
        self._store = store
        self._site = site
        self._zone = zone
        self._hold_s = ledger.tick_s + SLACK_S
        self._lock = threading.Lock()
        self._open: list[Reservation] = []

    def views(self) -> list[ReservationView]:
        """As the tide sees them."""
        return [
            ReservationView(
                id=each.reservation_id,
                tenant=each.tenant_id,
                devices=each.devices,
                kinds=(each.kind,),
                start=each.starts_at.timestamp(),
                end=each.ends_at.timestamp(),
                lend=each.lend,
            )
            for each in self._open
        ]

    def to_come(self, soonest: float) -> dict[str, float]:
        """When those begin that have not, Unix time; `soonest` for those that are due."""
        return {
            each.reservation_id: max(each.starts_at.timestamp(), soonest)
            for each in self._open
            if each.state is ReservationState.BOOKED
        }

    def lasts(self, reservation_id: str) -> bool:
        """Whether a reservation is to come or not over yet."""
        return any(each.reservation_id == reservation_id for each in self._open)

    def look(self, now: datetime) -> bool:
        """Take over what the store says; begin and end what is due. True when something has changed."""
        with self._lock:
            before = self._open
            with self._store.read() as connection:
                found = list_reservations(connection, states=OPEN, site=self._site)
                running = {each.reservation_id for each in open_meters(connection) if each.reservation_id}
                running -= {each.reservation_id for each in found}
                over = [find_reservation(connection, each) for each in running]
            if any(not each.site for each in found):
                with self._store.write() as connection:
                    claim_strays(connection, self._site)
                    found = list_reservations(connection, states=OPEN, site=self._site)
            due = [
                each
                for each in found
                if (each.state is ReservationState.BOOKED and each.starts_at <= now) or each.ends_at <= now
            ]
            for each in due:
                if each.state is ReservationState.BOOKED:
                    self._begin(each)
                if each.ends_at <= now:
                    self._read(each, now)
            for each in over:
                if each.site in (self._site, ""):
                    self._close(each.reservation_id, now)
                elif each.ends_at <= now - ABANDONED_AFTER:
                    self._read(each, now)
            if due:
                with self._store.read() as connection:
                    found = list_reservations(connection, states=OPEN, site=self._site)
            self._open = found
            return found != before

    def bill(self, now: datetime) -> bool:
        """Bill those that last. True when one was ended, as its time or its tenant's balance is over."""
        with self._lock:
            active = [each for each in self._open if each.state is ReservationState.ACTIVE]
            changed = [self._read(each, now) for each in active]
            if any(changed):
                with self._store.read() as connection:
                    self._open = list_reservations(connection, states=OPEN, site=self._site)
            return any(changed)

    def _begin(self, reservation: Reservation) -> None:
        """Its time has come: hold for it, and count."""
        reservation_id = reservation.reservation_id
        with self._store.write() as connection:
            if not step_reservation(connection, reservation_id, (ReservationState.BOOKED,), ReservationState.ACTIVE):
                return
            owner = find_tenant(connection, reservation.tenant_id)
            (price,) = device_price_versions(connection, {reservation.price_id})
            start = MeterStart(
                price=price,
                tier=DeviceTier.RESERVED,
                devices=reservation.devices,
                hold_s=self._hold_s,
                reservation_id=reservation_id,
            )
            try:
                begin_meters(
                    connection,
                    tenant_id=owner.tenant_id,
                    currency=owner.currency,
                    starts=[start],
                    now=reservation.starts_at,
                )
            except InsufficientBalance as error:
                self._give_up(connection, reservation, error.message, reservation.starts_at)
                return
        log.info("reservation begins", reservation=reservation_id, tenant=owner.name, devices=reservation.devices)

    def _read(self, reservation: Reservation, now: datetime) -> bool:
        """Bill a reservation up to now; True when it is over with that."""
        with self._store.write() as connection:
            reservation = find_reservation(connection, reservation.reservation_id, lock=True)  # cancelled meanwhile?
            until, final = min(now, reservation.ends_at), reservation.ends_at <= now
            covered = self._read_meters(connection, reservation, until, final=final)
            if final:
                step_reservation(connection, reservation.reservation_id, OPEN, ReservationState.ENDED)
                log.info("reservation ends", reservation=reservation.reservation_id)
                return True
            if not covered:
                self._read_meters(connection, reservation, until, final=True)
                reason = "Insufficient balance: it does not cover the next minute."
                self._give_up(connection, reservation, reason, until)
                return True
        return False

    def _read_meters(self, connection: Connection, reservation: Reservation, until: datetime, *, final: bool) -> bool:
        readings = [
            MeterReading(
                meter_id=meter.meter_id, until=max(until, meter.billed_until), hold_s=self._hold_s, final=final
            )
            for meter in open_meters(connection, reservation_id=reservation.reservation_id)
        ]
        return all(read_meters(connection, reservation.tenant_id, readings, zone=self._zone).values())

    def _close(self, reservation_id: str, now: datetime) -> None:
        """Bill one that was cancelled up to then, for the last time."""
        with self._store.write() as connection:
            reservation = find_reservation(connection, reservation_id)
            self._read_meters(connection, reservation, min(now, reservation.ends_at), final=True)

    def _give_up(self, connection: Connection, reservation: Reservation, reason: str, at: datetime) -> None:
        give_up(connection, reservation.reservation_id, reason, now=at)
        log.warning("a reservation is given up", reservation=reservation.reservation_id, reason=reason)
