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
    """The money of a job book. `ask_to_go` has a job checkpoint and end."""

    def __init__(
        self, ledger: AttemptStore, threads: StoreThreads, ask_to_go: Callable[[ActiveJob, StopCause, str], None]
    ) -> None:
        self._ledger = ledger
        self._threads = threads
        self._ask_to_go = ask_to_go

    async def read(self, hands: Sequence[ActiveJob]) -> None:
        """Read every meter up to now. Raises Unavailable; what was not read is read the next time."""
        by_tenant: dict[str, list[MeterReading]] = {}
        by_meter: dict[str, ActiveJob] = {}
        for hand in hands:
            if hand.run is None or not hand.meters:
                continue
            elapsed_us = hand.run.elapsed_us()
            for each in hand.meters:
                wish = MeterReading(
                    meter_id=each.meter.meter_id, until=each.until(elapsed_us), hold_s=self._ledger.hold_s(hand.job)
                )
                by_tenant.setdefault(hand.job.tenant_id, []).append(wish)
                by_meter[each.meter.meter_id] = hand
        for tenant_id, wishes in by_tenant.items():
            covered = await self._threads.do(self._ledger.read, tenant_id, wishes)
            for meter_id, enough in covered.items():
                if not enough:
                    self._ask_to_go(by_meter[meter_id], StopCause.UNPAID, UNPAID)

    async def leave_reservation(self, hand: ActiveJob, run: RunningAttempt, now: datetime) -> None:
        """The reservation that a job runs on is over: bill it from its end on, or have it go."""
        assert hand.attempt is not None
        origin_us = run.elapsed_us()
        try:
            meters = await self._threads.do(self._ledger.begin_billing, hand.job, hand.attempt, now)
        except (InsufficientBalance, NoPrice) as error:
            self._ask_to_go(hand, StopCause.UNPAID, f"its reservation is over, and: {error.message}")
            return
        if hand.run is run:  # else it has ended meanwhile
            hand.job = msgspec.structs.replace(hand.job, reservation_id=None)
            # Some time has passed since the reservation's end; more if this is not the first try.
            hand.meters = [ActiveMeter(meter, origin_us - (now - meter.started_at) // _MICROSECOND) for meter in meters]
