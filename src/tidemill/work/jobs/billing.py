"""Meters of jobs that run, read again and again; those go whose time is not covered any more."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

import msgspec

from tidemill.store.device_meters import InsufficientBalance, MeterReading
from tidemill.work.jobs.active_job import ActiveJob, ActiveMeter
from tidemill.work.jobs.attempt_store import AttemptStore, NoPrice
from tidemill.work.jobs.launch import RunningAttempt, StopCause
from tidemill.work.store_threads import StoreThreads

UNPAID = "insufficient balance"
_MICROSECOND = timedelta(microseconds=1)


class JobBilling:
    """Billing of running jobs. `request_stop` has a job checkpoint and end."""

    def __init__(
        self, ledger: AttemptStore, threads: StoreThreads, request_stop: Callable[[ActiveJob, StopCause, str], None]
    ) -> None:
        self._ledger = ledger
        self._threads = threads
        self._request_stop = request_stop

    async def read(self, jobs: Sequence[ActiveJob]) -> None:
        """Read every meter up to now. Raises Unavailable; what was not read is read the next time."""
        by_tenant: dict[str, list[MeterReading]] = {}
        by_meter: dict[str, ActiveJob] = {}
        for active in jobs:
            if active.run is None or not active.meters:
                continue
            elapsed_us = active.run.elapsed_us()
            for each in active.meters:
                reading = MeterReading(
                    meter_id=each.meter.meter_id, until=each.until(elapsed_us), hold_s=self._ledger.hold_s(active.job)
                )
                by_tenant.setdefault(active.job.tenant_id, []).append(reading)
                by_meter[each.meter.meter_id] = active
        for tenant_id, readings in by_tenant.items():
            covered = await self._threads.do(self._ledger.read, tenant_id, readings)
            for meter_id, enough in covered.items():
                if not enough:
                    self._request_stop(by_meter[meter_id], StopCause.UNPAID, UNPAID)

    async def leave_reservation(self, active: ActiveJob, run: RunningAttempt, now: datetime) -> None:
        """The reservation that a job runs on is over: bill it from its end on, or have it go."""
        assert active.attempt is not None
        origin_us = run.elapsed_us()
        try:
            meters = await self._threads.do(self._ledger.begin_billing, active.job, active.attempt, now)
        except (InsufficientBalance, NoPrice) as error:
            self._request_stop(active, StopCause.UNPAID, f"its reservation is over, and: {error.message}")
            return
        if active.run is run:  # else it has ended meanwhile
            active.job = msgspec.structs.replace(active.job, reservation_id=None)
            # Some time has passed since the reservation's end; more if this is not the first try.
            active.meters = [
                ActiveMeter(meter, origin_us - (now - meter.started_at) // _MICROSECOND) for meter in meters
            ]
