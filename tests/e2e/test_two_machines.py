"""Two machines, each with a platform of its own, on one PostgreSQL: what a tenant has and may do is one thing."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from tests.store.databases import PostgresServer
from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def machines(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[tuple[Platform, Platform]]:
    url = postgres_server.url(postgres_server.create())
    with Mock() as mock:
        config = f'[store]\nurl = "{url}"\n{mock.config()}'
        (tmp_path / "here").mkdir()
        (tmp_path / "there").mkdir()
        with start_platform(tmp_path / "here", config) as here, start_platform(tmp_path / "there", config) as there:
            yield here, there


async def ask(machines: tuple[Platform, ...], key: str, count: int) -> Counter[int]:
    """So many requests at once to each machine: how they ended."""
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100), timeout=30) as client:

        async def one(platform: Platform) -> int:
            answer = await client.post(
                f"{platform.url}/chat/completions",
                headers={"authorization": f"Bearer {key}"},
                json={"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 100},
            )
            return answer.status_code

        return Counter(await asyncio.gather(*(one(platform) for platform in machines for _ in range(count))))


def known_there(there: Platform, key: str) -> None:
    def listed() -> bool:
        models = httpx.get(f"{there.url}/models", headers={"authorization": f"Bearer {key}"})
        return models.status_code == 200

    wait_until(listed, 15)


def test_a_limit_and_a_balance_hold_over_both(machines: tuple[Platform, Platform]) -> None:
    here, there = machines
    limited = here.new_tenant("limited")
    here.cli("limit", "set", "--tenant", "limited", "--rpm", "100")
    known_there(there, limited)
    answers = asyncio.run(ask(machines, limited, 100))
    assert answers == {200: 100, 429: 100}, answers

    poor = here.new_tenant("poor", credit="0.01")
    known_there(there, poor)
    answers = asyncio.run(ask(machines, poor, 150))
    assert set(answers) == {200, 402} or set(answers) == {200, 429}, answers
    for platform in machines:
        wait_until(lambda platform=platform: platform.usage("poor")["requests"] == answers[200], 15)  # type: ignore[misc]
        usage = platform.usage("poor")
        assert Decimal(usage["balance"]) >= 0
        assert Decimal(usage["balance"]) + Decimal(usage["charge"]) == Decimal("0.01")


def test_one_of_them_is_killed_and_what_it_had_is_recovered_by_itself(machines: tuple[Platform, Platform]) -> None:
    here, there = machines
    key = here.new_tenant("acme")
    known_there(there, key)
    assert asyncio.run(ask(machines, key, 20)) == {200: 40}
    there.kill9_all()
    assert asyncio.run(ask((here,), key, 20)) == {200: 20}
    there.start()
    assert asyncio.run(ask((there,), key, 20)) == {200: 20}
    for platform in machines:
        wait_until(lambda platform=platform: platform.usage("acme")["requests"] == 80, 20)  # type: ignore[misc]
        usage = platform.usage("acme")
        assert Decimal(usage["balance"]) + Decimal(usage["charge"]) == 100
