"""Limits while PostgreSQL hangs: what was leased goes on, then the error says so, and nothing waits for ever."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.store.databases import PostgresServer
from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until

LONGEST_WAIT_S = 6.0


@pytest.fixture
def platform(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[Platform]:
    url = postgres_server.url(postgres_server.create())
    with (
        Mock() as mock,
        start_platform(tmp_path, f'[store]\nurl = "{url}"\n{mock.config()}', workers=2) as platform,
    ):
        yield platform


async def ask(platform: Platform, key: str, count: int) -> list[tuple[int, float, Any]]:
    """So many requests, ten at a time: statuses, times, bodies."""
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=10), timeout=30) as client:

        async def one() -> tuple[int, float, Any]:
            began = time.monotonic()
            answer = await client.post(
                f"{platform.url}/chat/completions",
                headers={"authorization": f"Bearer {key}"},
                json={"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
            )
            return answer.status_code, time.monotonic() - began, answer.json()

        turns = asyncio.Semaphore(10)

        async def in_turn() -> tuple[int, float, Any]:
            async with turns:
                return await one()

        return list(await asyncio.gather(*(in_turn() for _ in range(count))))


def test_a_store_that_hangs(platform: Platform, postgres_server: PostgresServer) -> None:
    """LiteLLM PR 35273, 34934, 38121: a store that hangs hangs every request, or valid keys get 401."""
    free, limited = platform.new_tenant("free"), platform.new_tenant("limited")
    platform.cli("limit", "set", "--tenant", "limited", "--rpm", "300")
    assert Counter(status for status, _, _ in asyncio.run(ask(platform, free, 40))) == {200: 40}
    before = Counter(status for status, _, _ in asyncio.run(ask(platform, limited, 40)))
    assert before == {200: 40}
    time.sleep(1.5)  # the balance's leases and the limit's shares are filled by now

    with postgres_server.frozen():
        answers = asyncio.run(ask(platform, free, 60))
        assert Counter(status for status, _, _ in answers) == {200: 60}, "no limits, and money was leased in advance"
        answers = asyncio.run(ask(platform, limited, 100))
        during = Counter(status for status, _, _ in answers)
        assert set(during) <= {200, 503} and during[503], during
        assert max(took for _, took, _ in answers) < LONGEST_WAIT_S
        message = next(body["error"]["message"] for status, _, body in answers if status == 503)
        assert message.startswith("Your limits (rpm) cannot be checked now: the database does not answer")

    def admitted() -> bool:
        return asyncio.run(ask(platform, limited, 1))[0][0] == 200

    wait_until(admitted, 20)
    passed = before[200] + during[200] + 1
    after = Counter(status for status, _, _ in asyncio.run(ask(platform, limited, 300)))
    assert set(after) == {200, 429}
    assert 250 <= passed + after[200] <= 300, "and the limit has held over it all"
    assert platform.usage("free")["requests"] == 100


def test_a_stopped_platform_on_postgresql_can_be_read(platform: Platform) -> None:
    platform.new_tenant("acme", credit="12.50")
    running = platform.cli("usage", "--tenant", "acme")
    platform.stop()
    assert platform.cli("usage", "--tenant", "acme") == running
    assert "@" not in (platform.data / "store-url").read_text().replace("tidemill@", "")
