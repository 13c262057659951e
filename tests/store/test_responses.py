"""Kept responses: their bounds, and that nobody sees another's."""

import zlib
from datetime import UTC, datetime
from typing import Any

import pytest

from tidemill.store import responses
from tidemill.store.engine import Store
from tidemill.store.responses import (
    KEPT_S,
    KeptResponse,
    delete_response,
    find_response,
    forget_old_responses,
    keep_responses,
    prune_responses,
)
from tidemill.store.tenants import create_tenant

NOW = 1_800_000_000_000_000


def tenant(store: Store, name: str) -> str:
    with store.write() as connection:
        return create_tenant(connection, name=name, currency="USD", now=datetime.now(UTC)).tenant_id


def kept(tenant_id: str, number: int, *, created_us: int = NOW, size: int = 10) -> KeptResponse:
    text = bytes(number * 7 % 251 for _ in range(size))
    return KeptResponse(
        response_id=f"resp_{tenant_id}_{number}",
        tenant_id=tenant_id,
        previous_id=None,
        input=b'["in"]',
        response=text,
        created_us=created_us + number,
    )


def left(store: Store, tenant_id: str, count: int, now_us: int = NOW) -> list[int]:
    with store.read() as connection:
        return [
            number
            for number in range(count)
            if find_response(connection, tenant_id=tenant_id, response_id=f"resp_{tenant_id}_{number}", now_us=now_us)
        ]


def test_what_is_kept_is_found_as_it_was_and_only_by_its_tenant(store: Store) -> None:
    mine, yours = tenant(store, "mine"), tenant(store, "yours")
    wanted = kept(mine, 0, size=5000)
    with store.write() as connection:
        keep_responses(connection, [wanted, kept(mine, 1)])
        keep_responses(connection, [wanted])
        keep_responses(connection, [])
    with store.read() as connection:
        found = find_response(connection, tenant_id=mine, response_id=wanted.response_id, now_us=NOW)
        assert found == wanted
        assert find_response(connection, tenant_id=yours, response_id=wanted.response_id, now_us=NOW) is None
    with store.write() as connection:
        assert not delete_response(connection, tenant_id=yours, response_id=wanted.response_id)
        assert delete_response(connection, tenant_id=mine, response_id=wanted.response_id)
        assert not delete_response(connection, tenant_id=mine, response_id=wanted.response_id)
    assert left(store, mine, 2) == [1]


def test_thirty_days_and_no_longer(store: Store) -> None:
    mine = tenant(store, "mine")
    with store.write() as connection:
        keep_responses(connection, [kept(mine, 0)])
    assert left(store, mine, 1, NOW + KEPT_S * 1_000_000 - 1) == [0]
    assert left(store, mine, 1, NOW + KEPT_S * 1_000_000) == []
    with store.write() as connection:
        assert forget_old_responses(connection, NOW + KEPT_S * 1_000_000 - 1) == 0
        assert forget_old_responses(connection, NOW + KEPT_S * 1_000_000) == 1
    assert left(store, mine, 1) == []


def test_another_time_and_one_that_was_shortened_later(store: Store) -> None:
    mine = tenant(store, "mine")
    with store.write() as connection:
        keep_responses(connection, [kept(mine, 0)], keep_s=100)
        found: dict[str, Any] = {"tenant_id": mine, "response_id": kept(mine, 0).response_id}
        assert find_response(connection, **found, now_us=NOW + 99_999_999) is not None
        assert find_response(connection, **found, now_us=NOW + 100_000_000) is None
        assert find_response(connection, **found, now_us=NOW + 50_000_000, keep_s=50) is None, "by now's rule"
        assert forget_old_responses(connection, NOW + 49_999_999, keep_s=50) == 0
        assert forget_old_responses(connection, NOW + 50_000_000, keep_s=50) == 1


def test_the_oldest_go_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_RESPONSES", 3)
    mine, yours = tenant(store, "mine"), tenant(store, "yours")
    with store.write() as connection:
        keep_responses(connection, [kept(each, number) for each in (mine, yours) for number in range(5)])
        prune_responses(connection, mine)
    assert left(store, mine, 5) == [2, 3, 4]
    assert left(store, yours, 5) == [0, 1, 2, 3, 4]


def test_a_tenant_has_so_many_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tenant(store, "mine")
    each = len(zlib.compress(b'["in"]', 1)) + len(zlib.compress(b"\0" * 10, 1))
    monkeypatch.setattr(responses, "MAX_BYTES", 2 * each + 1)
    with store.write() as connection:
        keep_responses(connection, [kept(mine, number) for number in range(4)])
        prune_responses(connection, mine)
    assert left(store, mine, 4)[-1] == 3 and len(left(store, mine, 4)) <= 2
