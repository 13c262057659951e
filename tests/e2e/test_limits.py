"""Limits on a whole platform with two gateway processes, as OpenAI's client and an operator see them."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    with Mock() as mock:
        yield mock


@pytest.fixture(scope="module")
def platform(mock: Mock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with start_platform(tmp_path_factory.mktemp("limits"), mock.config(), workers=2) as platform:
        yield platform


def client(platform: Platform, key: str, **options: object) -> openai.OpenAI:
    options = {"max_retries": 0, "timeout": 30.0, **options}
    return openai.OpenAI(base_url=platform.url, api_key=key, **options)  # type: ignore[arg-type]


def ask(openai_client: openai.OpenAI, **fields: object) -> int:
    """A short request; gives its status."""
    options = {"max_tokens": 4, **fields}
    try:
        openai_client.chat.completions.create(
            model="mock",
            messages=[{"role": "user", "content": "hello there"}],
            **options,  # type: ignore[call-overload]
        )
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def flood(platform: Platform, key: str, count: int, threads: int = 16) -> Counter[int]:
    """So many requests as fast as some clients with connections of their own can."""
    mine = threading.local()

    def one(_: int) -> int:
        if not hasattr(mine, "client"):
            mine.client = client(platform, key)
        return ask(mine.client)

    with ThreadPoolExecutor(threads) as pool:
        return Counter(pool.map(one, range(count)))


def test_of_200_fast_requests_exactly_100_pass_two_processes(platform: Platform) -> None:
    """FIELD: 100 RPM x 4 workers lets 400 through without Redis."""
    key = platform.new_tenant("hundred")
    platform.cli("limit", "set", "--tenant", "hundred", "--rpm", "100")
    assert flood(platform, key, 200) == {200: 100, 429: 100}
    (limit,) = platform.cli("limit", "list", "--tenant", "hundred")["limits"]
    assert (limit["text"], limit["used"]) == ("100 requests per minute", 100)
    with pytest.raises(openai.RateLimitError) as refused:
        client(platform, key).chat.completions.create(model="mock", messages=[{"role": "user", "content": "x"}])
    headers = refused.value.response.headers
    assert headers["x-ratelimit-remaining-requests"] == "0" and 40 <= int(headers["retry-after"]) <= 61
    assert refused.value.code == "rate_limit_exceeded"


def test_the_client_reads_the_headers(platform: Platform) -> None:
    key = platform.new_tenant("headers")
    platform.cli("limit", "set", "--tenant", "headers", "--rpm", "50", "--tpm", "10000")
    raw = client(platform, key).chat.completions.with_raw_response.create(
        model="mock", messages=[{"role": "user", "content": "x"}], max_tokens=4
    )
    assert raw.headers["x-ratelimit-limit-requests"] == "50"
    assert raw.headers["x-ratelimit-remaining-requests"] == "49"
    assert raw.headers["x-ratelimit-limit-tokens"] == "10000"
    assert raw.headers["x-request-id"].startswith("req_")


def test_a_worker_that_is_killed_gives_its_slots_back(platform: Platform, mock: Mock) -> None:
    key = platform.new_tenant("slots")
    platform.cli("limit", "set", "--tenant", "slots", "--concurrency", "4")
    openai_client = client(platform, key)
    slow = {"extra_body": {"mock": {"chunks": 600, "interval_ms": 50}}, "stream": True, "max_tokens": 600}
    streams = [
        openai_client.chat.completions.create(
            model="mock",
            messages=[{"role": "user", "content": "x"}],
            **slow,  # type: ignore[call-overload]
        )
        for _ in range(4)
    ]
    for stream in streams:
        next(iter(stream))
    assert ask(openai_client) == 429
    killed = platform.kill9("gateway")
    assert len(killed) == 2
    wait_until(lambda: platform.admin.get("status").json()["workers_ready"] == 2, 20)
    wait_until(lambda: ask(client(platform, key)) == 200, 10)
    (limit,) = platform.cli("limit", "list", "--tenant", "slots")["limits"]
    assert limit["used"] <= 1


def test_a_worker_that_is_killed_costs_at_most_what_it_held_and_the_limit_holds(platform: Platform) -> None:
    key = platform.new_tenant("killed")
    platform.cli("limit", "set", "--tenant", "killed", "--rpm", "60")
    passed = flood(platform, key, 20)[200]
    os.kill(platform.pids("gateway")[0], signal.SIGKILL)
    time.sleep(2.0)  # the other gives back what it holds; what the dead one held counts for half a minute more
    passed += flood(platform, key, 80)[200]
    assert 20 < passed <= 60


def test_a_budget_holds_over_processes_and_is_seen(platform: Platform) -> None:
    """FIELD: budgets block falsely and don't block (litellm 28247, 36926, 26672; bifrost 3547)."""
    key = platform.new_tenant("thrifty")
    platform.cli("limit", "set", "--tenant", "thrifty", "--budget", "0.01", "--per", "day", "--soft", "50")
    answers = flood(platform, key, 300)
    assert answers.keys() == {200, 429}
    (limit,) = platform.cli("limit", "list", "--tenant", "thrifty")["limits"]
    usage = platform.usage("thrifty")
    assert limit["spent"] == usage["charge"] and float(limit["spent"]) <= 0.01
    assert float(limit["spent"]) > 0.005 and limit["warned"]
    assert usage["requests"] == answers[200]
    with pytest.raises(openai.RateLimitError) as refused:
        client(platform, key, max_retries=3).chat.completions.create(
            model="mock", messages=[{"role": "user", "content": "x" * 3000}], max_tokens=500
        )
    assert refused.value.code == "insufficient_quota"
    assert "does not cover this request" in str(refused.value)
    platform.cli("limit", "set", "--tenant", "thrifty", "--budget", "5", "--per", "day", "--soft", "50")
    assert ask(client(platform, key)) == 200, "raised, it lets through at once"


