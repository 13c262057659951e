"""Responses that are kept for their tenants, for a while and within a bound for each of them.

The oldest go first.
"""

import zlib
from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, Row, delete, func, select

from tidemill.store.bulk import dialect_insert
from tidemill.store.tables.files import responses

KEPT_S = 30 * 86_400
"""As long as OpenAI keeps them; an operator may choose another time."""
MAX_RESPONSES = 10_000
"""Responses of one tenant."""
MAX_BYTES = 256 * 1024 * 1024
"""Bytes that the kept responses of one tenant take in the store, compressed."""
MAX_CHAIN = 1_000
"""Responses that one may go on from, one after the other."""


class KeptResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response and what it answered, as JSON."""

    response_id: str
    tenant_id: str
    previous_id: str | None
    input: bytes
    """A list of input items."""
    response: bytes
    created_us: int


def keep_responses(connection: Connection, kept: Sequence[KeptResponse], *, keep_s: int = KEPT_S) -> None:
    """Write responses down, to be kept for `keep_s` seconds. May be repeated."""
    if kept:
        connection.execute(
            dialect_insert(connection, responses).on_conflict_do_nothing(), [_row(each, keep_s) for each in kept]
        )


def find_response(
    connection: Connection, *, tenant_id: str, response_id: str, now_us: int, keep_s: int = KEPT_S
) -> KeptResponse | None:
    """A tenant's response.

    None when there is none, or it is too old: by what it was told, or by now's rule.
    """
    found = connection.execute(
        select(responses).where(
            responses.c.response_id == response_id,
            responses.c.tenant_id == tenant_id,
            responses.c.expires_at > now_us,
            responses.c.created_at > now_us - keep_s * 1_000_000,
        )
    ).one_or_none()
    return _kept(found) if found is not None else None


def delete_response(connection: Connection, *, tenant_id: str, response_id: str) -> bool:
    """Forget a response; False when there was none."""
    done = connection.execute(
        delete(responses).where(responses.c.response_id == response_id, responses.c.tenant_id == tenant_id)
    )
    return bool(done.rowcount)


def forget_old_responses(connection: Connection, now_us: int, *, keep_s: int = KEPT_S) -> int:
    """Forget what is too old, by what it was told or by now's rule; gives their number."""
    too_old = (responses.c.expires_at <= now_us) | (responses.c.created_at <= now_us - keep_s * 1_000_000)
    return connection.execute(delete(responses).where(too_old)).rowcount


def prune_responses(connection: Connection, tenant_id: str) -> None:
    """Forget what a tenant has beyond its bound, the oldest first."""
    newest_first = (responses.c.created_at.desc(), responses.c.response_id)
    ranked = (
        select(
            responses.c.response_id,
            func.row_number().over(order_by=newest_first).label("rank"),
            func.sum(responses.c.bytes).over(order_by=newest_first).label("total"),
        )
        .where(responses.c.tenant_id == tenant_id)
        .subquery()
    )
    too_many = select(ranked.c.response_id).where((ranked.c.rank > MAX_RESPONSES) | (ranked.c.total > MAX_BYTES))
    connection.execute(delete(responses).where(responses.c.response_id.in_(too_many)))


def _row(kept: KeptResponse, keep_s: int) -> dict[str, object]:
    shrunk_input, shrunk_response = zlib.compress(kept.input, 1), zlib.compress(kept.response, 1)
    return {
        "response_id": kept.response_id,
        "tenant_id": kept.tenant_id,
        "previous_id": kept.previous_id,
        "bytes": len(shrunk_input) + len(shrunk_response),
        "created_at": kept.created_us,
        "expires_at": kept.created_us + keep_s * 1_000_000,
        "input": shrunk_input,
        "response": shrunk_response,
    }


def _kept(row: Row[tuple[object, ...]]) -> KeptResponse:
    values = row._mapping
    return KeptResponse(
        response_id=values["response_id"],
        tenant_id=values["tenant_id"],
        previous_id=values["previous_id"],
        input=zlib.decompress(values["input"]),
        response=zlib.decompress(values["response"]),
        created_us=values["created_at"],
    )
