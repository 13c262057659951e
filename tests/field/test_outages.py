"""PostgreSQL is away under load: requests go on from leases and the log, and records arrive afterwards.

Peers: every request hangs while liveness is green (BerriAI/litellm PR 35273, 34934), readiness empties the service and
valid keys get 401 until a restart (38121), spend rows are lost (15740, 40100).

TIDEMILL_OUTAGE_S makes the outages longer than they need to be for a test.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.field.books import check_books
from tests.field.load import Load, Told, statuses
from tests.store.databases import PostgresServer
from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until
from tidemill.gateway.auth.authenticator import ASK_EVERY_S
from tidemill.meter.balance_leases import STORE_PATIENCE_S

OUTAGE_S = float(os.environ.get("TIDEMILL_OUTAGE_S", "6"))
WARM_UP_S = 1.5
CREDITS = {"rich": "100", "dry": "0.05", "new": "100"}
"""`dry` has leased in advance what lasts for a second or two, `new` nothing at all."""
LONGEST_WAIT_S = 2 * STORE_PATIENCE_S
OUTAGES: dict[str, Callable[[PostgresServer], AbstractContextManager[None]]] = {
    "frozen": PostgresServer.frozen,
    "stopped": PostgresServer.stopped,
}


@pytest.fixture
def world(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[tuple[Platform, str]]:
    url = postgres_server.url(postgres_server.create_migrated())
    with (
        Mock() as mock,
        start_platform(tmp_path, f'[store]\nurl = "{url}"\n{mock.config()}', workers=2) as platform,
    ):
        yield platform, url


@pytest.mark.slow
@pytest.mark.parametrize("how", list(OUTAGES))
async def test_database_down_keeps_valid_keys_valid_and_readiness_true_to_what_it_can_serve(
    world: tuple[Platform, str], postgres_server: PostgresServer, how: str
) -> None:
    """BerriAI/litellm PR 35273, 34934, 38121: hanging requests, 401 for valid keys, an emptied service."""
    platform, url = world
    keys = {name: platform.new_tenant(name, credit) for name, credit in CREDITS.items()}
    load = Load(platform.port, {name: keys[name] for name in ("rich", "dry")}, clients=3)
    load.start()
    await asyncio.sleep(WARM_UP_S)
    newcomer = Load(platform.port, {"new": keys["new"], "stranger": "sk-tm-who-is-that"}, clients=2)

    away = OUTAGES[how](postgres_server)
    await asyncio.to_thread(away.__enter__)
    try:
        began = time.monotonic()
        newcomer.start()
        await asyncio.sleep(OUTAGE_S)
        pages = [await page(platform, path) for path in ("healthz", "readyz")]
    finally:
        back = time.monotonic()
        await asyncio.to_thread(away.__exit__, None, None, None)
    during = [each for each in load.told + newcomer.told if began <= each.at and each.at + each.took_s < back]
    returned = time.monotonic()
    await asyncio.sleep(STORE_PATIENCE_S)
    await asyncio.gather(load.stop(), newcomer.stop())

    assert [answer.status_code for answer in pages] == [200, 200], "alive, and it serves whom it can"
    check_outage(during)
    after = load.since(returned + 2.0) + newcomer.since(returned + 2.0)
    assert statuses([each for each in after if each.tenant == "rich"]).keys() == {200}
    assert statuses([each for each in after if each.tenant == "new"]).keys() == {200}
    assert statuses([each for each in after if each.tenant == "stranger"]).keys() == {401}
    assert statuses([each for each in after if each.tenant == "dry"]).keys() <= {200, 402}

    served = {name: sum(t.status == 200 and t.tenant == name for t in load.told + newcomer.told) for name in keys}
    wait_until(lambda: all(platform.usage(name)["requests"] == count for name, count in served.items()), 10)
    await asyncio.to_thread(platform.stop)
    records = check_books(platform, CREDITS, url)
    assert {name: len(found) for name, found in records.items()} == served, "each answer is one record"


async def page(platform: Platform, path: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=LONGEST_WAIT_S) as client:
        return await client.get(f"http://127.0.0.1:{platform.port}/{path}")


def check_outage(during: list[Told]) -> None:
    """Who is known and has money at hand is served; who has none is told why, within seconds; nobody hangs."""
    assert statuses([each for each in during if each.tenant == "rich"]).keys() == {200}
    dry = [each for each in during if each.tenant == "dry"]
    assert statuses(dry).keys() == {200, 503}, statuses(dry)
    assert statuses([each for each in during if each.tenant == "new"]).keys() == {503}
    known_by = min(each.at for each in during) + 2 * ASK_EVERY_S  # until then it has answered a moment ago
    strangers = [each for each in during if each.tenant == "stranger" and each.at + each.took_s > known_by]
    assert statuses(strangers).keys() == {503}, "it may be a good key"
    assert max(each.took_s for each in during) < LONGEST_WAIT_S
    for each in during:
        if each.status == 503:
            assert "socket" not in each.message and "/" not in each.message, (
                "where the database is, is nobody's business"
            )
            what = "API key" if each.tenant == "stranger" else "balance"
            assert each.message.startswith(f"Your {what} cannot be checked now: ")
            assert "the database does not answer" in each.message
            assert each.code == "unavailable" and each.retry_after is not None
