"""/api/v1/status, /api/v1/meter/reconcile, /api/v1/ledger/check.

How the platform does, and whether it counts right.
"""

from typing import Annotated, Any

from litestar import get
from litestar.enums import MediaType
from msgspec import Meta

from tidemill.control.api.access import Running, read, read_drained
from tidemill.control.api.schemas import FAILURES, Answer, Currency, Instant
from tidemill.control.ledger import check_ledger
from tidemill.store.revision import current_revision


class Status(Answer):
    """How the platform does."""

    version: str
    state: Annotated[str, Meta(examples=["ready", "starting", "draining"])]
    started_at: Instant
    gateway_url: Annotated[str, Meta(description="Where tenants send their requests.")]
    workers_ready: int
    workers_total: Annotated[int, Meta(description="Gateway processes.")]
    currency: Currency
    zone: Annotated[str, Meta(description="The time zone whose midnights bound a billing month.")]
    revision: Annotated[int, Meta(description="Rises with each change that the gateways must see.")]


@get("/status", responses=FAILURES)
async def get_status(platform: Running) -> Status:
    """How the platform does."""
    status = platform.status()
    return Status(
        version=status.version,
        state=status.state,
        started_at=status.started_at.isoformat(),
        gateway_url=status.gateway_url,
        workers_ready=status.workers_ready,
        workers_total=status.workers_total,
        currency=platform.currency,
        zone=platform.zone,
        revision=await read(platform, current_revision),
    )


@get("/meter/reconcile", responses=FAILURES)
async def reconcile(platform: Running) -> dict[str, Any]:
    """Compare the usage records with the engines' own token counters, and name the differences."""
    return (await platform.reconcile()).to_json()


@get("/meter/reconcile/text", media_type=MediaType.TEXT, responses=FAILURES)
async def reconcile_text(platform: Running) -> str:
    """The same for a terminal."""
    return (await platform.reconcile()).to_text()


class LedgerChecked(Answer):
    """How many of each were compared."""

    accounts: int
    transactions: int
    budgets: Annotated[int, Meta(description="Periods of budgets.")]
    meters: Annotated[int, Meta(description="Meters of devices, of jobs and reservations.")]


class LedgerCheck(Answer):
    """Whether each kept sum is what it is the sum of."""

    equal: bool
    checked: LedgerChecked
    differences: Annotated[list[str], Meta(description="What differs, and by how much; empty if all is well.")]


@get("/ledger/check", responses=FAILURES)
async def check(platform: Running) -> LedgerCheck:
    """Compare balances with entries, budgets with usage records, and meters with charges.

    A big store takes minutes.
    """
    found = await read_drained(platform, lambda connection: check_ledger(connection, zone=platform.zone))
    return LedgerCheck(found["equal"], LedgerChecked(**found["checked"]), found["differences"])
