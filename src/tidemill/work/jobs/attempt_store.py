"""What the job controller writes into the store: attempts begun and ended together with their meters.

Blocks on the store.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import Connection

from tidemill.errors import TidemillError
from tidemill.fleet.backend import Device
from tidemill.ledger.devices import DeviceMeter
from tidemill.store.device_meters import (
    MeterReading,
    MeterStart,
    begin_meters,
    last_reading,
    open_meters,
    read_meters,
    start_meters,
)
from tidemill.store.device_prices import current_device_prices
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_transitions import begin_attempt, end_attempt, leave_reservation, note_running, still_open
from tidemill.store.jobs import AssignedDevice, Attempt, AttemptOutcome, Job, JobState, devices_on, ended_before
from tidemill.store.reservations import ReservationState, find_reservation
from tidemill.store.tenants import find_tenant
from tidemill.work.jobs.device_kinds import tier_of

TICK_S = 10.0
"""How often meters are read."""
SLACK_S = 20.0
"""What is held beyond that and a job's grace: for a process that has to be killed, and a store that is slow."""


class NoPrice(TidemillError):
    """A kind of device has no price in the tenant's currency."""

    status = 400
    code = "no_price"


class NotReserved(TidemillError):
    """The reservation that a job is to run on is not in force, or its devices are all in use."""

    status = 409
    code = "not_reserved"


