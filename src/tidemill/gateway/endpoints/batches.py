"""/v1/batches: create, list and cancel batches. `work.batches.runner` runs them in its own process.

Source: OpenAI API reference, "Batch".
"""

from collections.abc import Collection
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta

import msgspec

from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.endpoints.files import expiry_of, id_of
from tidemill.gateway.endpoints.pagination import limit_of, page, query_of
from tidemill.gateway.endpoints.tenant_api import Routes, TenantApi
from tidemill.gateway.errors import BadRequest
from tidemill.http.server import Exchange
from tidemill.store.batches import Batch, ask_to_cancel, create_batch, find_batch, list_batches
from tidemill.store.engine import Store
from tidemill.store.ids import new_id

_encode = msgspec.json.Encoder().encode

WINDOW = "24h"
WINDOW_S = 86_400
ENDPOINTS = (b"/v1/chat/completions", b"/v1/completions", b"/v1/embeddings", b"/v1/responses")
"""What the lines of a batch may ask for, where the gateway has it."""
MAX_METADATA = (16, 64, 512)
"""Pairs, letters of a key, letters of a value: OpenAI's limits."""


class BatchRules(msgspec.Struct, frozen=True):
    """The limits of batches, from the configuration."""

    tenant_open: int
    """Unfinished batches that a tenant may have."""


class _Expiry(msgspec.Struct, forbid_unknown_fields=True):
    anchor: str
    seconds: int


class _Create(msgspec.Struct, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: _Expiry | None = None


_decode_create = msgspec.json.Decoder(_Create).decode


class BatchEndpoints(TenantApi):
    """The Batch API of one gateway process."""

    def __init__(
        self,
        authenticator: Authenticator,
        store: Store,
        rules: BatchRules,
        executor: Executor,
        *,
        operations: Collection[bytes],
    ) -> None:
        super().__init__(authenticator, store, executor)
        self._rules = rules
        self._endpoints = [path.decode() for path in ENDPOINTS if path in operations]

    @property
    def routes(self) -> Routes:
        return {
            (b"POST", b"/v1/batches"): self._create,
            (b"GET", b"/v1/batches"): self._list,
            (b"GET", b"/v1/batches/{id}"): self._retrieve,
            (b"POST", b"/v1/batches/{id}/cancel"): self._cancel,
        }

    async def _create(self, exchange: Exchange) -> None:
        principal = await self.authenticate(exchange)
        wish = self._read(exchange.body)
        expiry = wish.output_expires_after
        now = datetime.now(UTC)
        batch = Batch(
            batch_id=new_id("batch"),
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            site="",  # that of its input file
            endpoint=wish.endpoint,
            input_file_id=wish.input_file_id,
            completion_window=wish.completion_window,
            metadata=wish.metadata,
            output_expires_s=None
            if expiry is None
            else expiry_of(expiry.anchor, expiry.seconds, "output_expires_after"),
            created_at=now,
            expires_at=now + timedelta(seconds=WINDOW_S),
        )

        def write() -> None:
            with self._store.write() as connection:
                create_batch(connection, batch, max_open=self._rules.tenant_open)

        await self.in_thread(write)
        self.answer(exchange, batch_json(batch))

    def _read(self, body: bytes) -> _Create:
        try:
            wish = _decode_create(body or b"{}")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(f"The request is not valid for a batch: {error}.") from error
        if wish.endpoint not in self._endpoints:
            raise BadRequest(
                f"The endpoint {wish.endpoint[:80]!r} is not supported for batches.",
                hint=f"Choose one of: {', '.join(self._endpoints)}.",
                param="endpoint",
            )
        if wish.completion_window != WINDOW:
            raise BadRequest(f"'completion_window' must be {WINDOW!r}.", param="completion_window")
        pairs, key_letters, value_letters = MAX_METADATA
        metadata = wish.metadata or {}
        if len(metadata) > pairs:
            raise BadRequest(f"'metadata' can have at most {pairs} pairs.", param="metadata")
        for key, value in metadata.items():
            if len(key) > key_letters or len(value) > value_letters:
                raise BadRequest(
                    f"'metadata' keys can have at most {key_letters} characters, and values {value_letters}.",
                    param="metadata",
                )
        return wish

    async def _list(self, exchange: Exchange) -> None:
        principal = await self.authenticate(exchange)
        query = query_of(exchange)
        limit = limit_of(query, default=20, highest=100)

        def read() -> list[Batch]:
            with self._store.read() as connection:
                return list_batches(
                    connection, tenant_id=principal.tenant_id, limit=limit + 1, after=query.get("after")
                )

        found = await self.in_thread(read)
        self.answer(exchange, page([batch_json(batch) for batch in found], limit))

    async def _retrieve(self, exchange: Exchange) -> None:
        principal = await self.authenticate(exchange)
        batch_id = id_of(exchange)

        def read() -> Batch:
            with self._store.read() as connection:
                return find_batch(connection, tenant_id=principal.tenant_id, batch_id=batch_id)

        self.answer(exchange, batch_json(await self.in_thread(read)))

    async def _cancel(self, exchange: Exchange) -> None:
        principal = await self.authenticate(exchange)
        batch_id = id_of(exchange)

        def write() -> Batch:
            with self._store.write() as connection:
                return ask_to_cancel(
                    connection, tenant_id=principal.tenant_id, batch_id=batch_id, now=datetime.now(UTC)
                )

        self.answer(exchange, batch_json(await self.in_thread(write)))


def batch_json(batch: Batch) -> dict[str, object]:
    """OpenAI's Batch object."""
    counts = batch.counts
    errors = [
        {"code": error.code, "message": error.message, "param": error.param, "line": error.line}
        for error in batch.errors
    ]
    return {
        "id": batch.batch_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created_at.timestamp()),
        "in_progress_at": _seconds(batch.in_progress_at),
        "expires_at": int(batch.expires_at.timestamp()),
        "finalizing_at": _seconds(batch.finalizing_at),
        "completed_at": _seconds(batch.completed_at),
        "failed_at": _seconds(batch.failed_at),
        "expired_at": _seconds(batch.expired_at),
        "cancelling_at": _seconds(batch.cancelling_at),
        "cancelled_at": _seconds(batch.cancelled_at),
        "request_counts": {"total": batch.total, "completed": counts.completed, "failed": counts.failed},
        "usage": {
            "input_tokens": counts.input_tokens,
            "input_tokens_details": {"cached_tokens": counts.cached_tokens},
            "output_tokens": counts.output_tokens,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
            "total_tokens": counts.input_tokens + counts.output_tokens,
        },
        "metadata": batch.metadata,
    }


def _seconds(instant: datetime | None) -> int | None:
    return None if instant is None else int(instant.timestamp())
