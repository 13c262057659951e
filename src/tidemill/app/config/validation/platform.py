"""The parts of the configuration that are about jobs: what device time costs, and who may run what."""

from typing import Any

import msgspec

from tidemill.errors import ConfigError
from tidemill.ledger.devices import DeviceTier, check_hour
from tidemill.ledger.money import Nanos, parse_amount, round_ratio


class DevicePriceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[device_prices.KIND]` or `[device_prices.KIND.CNY]`: amounts for a device and hour, written as strings."""

    hour: str
    preemptible_hour: str | None = None
    """Of jobs that give their devices back when something more urgent comes; half of `hour` when not set."""

    def hours(self) -> dict[DeviceTier, Nanos]:
        """Raises LedgerError for an amount that cannot be taken."""
        standard = check_hour(parse_amount(self.hour))
        if self.preemptible_hour is None:
            preemptible = Nanos(round_ratio(standard, 2))
        else:
            preemptible = check_hour(parse_amount(self.preemptible_hour))
        return {DeviceTier.STANDARD: standard, DeviceTier.PREEMPTIBLE: preemptible}


class JobsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[jobs]`: commands that tenants have run on devices."""

    tenants: bool = False
    """Tenants may submit jobs with their keys. Their commands run on your machines: see docs/jobs.md, Security."""
    user: str = ""
    """The Unix user that jobs run as; the platform's own when empty."""
    path: str | None = None
    """Where their files lie, relative to the configuration file; DATA/jobs when not set."""
    tenant_open: int = 100
    """Unfinished jobs that a tenant may have."""
    keep_days: float = 30.0
    """How long the files of a job are kept after its end."""
    grace_seconds: float = 60.0
    """What a job gets to checkpoint in when its owner does not say."""
    max_grace_seconds: float = 600.0
    """The most that it can ask for."""
    stop_seconds: float = 60.0
    """The most that a job gets when the platform stops."""


def check_jobs(jobs: JobsConfig, prices: dict[str, dict[str, DevicePriceConfig]]) -> None:
    """Raises ConfigError."""
    for key, low, high in (
        ("tenant_open", 1, 100_000),
        ("keep_days", 1 / 24, 3650),
        ("max_grace_seconds", 1, 86_400),
        ("grace_seconds", 0, jobs.max_grace_seconds),
        ("stop_seconds", 0, 86_400),
    ):
        value: Any = getattr(jobs, key)
        if not low <= value <= high:
            raise ConfigError(f"jobs.{key}: {value} is out of range; it is from {low:g} to {high:g}.")
    for kind in prices:
        if not kind or len(kind) > 64 or not kind.isprintable() or "," in kind or " " in kind:
            raise ConfigError(f"device_prices.{kind}: is not a kind of device, such as cpu or h800-sxm.")
