"""Batches over the admin API: all tenants' in one list, what they cost, and cancelling them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from tests.control.conftest import Api
from tests.control.world import FakePlatform, record
from tidemill.store.batches import (
    Batch,
    BatchStatus,
    LineCounts,
    LineError,
    create_batch,
    fail_batch,
    note_counts,
    start_batch,
)
from tidemill.store.files import File, FileQuota, add_file
from tidemill.store.usage import store_records

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def make(platform: FakePlatform, tenant_id: str, name: str, *, minute: int = 0, **changes: Any) -> str:
    """Enter a batch with its input file; gives its id."""
    at = NOW + timedelta(minutes=minute)
    file = File(
        file_id=f"file_{name}",
        tenant_id=tenant_id,
        site="here",
        purpose="batch",
        filename="in.jsonl",
        bytes=10,
        created_at=at,
        expires_at=None,
    )
    batch = Batch(
        batch_id=f"batch_{name}",
        tenant_id=tenant_id,
        key_id="key_1",
        site="",
        endpoint="/v1/chat/completions",
        input_file_id=file.file_id,
        completion_window="24h",
        metadata=None,
        output_expires_s=None,
        created_at=at,
        expires_at=at + timedelta(days=1),
    )
    with platform.store.write() as connection:
        add_file(connection, file, FileQuota(bytes=10**9, files=1000))
        create_batch(connection, msgspec.structs.replace(batch, **changes), max_open=100)
    return batch.batch_id


@pytest.fixture
def tenants(api: Api) -> list[str]:
    return [api.post("/tenants", name=name)["id"] for name in ("acme", "bolt")]


def test_batches_of_all_tenants_page_by_page(api: Api, platform: FakePlatform, tenants: list[str]) -> None:
    made = [make(platform, tenants[at % 2], f"b{at}", minute=at) for at in range(5)]
    with platform.store.write() as connection:
        fail_batch(connection, made[0], [LineError("empty_file", "It is empty.")], NOW)
    found = api.get("/batches")
    assert [each["id"] for each in found["batches"]] == made[::-1] and found["next"] is None
    assert {each["tenant"] for each in found["batches"]} == {"acme", "bolt"}
    assert [each["id"] for each in api.get("/batches", tenant="bolt")["batches"]] == [made[3], made[1]]
    assert made[0] not in [each["id"] for each in api.get("/batches", unfinished="true")["batches"]]
    seen: list[str] = []
    page: dict[str, Any] = {"next": ""}
    while page["next"] is not None:
        page = api.get("/batches", limit=2, **({"after": page["next"]} if page["next"] else {}))
        seen += [each["id"] for each in page["batches"]]
    assert seen == made[::-1]


def test_a_batch_with_its_charge_and_its_errors(api: Api, platform: FakePlatform, tenants: list[str]) -> None:
    batch_id = make(platform, tenants[0], "b")
    other = make(platform, tenants[0], "bx")
    lines = [record(platform, f"{batch_id}_{number}", tenants[0]) for number in (1, 2, 10)]
    others = [record(platform, name, tenants[0]) for name in (f"{other}_1", "req_1", batch_id, f"{batch_id}x_1")]
    with platform.store.write() as connection:
        store_records(connection, [*lines[:2], *others], zone=platform.zone)
        start_batch(connection, batch_id, total=3, model="mock", now=NOW)
    platform.settled = lines[2:]
    found = api.get(f"/batches/{batch_id}")
    assert found["charge"] == "0.0246", "three times 800 fresh, 200 cached and 300 tokens of answers"
    assert (found["status"], found["total"], found["model"], found["ended_at"]) == ("in_progress", 3, "mock", None)
    with platform.store.write() as connection:
        fail_batch(connection, other, [LineError("invalid_url", "Wrong.", "url", 7)], NOW)
    failed = api.get(f"/batches/{other}")
    assert failed["errors"] == [{"code": "invalid_url", "message": "Wrong.", "param": "url", "line": 7}]
    assert failed["ended_at"] == NOW.isoformat()


def test_cancelling(api: Api, platform: FakePlatform, tenants: list[str]) -> None:
    batch_id = make(platform, tenants[0], "b")
    assert api.post("/batches/cancel", batch=batch_id)["status"] == "cancelling"
    assert api.post("/batches/cancel", batch=batch_id)["status"] == "cancelling", "asked for twice"
    over = make(platform, tenants[0], "over")
    with platform.store.write() as connection:
        fail_batch(connection, over, [], NOW)
    assert api.refused(409, "POST", "/batches/cancel", json={"batch": over})["code"] == "conflict"
    assert BatchStatus.FAILED.value == api.get(f"/batches/{over}")["status"]


def test_what_does_not_exist(api: Api, tenants: list[str]) -> None:
    for method, path, more in (
        ("GET", "/batches/batch_none", {}),
        ("POST", "/batches/cancel", {"json": {"batch": "batch_none"}}),
        ("GET", "/batches?after=batch_none", {}),
        ("GET", "/batches?tenant=nobody", {}),
    ):
        api.refused(404, method, path, **more)
    assert api.refused(400, "GET", "/batches?limit=0")["param"] == "limit"
    assert api.get("/batches") == {"batches": [], "next": None}


def test_counts_are_as_the_runner_notes_them(api: Api, platform: FakePlatform, tenants: list[str]) -> None:
    batch_id = make(platform, tenants[0], "b")
    with platform.store.write() as connection:
        note_counts(connection, batch_id, LineCounts(2, 1, 10, 4, 20, 0))
    found = api.get(f"/batches/{batch_id}")
    assert [found[name] for name in ("completed", "failed", "input_tokens", "cached_tokens", "output_tokens")] == [
        2,
        1,
        10,
        4,
        20,
    ]
