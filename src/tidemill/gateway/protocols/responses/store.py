"""The store of responses.

It is filled behind the answers, off their way, and read when a client comes back.

A finished response waits here in memory, within a bound, until a thread of its own has written it down. From then on
all gateway processes have it; this one has it from the start.
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import msgspec
import structlog

from tidemill.errors import Unavailable
from tidemill.gateway.errors import BadRequest
from tidemill.store.engine import Store
from tidemill.store.responses import (
    KEPT_S,
    MAX_CHAIN,
    KeptResponse,
    delete_response,
    find_response,
    forget_old_responses,
    keep_responses,
    prune_responses,
)

log = structlog.get_logger()

_MAX_KEPT_BYTES = 8 * 1024 * 1024
"""A longer response, with its input, is not kept."""
MAX_WAITING = 1024
MAX_WAITING_BYTES = 64 * 1024 * 1024
"""What may wait to be written; beyond that responses say that they are not kept."""
MAX_HISTORY_BYTES = 16 * 1024 * 1024
"""The input and output of all responses that one goes on from."""
IN_ONE_WRITE = 64
PRUNE_EVERY = 64
"""A tenant's bound is looked after once in so many responses (of all tenants together)."""
TRY_AGAIN_S = 1.0
GIVE_UP_S = 60.0
"""A store that does not answer for so long loses what waits."""
LOOK_AGAIN_S = 0.25
"""Another process may be about to write a response that a client asks for at once."""

_encode = msgspec.json.Encoder().encode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]


_decode_output = msgspec.json.Decoder(_Output).decode


class ResponseStoreRules(msgspec.Struct, frozen=True):
    """The operator's rules for storing responses."""

    keep_s: int = KEPT_S
    """Seconds; 0: nothing is kept."""
    by_default: bool = True
    """Also responses to requests that do not say."""


class FinishedResponse(msgspec.Struct, frozen=True):
    """A finished response on its way to the store."""

    response_id: str
    tenant_id: str
    previous_id: str | None
    items: list[msgspec.Raw]
    response: bytes


class ResponseStore:
    """The stored responses of all tenants, as one gateway process sees them."""

    def __init__(self, store: Store, rules: ResponseStoreRules = ResponseStoreRules()) -> None:  # noqa: B008
        self._store = store
        self._rules = rules
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="response_store")
        self._waiting: dict[str, KeptResponse] = {}
        self._waiting_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._written = 0

    @property
    def open(self) -> bool:
        """True if responses are stored at all."""
        return self._rules.keep_s > 0

    def keeps(self, asked: bool | None) -> bool:
        """True if a response is to be stored, given the request's `store` (None: not given)."""
        return self.open and (self._rules.by_default if asked is None else asked)

    def keep(self, kept: FinishedResponse) -> bool:
        """Store a response; False if the write queue is full."""
        response = KeptResponse(
            response_id=kept.response_id,
            tenant_id=kept.tenant_id,
            previous_id=kept.previous_id,
            input=_encode(kept.items),
            response=kept.response,
            created_us=time.time_ns() // 1000,
        )
        size = _size(response)
        if size > _MAX_KEPT_BYTES or self._waiting_bytes + size > MAX_WAITING_BYTES:
            return False
        if len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting[response.response_id] = response
        self._waiting_bytes += size
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_all())
        return True

    async def find(self, tenant_id: str, response_id: str) -> KeptResponse | None:
        """A tenant's response, or None. Raises Unavailable when the store does not answer."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._executor, self._find, tenant_id, response_id)
        if found is None:
            await asyncio.sleep(LOOK_AGAIN_S)
            found = await loop.run_in_executor(self._executor, self._find, tenant_id, response_id)
        return found

    async def delete(self, tenant_id: str, response_id: str) -> bool:
        """Delete a response; False if there was none. Raises Unavailable."""
        found = await self.find(tenant_id, response_id)
        if found is None:
            return False
        self._forget(response_id)
        await asyncio.get_running_loop().run_in_executor(self._executor, self._delete, tenant_id, response_id)
        return True

    async def history(self, tenant_id: str, response_id: str) -> list[msgspec.Raw]:
        """The items of a response and of all before it, the oldest first. Raises BadRequest, Unavailable."""
        if await self.find(tenant_id, response_id) is None:
            raise _no_history(response_id)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._history, tenant_id, response_id)

    async def sweep(self) -> None:
        """Delete expired responses. Raises Unavailable."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._sweep)

    async def close(self, within_s: float) -> None:
        """Write all pending responses."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=within_s)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        failing_since: float | None = None
        while self._waiting:
            batch = list(islice(self._waiting.values(), IN_ONE_WRITE))
            try:
                await loop.run_in_executor(self._executor, self._write, batch)
                failing_since = None
            except Unavailable as error:
                failing_since = failing_since or loop.time()
                if loop.time() - failing_since < GIVE_UP_S:
                    await asyncio.sleep(TRY_AGAIN_S)
                    continue
                log.error("responses could not be stored", count=len(batch), reason=str(error))
            except Exception:
                log.exception("responses could not be stored", count=len(batch))
            for each in batch:
                self._forget(each.response_id)
        self._writing = None

    def _forget(self, response_id: str) -> None:
        gone = self._waiting.pop(response_id, None)
        if gone is not None:
            self._waiting_bytes -= _size(gone)

    # In the store's thread

    def _write(self, batch: list[KeptResponse]) -> None:
        with self._store.write() as connection:
            left = [each for each in batch if each.response_id in self._waiting]
            keep_responses(connection, left, keep_s=self._rules.keep_s)
            for each in batch:
                if self._written % PRUNE_EVERY == 0:
                    prune_responses(connection, each.tenant_id)
                self._written += 1

    def _find(self, tenant_id: str, response_id: str) -> KeptResponse | None:
        waiting = self._waiting.get(response_id)
        if waiting is not None:
            return waiting if waiting.tenant_id == tenant_id else None
        with self._store.read() as connection:
            return find_response(
                connection,
                tenant_id=tenant_id,
                response_id=response_id,
                now_us=time.time_ns() // 1000,
                keep_s=self._rules.keep_s,
            )

    def _sweep(self) -> None:
        with self._store.write() as connection:
            forget_old_responses(connection, time.time_ns() // 1000, keep_s=self._rules.keep_s)

    def _delete(self, tenant_id: str, response_id: str) -> None:
        with self._store.write() as connection:
            delete_response(connection, tenant_id=tenant_id, response_id=response_id)

    def _history(self, tenant_id: str, response_id: str) -> list[msgspec.Raw]:
        turns: list[list[msgspec.Raw]] = []
        size = 0
        at: str | None = response_id
        while at is not None:
            found = self._find(tenant_id, at)
            if found is None:
                raise _no_history(at)
            size += _size(found)
            if size > MAX_HISTORY_BYTES or len(turns) >= MAX_CHAIN:
                raise BadRequest(
                    "The conversation behind 'previous_response_id' is too long.",
                    hint="Send the items that matter as 'input'.",
                    param="previous_response_id",
                )
            turns.append(_decode_list(found.input) + _decode_output(found.response).output)
            at = found.previous_id
        return [item for turn in reversed(turns) for item in turn]


def _size(kept: KeptResponse) -> int:
    return len(kept.input) + len(kept.response)


def _no_history(response_id: str) -> BadRequest:
    error = BadRequest(
        f"There is no response {response_id[:64]!r} to continue: it was not stored, was deleted, or has expired.",
        hint="Send the conversation as 'input'.",
        param="previous_response_id",
    )
    error.code = "previous_response_not_found"
    return error
