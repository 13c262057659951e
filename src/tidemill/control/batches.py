"""Batches as operators see them: those of all tenants, with what they have cost.

Plain values in and out.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection

from tidemill.control.names import tenant_named
from tidemill.control.pages import PAGE, check_limit
from tidemill.errors import NotFound
from tidemill.ledger.money import format_amount
from tidemill.store import batches as batch_store
from tidemill.store.batches import Batch
from tidemill.store.tenants import list_tenants
from tidemill.store.usage import batch_charge

Json = dict[str, Any]


def list_batches(
    connection: Connection, tenant: str | None = None, *, unfinished: bool = False, limit: int = PAGE, after: str = ""
) -> Json:
    """A page of batches, newest first, of all tenants or of one.

    `next` is the `after` of the next page, or None.

    Raises NotFound, BadInput.
    """
    check_limit(limit)
    owner = None if tenant is None else tenant_named(connection, tenant).tenant_id
    last = _find(connection, after) if after else None
    found = batch_store.batches_of_all(connection, tenant_id=owner, unfinished=unfinished, limit=limit + 1, behind=last)
    names = _names(connection)
    return {
        "batches": [_json(batch, names) for batch in found[:limit]],
        "next": found[limit - 1].batch_id if len(found) > limit else None,
    }


def show_batch(connection: Connection, batch_id: str) -> Json:
    """One batch, with its errors and what its lines have cost until now. Raises NotFound."""
    return _whole(connection, _find(connection, batch_id))


def cancel_batch(connection: Connection, batch_id: str, *, now: datetime) -> Json:
    """Have a batch cancelled, as its tenant may. Raises NotFound; Conflict when all its lines are done."""
    batch = _find(connection, batch_id)
    asked = batch_store.ask_to_cancel(connection, tenant_id=batch.tenant_id, batch_id=batch.batch_id, now=now)
    return _whole(connection, asked)


def _find(connection: Connection, batch_id: str) -> Batch:
    found = batch_store.any_batch(connection, batch_id)
    if found is None:
        raise NotFound(f"There is no batch {batch_id[:80]!r}.", hint="`tidemill batch list` lists them.", param="batch")
    return found


def _whole(connection: Connection, batch: Batch) -> Json:
    return {
        **_json(batch, _names(connection)),
        "charge": format_amount(batch_charge(connection, batch.batch_id)),
        "errors": [msgspec.structs.asdict(error) for error in batch.errors],
    }


def _names(connection: Connection) -> dict[str, tuple[str, str]]:
    return {tenant.tenant_id: (tenant.name, tenant.currency) for tenant in list_tenants(connection)}


def _json(batch: Batch, names: Mapping[str, tuple[str, str]]) -> Json:
    counts = batch.counts
    ended = batch.completed_at or batch.failed_at or batch.expired_at or batch.cancelled_at
    if not batch.finished:
        ended = None  # a batch that expires is finalized after that
    tenant, currency = names[batch.tenant_id]
    return {
        "id": batch.batch_id,
        "tenant": tenant,
        "currency": currency,
        "key_id": batch.key_id,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "status": batch.status.value,
        "total": batch.total,
        "completed": counts.completed,
        "failed": counts.failed,
        "input_tokens": counts.input_tokens,
        "cached_tokens": counts.cached_tokens,
        "output_tokens": counts.output_tokens,
        "input_file_id": batch.input_file_id,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at.isoformat(),
        "expires_at": batch.expires_at.isoformat(),
        "ended_at": None if ended is None else ended.isoformat(),
    }
