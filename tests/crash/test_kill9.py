"""`kill -9`, for real: of the gateway, the engine, the supervisor and everything, at any moment under 50 streams.

Afterwards each accepted request has exactly one record, with no fewer tokens than its client had received and no
more than were asked for; the ledger balances to the nano; nothing is held or leased any more; and it serves again.
"""

import asyncio
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from tests.crash.clients import Crowd, Seen
from tests.support.mock import Mock
from tests.support.platform import Part, Platform, start_platform
from tidemill.ledger.usage import RequestStatus, UsageRecord
from tidemill.store.accounts import tenant_balances, verify_books
from tidemill.store.balance_leases import leasing_workers
from tidemill.store.engine import open_store, store_url
from tidemill.store.tables.usage import log_positions
from tidemill.store.tenants import list_tenants
from tidemill.store.usage import records_between

STREAMS = 50
EMBEDDED = 6
WORKERS = 2
CREDIT = 1000
TENANTS = ("one", "two", "three")
ROUNDS: tuple[tuple[Part, ...] | str, ...] = (
    ("gateway",),
    ("engine",),
    "everything",
    ("gateway",),
    ("supervisor",),
    ("gateway", "engine"),
    "everything",
    ("engine",),
    ("supervisor",),
    ("gateway",),
)
CONFIG = """
[gateway]
drain_seconds = 10

[models.smollm2-135m-instruct]
engine = "llamacpp"
threads = 1

[prices.smollm2-135m-instruct]
input = "1.00"
cached_input = "0.25"
output = "2.00"
"""


@pytest.fixture
def upstream() -> Iterator[Mock]:
    with Mock("--ttft-ms", "5", "--chunk-interval-ms", "12") as mock:
        yield mock


@pytest.mark.slow
async def test_nothing_is_lost_and_nothing_counts_twice(tmp_path: Path, upstream: Mock) -> None:
    seed = int(os.environ.get("TIDEMILL_KILL_SEED") or time.time_ns() % 10**9)
    print(f"TIDEMILL_KILL_SEED={seed}")
    config = CONFIG + upstream.config(drain_seconds=2.0)
    platform = await asyncio.to_thread(start_platform, tmp_path, config, workers=WORKERS)
    try:
        keys = {name: platform.new_tenant(name, credit=str(CREDIT)) for name in TENANTS}
        crowd = Crowd(platform.port, keys, random.Random(seed))
        for parts in ROUNDS:
            await one_round(platform, crowd, parts)
        await asyncio.to_thread(platform.stop)
        check(platform, crowd.seen)
    finally:
        platform.kill9_all()


async def one_round(platform: Platform, crowd: Crowd, parts: tuple[Part, ...] | str) -> None:
    crowd.start(STREAMS, embedded=EMBEDDED)
    await asyncio.sleep(crowd.random.uniform(0.3, 1.0))
    if parts == "everything":
        platform.kill9_all()
    else:
        for part in parts:
            assert platform.kill9(part), f"there was no {part} to kill"  # type: ignore[arg-type]
    await asyncio.sleep(crowd.random.uniform(0.0, 1.0))  # those that are still there go on being asked
    if parts == "everything" or "supervisor" in parts:
        await asyncio.to_thread(platform.start, workers=WORKERS)
    await crowd.stop()
    await serves_again(platform, crowd)


async def serves_again(platform: Platform, crowd: Crowd) -> None:
    deadline = time.monotonic() + 30
    for model in ("mock", "smollm2-135m-instruct"):
        while True:
            seen = await crowd.ask(model, stream=True)
            if seen is not None and seen.whole and seen.status == 200:
                break
            assert time.monotonic() < deadline, f"{model} does not serve again: {platform.logs()}"
            await asyncio.sleep(0.1)


def check(platform: Platform, seen: list[Seen]) -> None:
    store = open_store(store_url(None, platform.data))
    try:
        with store.read() as connection:
            records = list(records_between(connection, tenant_id=None, start=None, end=None))
            balances = tenant_balances(connection)
            tenants = {tenant.name: tenant.tenant_id for tenant in list_tenants(connection)}
            assert all(not found for found in verify_books(connection).values())
            assert leasing_workers(connection) == set()
            assert connection.execute(select(func.count()).select_from(log_positions)).scalar() == 0
    finally:
        store.close()
    assert list((platform.data / "meter").iterdir()) == []

    by_id: dict[str, UsageRecord] = {}
    for record in records:
        assert record.request_id not in by_id, "a record twice"
        by_id[record.request_id] = record
    accepted = [each for each in seen if each.status == 200]
    assert len(accepted) > 200 and len({each.request_id for each in accepted}) == len(accepted)
    for each in accepted:
        assert each.request_id is not None
        found = by_id.get(each.request_id)
        assert found is not None, f"no record of {each.request_id}, of which came {each.answer[-200:]!r}"
        compare(each, found, tenants)
    broken = [each for each in accepted if not each.whole]
    lost = [record for record in records if record.status in (RequestStatus.GATEWAY_LOST, RequestStatus.ENGINE_LOST)]
    print(
        f"{len(accepted)} of {len(seen)} accepted, {len(broken)} broken off; {len(records)} records, {len(lost)} lost"
    )
    assert len(broken) > 50, "the kills have hit nothing"
    assert any(record.status is RequestStatus.GATEWAY_LOST for record in records)

    for name in TENANTS:
        own = [record for record in records if record.tenant_id == tenants[name]]
        assert balances[tenants[name]] == CREDIT * 10**9 - sum(record.charge for record in own)
        assert sum(record.uncollected for record in own) == 0


def compare(seen: Seen, record: UsageRecord, tenants: dict[str, str]) -> None:
    text = f"{seen} {record}"
    assert (record.tenant_id, record.model) == (tenants[seen.tenant], seen.model), text
    assert seen.tokens <= record.usage.completion <= seen.max_tokens, text
    if seen.whole and seen.usage is not None:
        assert record.usage.completion == seen.usage, text
        assert record.status is RequestStatus.OK and not record.estimated, text
    if record.usage.completion and not record.estimated:
        assert record.usage.prompt > 0, text
