"""What the control plane needs of the running platform, and nothing else of it.

Protocols, because the supervisor that provides them lives in `app`, which knows nothing of the control plane.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from prometheus_client.metrics_core import Metric

from tidemill.fleet.roll import RollState
from tidemill.fleet.status import FleetStatus
from tidemill.ledger.money import Nanos
from tidemill.ledger.pricing import Price
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_submission import JobLimits


class PlatformModel(Protocol):
    """A model that the platform serves, as it is now."""

    @property
    def name(self) -> str: ...
    @property
    def engine(self) -> str:
        """The engine's kind: `llamacpp`, `openai`."""
        ...

    @property
    def state(self) -> str:
        """`ready`, or why it is not: `starting`, `failed`, `stopped`."""
        ...

    @property
    def replicas_ready(self) -> int: ...
    @property
    def replicas_total(self) -> int: ...
    @property
    def endpoint(self) -> str | None:
        """The address of its engine; none while nothing listens."""
        ...

    @property
    def cost_per_hour(self) -> Nanos:
        """What one replica costs the operator an hour, in the installation's currency."""
        ...

    @property
    def token_cost(self) -> Price | None:
        """What an upstream bills the operator for its tokens, in the installation's currency; None: nothing."""
        ...


class PlatformStatus(Protocol):
    """How the platform does."""

    @property
    def version(self) -> str: ...
    @property
    def state(self) -> str:
        """`starting`, `ready` or `draining`."""
        ...

    @property
    def started_at(self) -> datetime: ...
    @property
    def gateway_url(self) -> str:
        """Where tenants send their requests."""
        ...

    @property
    def workers_ready(self) -> int: ...
    @property
    def workers_total(self) -> int:
        """Gateway processes."""
        ...


class MeterReport(Protocol):
    """The records set against the engines' own counters."""

    def to_json(self) -> dict[str, object]: ...
    def to_text(self) -> str: ...


class Platform(Protocol):
    """The running platform. Its methods are called on the event loop and do not block it.

    They raise Unavailable when a part that they need does not answer.
    """

    @property
    def store(self) -> Store: ...
    @property
    def zone(self) -> str:
        """IANA name of the time zone whose midnights bound a billing month."""
        ...

    @property
    def currency(self) -> str:
        """The installation's currency: that of its costs, and of a tenant for whom no other is named."""
        ...

    @property
    def issuer(self) -> str:
        """Who sends the invoices; may be empty."""
        ...

    @property
    def job_limits(self) -> JobLimits:
        """The rules of jobs."""
        ...

    @property
    def job_files(self) -> JobFiles:
        """Logs and artefacts of jobs."""
        ...

    def wake_jobs(self) -> None:
        """Jobs, queues or reservations have changed in the store: look there now."""
        ...

    async def drain_usage(self) -> None:
        """All that was settled until now is in the store afterwards. Before any read of usage or a balance."""
        ...

    async def announce(self) -> None:
        """The gateways have loaded what the store holds now: tenants, keys, prices, balances.

        After each change.
        """
        ...

    def models(self) -> Sequence[PlatformModel]: ...

    def status(self) -> PlatformStatus: ...

    def roll(self, model: str, path: str, version: str) -> RollState:
        """Begin to roll a model to other weights. Raises NotFound, Conflict, BadInput."""
        ...

    def rolls(self) -> Sequence[RollState]:
        """The last roll of each model since the platform's start."""
        ...

    def fleet(self) -> FleetStatus:
        """Nodes, devices and replicas, and what waits, as of the last plan."""
        ...

    async def drain(self, name: str, why: str) -> None:
        """Take a node or a device out of the fleet. Raises NotFound."""
        ...

    async def undrain(self, name: str) -> None:
        """Put it back. Raises NotFound when it was not taken out."""
        ...

    @property
    def metrics_open(self) -> bool:
        """`/metrics` needs no admin token."""
        ...

    async def metrics(self) -> Sequence[Metric]:
        """The figures of `/metrics`."""
        ...

    async def reconcile(self) -> MeterReport:
        """Sample the engines' counters and compare them with the records settled until then."""
        ...
