"""One installation of four gateway processes: its limits, balances and budgets are those of one.

Peers: limits and budgets are kept for each process or pod (litellm's docs; BerriAI/litellm 26672, maximhq/bifrost
3547), budgets block falsely by drifting counters (litellm 28247, 36926), parallel requests overdraw a prepaid balance
(QuantumNous/new-api 6609, songquanpeng/one-api 2440), and two views of one product disagree (gpustack/gpustack 4520).
"""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.field.load import Load, Stream, chat, statuses
from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until
from tests.support.wire import Line
from tidemill.ledger.money import parse_amount

WORKERS = 4
PROMPT, ANSWER = 3, 4
CHARGE = PROMPT * 4_000 + ANSWER * 16_000
"""Nanos of one of `load.chat`'s requests, at the mock's prices."""
GIVEN_BACK_WITHIN_S = 15.0


def hold_of(key: str, tokens: int = ANSWER, **fields: Any) -> int:
    """The most that such a request may cost (docs/policies.md): what is set aside for it."""
    body = chat(key, max_tokens=tokens, **fields).partition(b"\r\n\r\n")[2]
    return (len(body) + 256) * 4_000 + tokens * 16_000 + 2


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with Mock() as mock:
        yield mock


@pytest.fixture(scope="module")
def platform(mock: Mock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with start_platform(tmp_path_factory.mktemp("four"), mock.config(), workers=WORKERS) as platform:
        yield platform


async def ask(platform: Platform, key: str, **fields: Any) -> int:
    """One request on a connection of its own, so at a process that the kernel chooses; gives its status."""
    line = await Line.open(platform.port)
    try:
        await line.send(chat(key, **fields))
        return (await line.answer(within_s=30)).status
    finally:
        line.close()


async def test_100_rpm_times_4_workers_lets_100_through(platform: Platform) -> None:
    """LiteLLM's docs: 100 RPM x 4 workers lets 400 through unless there is a Redis."""
    key = platform.new_tenant("hundred")
    await asyncio.to_thread(platform.cli, "limit", "set", "--tenant", "hundred", "--rpm", "100")
    answers = await asyncio.gather(*(ask(platform, key) for _ in range(400)))
    assert (answers.count(200), answers.count(429)) == (100, 300)
    assert platform.usage("hundred")["requests"] == 100


async def test_parallel_requests_cannot_overdraw_a_prepaid_balance(platform: Platform) -> None:
    """new-api 6609, one-api 2440: two hundred requests at once on money for ten, spread over four processes."""
    wide: dict[str, Any] = {"tokens": 100, "mock": {"prompt_tokens": 50, "ttft_ms": 100}}
    fields = {"max_tokens": wide["tokens"], "mock": wide["mock"]}
    key = platform.new_tenant("ten", None)
    credit = 10 * hold_of(key, **wide)
    platform.cli("credit", "grant", "--tenant", "ten", "--amount", f"{credit / 1e9:.9f}")
    answers = await asyncio.gather(*(ask(platform, key, **fields) for _ in range(200)))
    served = answers.count(200)
    assert served >= 1 and answers.count(402) == 200 - served
    usage = platform.usage("ten")
    assert usage["requests"] == served
    spent = served * (50 * 4_000 + 100 * 16_000)
    assert parse_amount(usage["charge"]) == spent <= credit
    assert parse_amount(usage["balance"]) == credit - spent


async def test_budgets_block_exactly_over_several_processes(platform: Platform) -> None:
    """litellm 28247, 36926, 26672, bifrost 3547: a budget neither lets more through than it is, nor blocks before it
    is used up, however its requests fall on four processes."""
    key = platform.new_tenant("thrifty")
    budget = 60 * CHARGE + hold_of(key)
    amount = f"{budget / 1e9:.9f}"
    await asyncio.to_thread(platform.cli, "limit", "set", "--tenant", "thrifty", "--budget", amount, "--per", "day")
    load = Load(platform.port, {"thrifty": key}, clients=12)
    load.start()
    await asyncio.to_thread(wait_until, lambda: statuses(load.told)[429] > 20, 20)
    await load.stop()
    assert statuses(load.told).keys() == {200, 429}
    served = statuses(load.told)[200]
    assert served * CHARGE <= budget
    # What other processes have leased of it comes back to the one that asks, so that it can be used to its end.
    deadline = time.monotonic() + GIVEN_BACK_WITHIN_S
    while served * CHARGE <= budget - hold_of(key):
        assert time.monotonic() < deadline, f"blocked at {served * CHARGE} of {budget}"
        served += await ask(platform, key) == 200
        await asyncio.sleep(0.02)
    assert [await ask(platform, key) for _ in range(12)] == [429] * 12
    (limit,) = platform.cli("limit", "list", "--tenant", "thrifty")["limits"]
    assert (
        parse_amount(limit["spent"]) == parse_amount(platform.usage("thrifty")["charge"]) == served * CHARGE <= budget
    )


async def test_two_views_of_usage_agree(platform: Platform, mock: Mock) -> None:
    """gpustack 4520 (two dashboards disagree by 3x): what clients were told, the records, the statement, the invoice,
    the budget, the margin and the engine's own counters are one figure."""
    key = platform.new_tenant("audited")
    await asyncio.to_thread(platform.cli, "limit", "set", "--tenant", "audited", "--budget", "50", "--per", "month")
    await asyncio.to_thread(platform.reconcile)  # from here on the engine's counters are compared
    revenue_before = revenue(platform)
    engine_before = [mock.counter(name) for name in ENGINE_COUNTERS]
    streams = [
        await (await Stream.begin(platform.port, key, max_tokens=n, stream_options={"include_usage": True})).read()
        for n in range(1, 30)
    ]
    whole = Load(platform.port, {"audited": key}, clients=4)
    whole.start()
    await asyncio.sleep(0.5)
    await whole.stop()
    assert statuses(whole.told).keys() == {200}

    told = [stream.usage for stream in streams]
    prompt = sum(each["prompt_tokens"] for each in told if each) + PROMPT * len(whole.told)
    completion = sum(each["completion_tokens"] for each in told if each) + ANSWER * len(whole.told)
    requests = len(streams) + len(whole.told)
    assert completion == sum(stream.tokens for stream in streams) + ANSWER * len(whole.told)
    charge = prompt * 4_000 + completion * 16_000

    usage = platform.usage("audited")
    assert (usage["requests"], usage["prompt_tokens"], usage["completion_tokens"]) == (requests, prompt, completion)
    assert parse_amount(usage["charge"]) == charge == 100 * 10**9 - parse_amount(usage["balance"])
    records = usage["records"]
    assert sum(each["prompt_tokens"] for each in records) == prompt
    assert sum(each["completion_tokens"] for each in records) == completion
    assert sum(parse_amount(each["charge"]) for each in records) == charge
    month = records[0]["finished_at"][:7]
    invoice = platform.cli("invoice", "--tenant", "audited", "--month", month)
    assert {line["kind"]: line["tokens"] for line in invoice["lines"]} == {"input": prompt, "output": completion}
    assert parse_amount(invoice["subtotal"]) == charge
    (limit,) = platform.cli("limit", "list", "--tenant", "audited")["limits"]
    assert parse_amount(limit["spent"]) == charge
    assert revenue(platform) - revenue_before == charge
    engine = [mock.counter(name) - before for name, before in zip(ENGINE_COUNTERS, engine_before, strict=True)]
    assert engine == [prompt, completion]
    assert [line["verdict"] for line in platform.reconcile()["replicas"]] == ["equal"]


ENGINE_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


def revenue(platform: Platform) -> int:
    return parse_amount(platform.cli("margin")["revenue"])


async def test_256_connections_get_what_the_engine_gives(platform: Platform, mock: Mock) -> None:
    """gpustack 1842: 17 requests a second against 51 direct at 256 connections, and a first token after 9.4 s against
    0.74 s. Here an engine that takes half a second for each answer sets the pace, and the gateway does not."""
    key = platform.new_tenant("many")
    fields = {"mock": {"ttft_ms": 500}}
    direct = await pace(mock.port, key, fields)
    through = await pace(platform.port, key, fields)
    assert through > 0.7 * direct, f"{through:.0f} requests a second, {direct:.0f} direct"


async def pace(port: int, key: str, fields: dict[str, Any]) -> float:
    """Answers a second at 256 connections; each must be one."""
    load = Load(port, {"many": key}, clients=256)
    began = time.monotonic()
    load.start(**fields)
    await asyncio.sleep(2.0)
    await load.stop()
    assert statuses(load.told).keys() == {200}
    return len(load.told) / (time.monotonic() - began)