def test_the_soft_limit_warns_in_a_header(platform: Platform) -> None:
    key = platform.new_tenant("warned")
    platform.cli("limit", "set", "--tenant", "warned", "--budget", "0.1", "--soft", "1")
    flood(platform, key, 20)

    def warning() -> str | None:
        raw = client(platform, key).chat.completions.with_raw_response.create(
            model="mock", messages=[{"role": "user", "content": "x"}], max_tokens=4
        )
        return raw.headers.get("x-tidemill-budget-warning")

    # Each gateway process learns of it within a second.
    text = "1% of a budget of 0.10 USD per month for your account is used"
    wait_until(lambda: warning() == text, 10)
    assert "a budget's soft limit is reached" in platform.output.read_text() + platform.logs()


def test_a_key_is_rotated_with_its_limits_and_without_a_gap(platform: Platform) -> None:
    platform.new_tenant("rotating")
    made = platform.cli("key", "create", "--tenant", "rotating", "--models", "mock", "--expires", "90d")
    platform.cli("limit", "set", "--tenant", "rotating", "--key", made["id"], "--rpm", "6")
    successor = platform.cli("key", "rotate", made["id"], "--overlap", "2s")
    assert successor["models"] == ["mock"] and successor["first_id"] == made["id"]
    old, new = client(platform, made["key"]), client(platform, successor["key"])
    assert [ask(old), ask(new), ask(old), ask(new)] == [200] * 4, "both work"
    wait_until(lambda: ask(old) == 401, 5)
    assert flood(platform, successor["key"], 10, threads=2)[200] <= 2, "and share the limit"


def test_the_limits_of_a_stopped_platform_can_be_listed(mock: Mock, tmp_path_factory: pytest.TempPathFactory) -> None:
    platform = start_platform(tmp_path_factory.mktemp("stopped"), mock.config())
    with platform:
        platform.cli("limit", "set", "--tenant", "demo", "--rpm", "7")
    (limit,) = platform.cli("limit", "list")["limits"]
    assert (limit["tenant"], limit["amount"]) == ("demo", 7)