class AttemptEnd(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be written down at an attempt's end."""

    outcome: AttemptOutcome
    exit_code: int | None
    reason: str
    ran_us: int
    becomes: JobState
    job_reason: str
    not_before: datetime | None = None


class AttemptStore:
    """Money and states of jobs, in one transaction each."""

    def __init__(self, store: Store, zone: str, *, tick_s: float = TICK_S) -> None:
        self._store = store
        self._zone = zone
        self.tick_s = tick_s

    def hold_s(self, job: Job) -> float:
        """The time that is held for, seconds: until the next reading, and until the job can have been ended."""
        return self.tick_s + job.spec.grace_s + SLACK_S

    def begin(self, job: Job, devices: Sequence[Device], *, ranks: int, why: str, now: datetime) -> Attempt | None:
        """Begin an attempt of a waiting job and hold what it can cost; None when it does not wait any more.

        Raises InsufficientBalance, NoPrice, NotReserved; then nothing has changed.
        """
        with self._store.write() as connection:
            places = [AssignedDevice(device.id, device.node, device.kind) for device in devices]
            attempt = begin_attempt(connection, job.job_id, devices=places, ranks=ranks, why=why, now=now)
            if attempt is None:
                return None
            if job.reservation_id is None:
                self._meter(connection, job, attempt, now)
            else:
                self._check_reserved(connection, job.reservation_id)
            return attempt

    def start(self, attempt: Attempt, now: datetime) -> list[DeviceMeter]:
        """The attempt's processes run; gives its meters."""
        with self._store.write() as connection:
            note_running(connection, attempt, now)
            return start_meters(connection, job_id=attempt.job_id, attempt=attempt.attempt, at=now)

    def begin_billing(self, job: Job, attempt: Attempt, now: datetime) -> list[DeviceMeter]:
        """The reservation that it ran on is over.

        Bill it like any other from there on, however late that is noticed.

        Gives its meters: none when it has ended by now, those that there are when this is repeated. Raises
        InsufficientBalance, NoPrice.
        """
        with self._store.write() as connection:
            if not still_open(connection, attempt):
                return []
            begun = open_meters(connection, job_id=job.job_id, attempt=attempt.attempt)
            if begun or job.reservation_id is None:
                return begun
            over = find_reservation(connection, job.reservation_id)
            reserved_until = min(over.ends_at, now)
            billed_until = last_reading(connection, reservation_id=over.reservation_id)
            started_at = max(attempt.started_at or attempt.taken_at, reserved_until, billed_until or reserved_until)
            meters = self._meter(connection, job, attempt, now, started_at)
            leave_reservation(connection, job.job_id)
            return meters

    def read(self, tenant_id: str, readings: Sequence[MeterReading]) -> dict[str, bool]:
        """Read meters of a tenant; says of each whether its hold could be renewed."""
        with self._store.write() as connection:
            return read_meters(connection, tenant_id, readings, zone=self._zone)

    def end(
        self,
        job: Job,
        attempt: Attempt,
        elapsed_us: int,
        ending: AttemptEnd,
        *,
        later: Mapping[str, datetime] | None = None,
    ) -> datetime:
        """Bill the rest and write the end down; repeating it changes nothing. Gives the instant of the end.

        `later`: the ends of meters that did not begin with the attempt.
        """
        began = attempt.started_at or attempt.taken_at
        ended_at = began + timedelta(microseconds=elapsed_us)
        with self._store.write() as connection:
            if not still_open(connection, attempt):  # locked first, so that no meter begins meanwhile
                return ended_at
            meters = open_meters(connection, job_id=job.job_id, attempt=attempt.attempt)
            self._close(connection, job, meters, ended_at, later or {})
            end_attempt(
                connection,
                attempt,
                outcome=ending.outcome,
                exit_code=ending.exit_code,
                reason=ending.reason,
                ended_at=ended_at,
                ran_us=ending.ran_us,
                becomes=ending.becomes,
                job_reason=ending.job_reason,
                not_before=ending.not_before,
            )
            return ended_at

    def leave_reservation(self, job: Job) -> None:
        """The reservation that it waits for is over."""
        with self._store.write() as connection:
            leave_reservation(connection, job.job_id)

    def sweep(self, files: JobFiles, before: datetime) -> int:
        """Remove the files of jobs that were over before that instant; gives how many there were."""
        with self._store.read() as connection:
            over = set(ended_before(connection, files.site, before)) & set(files.kept())
        for job_id in over:
            files.remove(job_id)
        return len(over)

    def _close(
        self,
        connection: Connection,
        job: Job,
        meters: Sequence[DeviceMeter],
        ended_at: datetime,
        later: Mapping[str, datetime],
    ) -> None:
        readings = [
            MeterReading(
                meter_id=meter.meter_id,
                until=max(later.get(meter.meter_id, ended_at), meter.billed_until),
                final=True,
            )
            for meter in meters
        ]
        if readings:
            read_meters(connection, job.tenant_id, readings, zone=self._zone)

    def _check_reserved(self, connection: Connection, reservation_id: str) -> None:
        """What runs on a reservation is not billed, so it must not be more than is. Raises NotReserved."""
        reservation = find_reservation(connection, reservation_id, lock=True)
        if reservation.state is not ReservationState.ACTIVE:
            raise NotReserved(f"The reservation {reservation_id} is not in force: {reservation.state}.")
        if devices_on(connection, reservation_id) > reservation.devices:
            raise NotReserved(f"The reservation {reservation_id} has {reservation.devices} devices, and jobs on them.")

    def _meter(
        self, connection: Connection, job: Job, attempt: Attempt, now: datetime, started_at: datetime | None = None
    ) -> list[DeviceMeter]:
        owner = find_tenant(connection, job.tenant_id)
        prices = current_device_prices(connection, now)
        tier = tier_of(job)
        starts = []
        for kind, count in sorted(Counter(place.kind for place in attempt.devices).items()):
            price = prices.get((kind, owner.currency, tier))
            if price is None:
                raise NoPrice(f"There is no price for {kind} in {owner.currency}.")
            starts.append(
                MeterStart(
                    price=price,
                    tier=tier,
                    devices=count,
                    hold_s=self.hold_s(job),
                    job_id=job.job_id,
                    attempt=attempt.attempt,
                )
            )
        return begin_meters(
            connection, tenant_id=owner.tenant_id, currency=owner.currency, starts=starts, now=started_at or now
        )
