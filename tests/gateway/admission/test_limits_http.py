"""What tenants see of limits: headers, errors, budgets, and keys that are bound to something."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from anthropic import RateLimitError

from tests.gateway.clients import anthropic as anthropic_client
from tests.support.data_plane import Start
from tests.support.plane import Plane
from tests.support.upstream import Asked, Caller, completion, finish, role, usage, word
from tests.support.wire import get, post
from tidemill.gateway.auth.key_policy import networks_of
from tidemill.ledger.limits import Per
from tidemill.store.keys import KeyPolicy, create_key
from tidemill.store.tables.limits import budgets

LIMIT, REMAINING, RESET = (f"x-ratelimit-{what}" for what in ("limit", "remaining", "reset"))


async def answers(asked: Asked, caller: Caller) -> None:
    """Two tokens for a prompt of five: 9000 nanos."""
    if asked.json.get("stream"):
        await caller.stream(role(), word("one"), word("two"), finish(), usage(5, 2), b"data: [DONE]\n\n")
    else:
        await caller.whole(completion(usage={"prompt_tokens": 5, "completion_tokens": 2}))


async def bound_key(plane: Plane, **policy: object) -> str:
    with plane.store.write() as connection:
        _, key = create_key(
            connection,
            tenant_id=plane.tenant_id,
            name="bound",
            now=datetime.now(UTC),
            policy=KeyPolicy(**policy),  # type: ignore[arg-type]
        )
    await plane.authenticator.renew()
    return key


async def test_headers_as_openais_clients_read_them(start: Start) -> None:
    plane, _ = await start(answers)
    assert not any(name.startswith("x-ratelimit") for name in (await plane.ask()).headers)
    await plane.limit("rpm", 3)
    await plane.limit("tpm", 5000)
    first = await plane.ask(max_tokens=100)
    assert (first.headers[f"{LIMIT}-requests"], first.headers[f"{REMAINING}-requests"]) == ("3", "2")
    assert first.headers[f"{LIMIT}-tokens"] == "5000"
    assert 4850 < int(first.headers[f"{REMAINING}-tokens"]) < 4900
    assert first.headers[f"{RESET}-requests"] in ("60s", "61s", "62s")
    streamed = await plane.ask(stream=True, max_tokens=100)
    assert streamed.status == 200 and streamed.headers[f"{REMAINING}-requests"] == "1"
    await plane.ask()
    refused = await plane.ask()
    assert refused.status == 429 and refused.headers[f"{REMAINING}-requests"] == "0"
    assert 55 <= int(refused.headers["retry-after"]) <= 62
    assert refused.error["type"] == "rate_limit_error" and refused.error["code"] == "rate_limit_exceeded"
    assert refused.error["message"].startswith(
        "Rate limit reached for your account: 3 requests per minute. Try again in"
    )
    assert len(await plane.settled()) == 4


async def test_headers_as_anthropics_clients_read_them(start: Start) -> None:
    plane, _ = await start(answers)
    client = anthropic_client(plane)
    raw = client.messages.with_raw_response
    asked: dict[str, Any] = {"model": "mock", "max_tokens": 100, "messages": [{"role": "user", "content": "one two"}]}
    assert not any("ratelimit" in name for name in (await raw.create(**asked)).headers)
    await plane.limit("rpm", 3)
    await plane.limit("tpm", 5000)
    before = datetime.now(UTC)
    first = (await raw.create(**asked)).headers
    of = "anthropic-ratelimit"
    assert (first[f"{of}-requests-limit"], first[f"{of}-requests-remaining"]) == ("3", "2")
    assert first[f"{of}-tokens-limit"] == "5000" and 4850 < int(first[f"{of}-tokens-remaining"]) < 4900
    for what in ("requests", "tokens"):
        instant = datetime.fromisoformat(first[f"{of}-{what}-reset"])
        assert timedelta(seconds=55) < instant - before < timedelta(seconds=70)
    assert not any(name.startswith("x-ratelimit") for name in first), "one API's manners at a time"
    async with client.messages.stream(**asked) as stream:
        assert stream.response.headers[f"{of}-requests-remaining"] == "1"
        await stream.until_done()
    assert (await raw.create(**asked)).headers[f"{of}-requests-remaining"] == "0"
    with pytest.raises(RateLimitError) as refused:
        await client.messages.create(**asked)
    headers = refused.value.response.headers
    assert headers[f"{of}-requests-remaining"] == "0" and 55 <= int(headers["retry-after"]) <= 62
    assert refused.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    assert len(await plane.settled()) == 4


async def test_counting_tokens_takes_of_the_limit_on_requests_and_of_no_other(start: Start) -> None:
    plane, _ = await start(answers)
    limits = [await plane.limit(kind, amount) for kind, amount in (("rpm", 2), ("tpm", 50), ("concurrency", 1))]
    raw = anthropic_client(plane).messages.with_raw_response
    asked: dict[str, Any] = {"model": "mock", "messages": [{"role": "user", "content": "one two " * 100}]}
    counted = await raw.count_tokens(**asked)
    assert (await counted.parse()).input_tokens > 100, "more than a message may have"
    assert counted.headers["anthropic-ratelimit-requests-remaining"] == "1"
    assert "anthropic-ratelimit-tokens-limit" not in counted.headers
    await raw.count_tokens(**asked)
    with pytest.raises(RateLimitError) as refused:
        await raw.count_tokens(**asked)
    assert int(refused.value.response.headers["retry-after"]) > 0
    assert plane.limits.shares.rate(limits[1]).share.spent == {}
    assert await plane.settled() == []


async def test_the_tightest_of_several_limits_is_shown_and_named(start: Start) -> None:
    plane, _ = await start(answers)
    await plane.limit("rpm", 100)
    await plane.limit("rpm", 1, model="mock")
    answer = await plane.ask()
    assert answer.headers[f"{LIMIT}-requests"] == "1"
    assert "your account, for the model 'mock': 1 request per minute" in (await plane.ask()).error["message"]


async def test_tokens_count_as_they_were_used_also_when_the_engine_refuses(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        if asked.json.get("user") == "bad":
            await caller.whole({"error": {"message": "no"}}, status=400)
        else:
            await answers(asked, caller)

    plane, _ = await start(script)
    limit = await plane.limit("tpm", 100_000)
    for user in ("bad", "good", "good"):
        await plane.ask(user=user)
    await plane.settled()
    assert sum(plane.limits.shares.rate(limit).share.spent.values()) == 14


async def test_a_request_that_is_refused_for_its_money_is_no_request(start: Start) -> None:
    plane, _ = await start(answers, credit="0")
    limit = await plane.limit("rpm", 10)
    await plane.limit("concurrency", 10)
    assert (await plane.ask()).status == 402
    assert plane.limits.shares.rate(limit).share.spent == {}


async def test_concurrency_ends_with_the_answer(start: Start) -> None:
    gate = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await gate.wait()
        await answers(asked, caller)

    plane, upstream = await start(script)
    await plane.limit("concurrency", 2)
    open_ones = [asyncio.create_task(plane.ask()) for _ in range(2)]
    async with asyncio.timeout(60):
        while len(upstream.asked) < 2:
            await asyncio.sleep(0.01)
    refused = await plane.ask()
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert "2 concurrent requests" in refused.error["message"]
    gate.set()
    assert [(await each).status for each in open_ones] == [200, 200]
    assert (await plane.ask()).status == 200


async def test_a_hard_budget_stops_and_says_when_it_begins_anew(start: Start) -> None:
    plane, _ = await start(answers)
    await plane.limit("budget", 1_000_000, per=Per.DAY)  # a request may cost up to 0.65 thousandths
    assert (await plane.ask(max_tokens=100)).status == 200
    assert (await plane.ask(max_tokens=100)).status == 200
    refused = await plane.ask(max_tokens=1000)
    assert refused.status == 429 and refused.error["code"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false", "or OpenAI's clients would try again at once"
    assert 1 <= int(refused.headers["retry-after"]) <= 86_400
    message = refused.error["message"]
    assert message.startswith(
        "The budget of 0.001 USD per day for your account does not cover this request: it may cost"
    )
    assert "0.000982 USD is available" in message and "The next period begins at" in message
    await plane.settled()
    assert plane.wallet.spent == 2 * 9000, "the balance and the budget hold or charge the same"


async def test_many_requests_at_once_never_exceed_a_budget(start: Start) -> None:
    plane, _ = await start(answers)
    limit = await plane.limit("budget", 2_000_000, per=Per.MONTH, model="mock")  # five holds at a time
    asked = [plane.ask(max_tokens=10, messages=[{"role": "user", "content": "x"}]) for _ in range(40)]
    statuses = [answer.status for answer in await asyncio.gather(*asked)]
    assert set(statuses) == {200, 429}
    await plane.settled()
    spent = [purse.wallet.spent for purse_id, purse in plane.leasing._purses.items() if not isinstance(purse_id, str)]
    assert spent == [9000 * statuses.count(200)] and spent[0] <= limit.amount


async def test_a_stream_that_uses_a_budget_up_is_stopped_and_told_so(start: Start) -> None:
    async def endless(asked: Asked, caller: Caller) -> None:
        assert asked.json["max_tokens"] < 256
        words = [word(f"w{number}") for number in range(asked.json["max_tokens"])]
        await caller.stream(role(), *words, finish("length"), usage(5, len(words)), b"data: [DONE]\n\n")

    plane, _ = await start(endless)
    await plane.limit("budget", 800_000, per=Per.DAY)
    answer = await plane.ask(stream=True)
    *_, stopped, done = answer.events
    assert done == "[DONE]"
    assert '"insufficient_quota"' in stopped and "Your budget is used up" in stopped


async def test_a_soft_limit_warns_in_a_header(start: Start) -> None:
    plane, _ = await start(answers)
    limit = await plane.limit("budget", 100_000_000, per=Per.MONTH, soft_percent=80)
    assert "x-tidemill-budget-warning" not in (await plane.ask()).headers
    label = plane.limits.plan(
        plane.authenticator.snapshot.keys[next(iter(plane.authenticator.snapshot.keys))], "mock"
    ).budgets[0]  # type: ignore[union-attr]
    period = label.period(time.time_ns() // 1000).span.label
    with plane.store.write() as connection:  # as the loader does once enough is spent (tests/meter/test_budgets.py)
        connection.execute(budgets.update().where(budgets.c.limit_id == limit.limit_id).values(warned_at=1))
        connection.execute(budgets.update().values(period=period))
    await plane.limit("rpm", 1000)
    answer = await plane.ask()
    warning = "80% of a budget of 0.10 USD per month for your account is used"
    assert answer.status == 200 and answer.headers["x-tidemill-budget-warning"] == warning


async def test_a_key_that_has_expired_is_no_key(start: Start) -> None:
    plane, _ = await start(answers)
    key = await bound_key(plane, expires_at=datetime.now(UTC) + timedelta(seconds=0.4))
    assert (await plane.send(plane.request(key=key))).status == 200
    await asyncio.sleep(0.5)
    refused = await plane.send(plane.request(key=key))
    assert refused.status == 401 and refused.error["message"].startswith("This API key expired at 20")
    assert (await plane.send(get("/v1/models", key))).status == 401


async def test_a_key_may_be_bound_to_models(start: Start) -> None:
    plane, _ = await start(answers)
    other, same = await bound_key(plane, models=("elsewhere",)), await bound_key(plane, models=("mock",))
    refused = await plane.send(plane.request(key=other))
    assert (refused.status, refused.error["param"]) == (403, "model")
    assert refused.error["message"] == "This API key may not use the model 'mock'. It may use: elsewhere."
    assert (await plane.send(plane.request(key=same))).status == 200
    assert (await plane.send(get("/v1/models", other))).json["data"] == []
    assert [each["id"] for each in (await plane.send(get("/v1/models", same))).json["data"]] == ["mock"]


@pytest.mark.parametrize(
    ("networks", "proxies", "forwarded", "status"),
    [
        ("127.0.0.0/8", "", "", 200),
        ("10.0.0.0/8", "", "", 403),
        ("10.0.0.0/8", "", "10.1.2.3", 403),  # a header that anybody can send
        ("10.0.0.0/8", "127.0.0.1", "10.1.2.3", 200),
        ("10.0.0.0/8", "127.0.0.1", "10.1.2.3, 192.0.2.1", 403),  # what stands before the first stranger is hearsay
        ("10.0.0.0/8", "127.0.0.1,192.0.2.0/24", "8.8.8.8, 10.1.2.3, 192.0.2.1", 200),
        ("10.0.0.0/8", "127.0.0.1", "nonsense", 403),
        ("2001:db8::/32,10.0.0.0/8", "127.0.0.1", "2001:db8::7", 200),
        ("10.0.0.0/8", "127.0.0.1", "::ffff:10.1.2.3", 200),
    ],
)
async def test_a_key_may_be_bound_to_networks(
    start: Start, networks: str, proxies: str, forwarded: str, status: int
) -> None:
    plane, _ = await start(answers)
    key = await bound_key(plane, networks=tuple(networks.split(",")))
    plane.authenticator._proxies = networks_of(tuple(proxies.split(","))) if proxies else ()
    headers = f"x-forwarded-for: {forwarded}\r\n".encode() if forwarded else b""
    body = {"model": "mock", "messages": [{"role": "user", "content": "x"}]}
    answer = await plane.send(post("/v1/chat/completions", body, key, headers))
    assert answer.status == status
    if status == 403:
        assert "may not be used from" in answer.error["message"]
