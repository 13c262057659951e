"""A fleet without jobs, for tests of what else a fleet does."""

from collections.abc import Callable, Sequence

from tidemill.fleet.backend import Device
from tidemill.tides.state import JobView, QueueView, ReservationView


class NoJobs:
    """A fleet without jobs."""

    def views(self) -> Sequence[JobView]:
        return ()

    def queues(self) -> Sequence[QueueView]:
        return ()

    def reservations(self) -> Sequence[ReservationView]:
        return ()

    def start(self, job_id: str, devices: Sequence[Device], why: str) -> None:
        raise LookupError(job_id)

    def preempt(self, job_id: str, why: str) -> None:
        raise LookupError(job_id)

    def on_change(self, changed: Callable[[], None]) -> None:
        return None
