"""On which kinds of devices a job may run.

Those that it names, and that have a price in its tenant's currency.
"""

from collections.abc import Mapping

from tidemill.ledger.devices import DevicePrice, DeviceTier
from tidemill.store.jobs import Job

DevicePrices = Mapping[tuple[str, str, DeviceTier], DevicePrice]
"""Prices in force by kind, currency and tier."""
CPU = "cpu"
UNPRICED = "none-has-a-price"
"""A kind that no device is of: for a job that nothing can run, as long as there is no price."""


def kinds_of(job: Job, currency: str, prices: DevicePrices) -> tuple[str, ...]:
    """The kinds for a job, the best first.

    One that names none is not for processors as long as there is anything else.

    On what its tenant has reserved it runs without a price.
    """
    if job.reservation_id is not None:
        return job.spec.kinds
    tier = tier_of(job)
    priced = sorted(kind for kind, code, each in prices if code == currency and each is tier)
    if job.spec.kinds:
        wanted = tuple(kind for kind in job.spec.kinds if kind in priced)
    else:
        wanted = tuple(kind for kind in priced if kind != CPU) or tuple(priced)
    return wanted or (UNPRICED,)


def tier_of(job: Job) -> DeviceTier:
    """Which price its device time has."""
    return DeviceTier.PREEMPTIBLE if job.preemptible else DeviceTier.STANDARD
