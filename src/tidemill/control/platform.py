"""What the control plane needs of the running platform, and nothing else of it.

Protocols, because the supervisor that provides them lives in `app`, which knows nothing of the control plane.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from tidemill.ledger.money import Nanos
from tidemill.store.engine import Store


class ModelView(Protocol):
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


class ReconcileReport(Protocol):
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

    async def drain_usage(self) -> None:
        """All that was settled until now is in the store afterwards. Before any read of usage or a balance."""
        ...

    async def announce(self) -> None:
        """The gateways have loaded what the store holds now: tenants, keys, prices, balances. After each change."""
        ...

    def models(self) -> Sequence[ModelView]: ...

    def status(self) -> PlatformStatus: ...

    async def reconcile(self) -> ReconcileReport:
        """Sample the engines' counters and compare them with the records settled until then."""
        ...
