"""Where requests go: prefixes, sessions, load, aliases, splits, fallbacks and their price."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.fleet import CachingEngine, Fleet, dead_port, either, models, replicas, stream_slowly, whole
from tests.support.plane import CHAT, PRICE, Plane, model
from tests.support.prices import token_price
from tests.support.wire import get, post
from tidemill.gateway.routing.models import ModelCost
from tidemill.ledger.components import CACHED_INPUT, INPUT, OUTPUT
from tidemill.ledger.money import parse_amount
from tidemill.ledger.posting import credit_grant
from tidemill.store.accounts import post as post_money
from tidemill.store.ids import new_id
from tidemill.store.keys import create_key
from tidemill.store.prices import set_price
from tidemill.store.tenants import create_tenant

CHEAPER = ModelCost("USD", token_price(PRICE.rates[INPUT] // 2, PRICE.rates[CACHED_INPUT], PRICE.rates[OUTPUT] - 1))
"""Covered by the price in each kind of token."""
DEARER = ModelCost("USD", token_price(PRICE.rates[INPUT] // 2, PRICE.rates[CACHED_INPUT] + 1, PRICE.rates[OUTPUT] // 2))
"""Less in all, but not in each kind."""


@pytest_asyncio.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(tmp_path, stack)


def text_of(conversation: int, turn: int) -> str:
    """About 80 words, different for each turn of each conversation."""
    return " ".join(f"c{conversation}t{turn}w{index}" for index in range(80))


async def converse(plane: Plane, conversations: int, turns: int) -> None:
    """Conversations whose turns come interleaved; each turn sends all before it again."""
    chance = random.Random(3)
    for turn in range(turns):
        order = list(range(conversations))
        chance.shuffle(order)
        for each in order:
            messages = [{"role": "user", "content": text_of(each, t)} for t in range(turn + 1)]
            assert (await plane.ask(messages=messages)).status == 200


# Prefixes


async def test_turns_of_a_conversation_go_where_its_prefix_is(fleet: Fleet) -> None:
    scripts = [CachingEngine() for _ in range(3)]
    ports = [engine.port for engine in await fleet.engines(*scripts)]
    plane = await fleet.plane(models("mock", *ports))
    await converse(plane, conversations=9, turns=6)
    prompt, cached = sum(each.prompt for each in scripts), sum(each.cached for each in scripts)
    assert cached / prompt > 0.66, "of six turns, a tail that is new each time remains: at best 15/21"
    homes = [set(each.conversations) for each in scripts]
    assert all(homes), "and no cache stays empty"
    assert sum(len(each) for each in homes) == 9, "no conversation was in two places"
    records = await plane.settled()
    assert sum(each.cached for each in records) == cached
    assert len(records) == 54


async def test_one_prefix_for_all_spreads_when_there_is_a_crowd(fleet: Fleet) -> None:
    scripts = [CachingEngine(tokens_a_second=2000) for _ in range(2)]
    engines = await fleet.engines(*scripts)
    plane = await fleet.plane(models("mock", *(engine.port for engine in engines)))
    system = {"role": "system", "content": text_of(0, 0)}
    asks = [
        plane.ask(messages=[system, {"role": "user", "content": text_of(each, 1)}], max_tokens=5) for each in range(40)
    ]
    assert {answer.status for answer in await asyncio.gather(*asks)} == {200}
    shares = [len(engine.asked) for engine in engines]
    assert min(shares) >= 12, shares


async def test_with_one_replica_nothing_is_hashed(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(*_: object) -> list[int]:
        raise AssertionError("hashed")

    monkeypatch.setattr("tidemill.gateway.routing.selector.prompt_keys", hashed)
    (engine,) = await fleet.engines(whole)
    plane = await fleet.plane(models("mock", engine.port))
    assert (await plane.ask()).status == 200


# Load


async def test_a_request_goes_past_a_busy_replica(fleet: Fleet) -> None:
    engines = await fleet.engines(stream_slowly, stream_slowly)
    plane = await fleet.plane(models("mock", *(engine.port for engine in engines)))
    asks = [asyncio.create_task(plane.ask(stream=True)) for _ in range(6)]
    await asyncio.sleep(0.5)
    assert [len(engine.asked) for engine in engines] == [3, 3]
    for each in asks:
        await each
    assert all(replica.in_flight == 0 for replica in plane.routes.by_name["mock"].replicas)


async def test_a_full_replica_is_passed_by(fleet: Fleet) -> None:
    """Whatever its cache holds: a request that waits for a slot waits for a whole answer."""
    engines = await fleet.engines(stream_slowly, stream_slowly)
    plane = await fleet.plane(models("mock", *(engine.port for engine in engines), slots=2))
    messages = [{"role": "user", "content": text_of(0, 0)}]
    asks = [asyncio.create_task(plane.ask(stream=True, messages=messages, max_tokens=1)) for _ in range(4)]
    async with asyncio.timeout(60):
        while sum(len(engine.asked) for engine in engines) < 4:
            await asyncio.sleep(0.01)
    assert [len(engine.asked) for engine in engines] == [2, 2]
    await asyncio.gather(*asks)


# Sessions


async def ask_in_session(plane: Plane, header: str | None = None, **fields: object) -> None:
    body = {"model": "mock", "messages": [{"role": "user", "content": "hi"}], **fields}
    headers = b"x-session-id: %b\r\n" % header.encode() if header else b""
    assert (await plane.send(post(CHAT, body, plane.key, headers))).status == 200


@pytest.mark.parametrize("selector", ["header", "user", "prompt_cache_key"])
async def test_a_session_has_a_home(fleet: Fleet, selector: str) -> None:
    """The same one in each gateway process, as they do not talk to each other."""
    homes: list[list[str]] = []
    for _ in range(2):
        engines = await fleet.engines(whole, whole, whole)
        plane = await fleet.plane(models("mock", *(engine.port for engine in engines)))
        plane_homes = []
        for session in ("s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"):
            before = [len(engine.asked) for engine in engines]
            for _ in range(3):
                await (
                    ask_in_session(plane, session)
                    if selector == "header"
                    else ask_in_session(plane, **{selector: session})
                )
            grown = [len(engine.asked) - count for engine, count in zip(engines, before, strict=True)]
            assert sorted(grown) == [0, 0, 3], (session, grown)
            plane_homes.append(f"{session}:{grown.index(3)}")
        homes.append(plane_homes)
    assert len({each[-1] for each in homes[0]}) > 1, "not all in one place"


async def test_the_header_goes_before_the_fields(fleet: Fleet) -> None:
    engines = await fleet.engines(whole, whole, whole)
    plane = await fleet.plane(models("mock", *(engine.port for engine in engines)))
    for user in ("a", "b", "c", "d", "e", "f"):
        await ask_in_session(plane, "one-session", user=user)
    assert sorted(len(engine.asked) for engine in engines) == [0, 0, 6]


async def test_an_absurd_session_is_none(fleet: Fleet) -> None:
    engines = await fleet.engines(whole, whole)
    plane = await fleet.plane(models("mock", *(engine.port for engine in engines)))
    await ask_in_session(plane, user="x" * 10_000)
    await ask_in_session(plane, user=None)
    await ask_in_session(plane, prompt_cache_key={"not": ["a", "text"]})


# Names


async def test_an_alias_is_the_model_itself(fleet: Fleet) -> None:
    (engine,) = await fleet.engines(whole)
    plane = await fleet.plane(models("mock", engine.port, aliases=("gpt-4o", "latest")))
    assert (await plane.ask(model="gpt-4o")).status == 200
    assert engine.asked[0].json["model"] == "mock-upstream"
    record = await plane.record()
    assert record.opened.model == "mock", "records, prices and invoices know one name"
    assert record.charge == 100 * 1000 + 10 * 2000
    listed = (await plane.send(get("/v1/models", plane.key))).json["data"]
    assert [each["id"] for each in listed] == ["gpt-4o", "latest", "mock"]
    assert (await plane.send(get("/v1/models/latest", plane.key))).json["id"] == "latest"
    refused = await plane.ask(model="latets")
    assert refused.status == 404 and "latest" in refused.error["message"]


# Splits


async def test_a_split_is_kept_and_sticks(fleet: Fleet) -> None:
    engines = await fleet.engines(whole, whole)
    plane = await fleet.plane(
        models("mock", engines[0].port, split=(("mock-v2", 25.0),)),
        models("mock-v2", engines[1].port),
    )
    arms: dict[str, set[str]] = {}
    for _ in range(2):
        for session in range(200):
            before = len(engines[1].asked)
            await ask_in_session(plane, f"session-{session}")
            arms.setdefault(f"session-{session}", set()).add("v2" if len(engines[1].asked) > before else "v1")
    assert all(len(each) == 1 for each in arms.values()), "a session stays in its arm"
    share = sum(each == {"v2"} for each in arms.values()) / len(arms)
    assert 0.15 < share < 0.35, share
    records = await plane.settled()
    assert {each.opened.model for each in records} == {"mock"}
    assert {each.charge for each in records} == {100 * 1000 + 10 * 2000}, "at the asked model's price"
    served = Counter(each.opened.replica for each in records)
    assert set(served) == {"mock/0", "mock-v2/0"}, "and the record says who did it"
    assert {asked.json["model"] for asked in engines[1].asked} == {"mock-v2-upstream"}


async def test_without_a_session_a_tenant_stays_in_its_arm(fleet: Fleet) -> None:
    engines = await fleet.engines(whole, whole)
    plane = await fleet.plane(
        models("mock", engines[0].port, split=(("mock-v2", 50.0),)), models("mock-v2", engines[1].port)
    )
    for _ in range(10):
        assert (await plane.ask()).status == 200
    assert sorted(len(engine.asked) for engine in engines) == [0, 10]


async def test_a_canary_that_is_down_costs_nobody_an_answer(fleet: Fleet) -> None:
    (engine,) = await fleet.engines(whole)
    plane = await fleet.plane(
        models("mock", engine.port, split=(("mock-v2", 100.0),)), models("mock-v2", dead_port(), owned=True)
    )
    for _ in range(4):
        assert (await plane.ask()).status == 200
    assert {each.opened.replica for each in await plane.settled()} == {"mock/0"}


async def test_a_canary_above_the_price_is_not_sold(fleet: Fleet) -> None:
    engines = await fleet.engines(whole, whole)
    plane = await fleet.plane(
        models("mock", engines[0].port, split=(("mock-v2", 100.0),)), models("mock-v2", engines[1].port, cost=DEARER)
    )
    assert (await plane.ask()).status == 200
    assert (await plane.record()).opened.replica == "mock/0"


# Fallbacks


@pytest.mark.parametrize("stream", [False, True])
async def test_a_fallback_answers_at_the_price_of_the_asked_model(fleet: Fleet, stream: bool) -> None:
    (other,) = await fleet.engines(either)
    plane = await fleet.plane(
        models("mock", dead_port(), fallbacks=("other",)), models("other", other.port, cost=CHEAPER)
    )
    answer = await plane.ask(stream=stream)
    assert answer.status == 200
    record = await plane.record()
    assert (record.opened.model, record.opened.replica) == ("mock", "other/0")
    assert record.charge == 100 * 1000 + (2 if stream else 10) * 2000
    assert record.status == "ok"
    assert other.asked[0].json["model"] == "other-upstream"


async def test_a_fallback_is_asked_at_once_when_the_model_is_known_to_be_down(fleet: Fleet) -> None:
    (other,) = await fleet.engines(whole)
    plane = await fleet.plane(
        models("mock", dead_port(), fallbacks=("other",), replicas=replicas("mock", dead_port(), ready=False)),
        model(other.port, "other"),
    )
    assert (await plane.ask()).status == 200
    assert (await plane.record()).opened.replica == "other/0"


async def test_nothing_is_sold_below_cost(fleet: Fleet) -> None:
    (other,) = await fleet.engines(whole)
    plane = await fleet.plane(
        models("mock", dead_port(), fallbacks=("other",)), models("other", other.port, cost=DEARER)
    )
    answer = await plane.ask()
    assert answer.status == 503 and answer.headers["retry-after"]
    assert other.asked == []
    (record,) = await plane.settled()
    assert (record.charge, record.status) == (0, "engine_lost")


async def test_unless_the_operator_says_so(fleet: Fleet) -> None:
    (other,) = await fleet.engines(whole)
    plane = await fleet.plane(
        models("mock", dead_port(), fallbacks=("other",), allow_loss=True), models("other", other.port, cost=DEARER)
    )
    assert (await plane.ask()).status == 200


async def test_the_next_fallback_that_pays_is_taken(fleet: Fleet) -> None:
    dear, fair = await fleet.engines(whole, whole)
    plane = await fleet.plane(
        models("mock", dead_port(), fallbacks=("dear", "gone", "fair")),
        models("dear", dear.port, cost=DEARER),
        models("gone", dead_port(), cost=CHEAPER),
        models("fair", fair.port, cost=CHEAPER),
    )
    assert (await plane.ask()).status == 200
    assert (await plane.record()).opened.replica == "fair/0"
    assert dear.asked == []


async def test_a_tenant_in_another_currency_is_not_compared(fleet: Fleet) -> None:
    (other,) = await fleet.engines(whole)
    free = models("free", other.port)
    for allow_loss, cost, status in ((False, CHEAPER, 503), (True, CHEAPER, 200), (False, None, 200)):
        asked = models("mock", dead_port(), fallbacks=("free",), allow_loss=allow_loss)
        plane = await fleet.plane(asked, models("free", other.port, cost=cost) if cost else free)
        now = datetime.now(UTC)
        with plane.store.write() as connection:
            tenant = create_tenant(connection, name="deutsch", currency="EUR", now=now)
            _, key = create_key(connection, tenant_id=tenant.tenant_id, name="test", now=now)
            set_price(connection, model="mock", currency="EUR", price=PRICE, now=now)
            post_money(
                connection,
                credit_grant(
                    new_id("txn"), tenant_id=tenant.tenant_id, currency="EUR", amount=parse_amount("100"), at=now
                ),
            )
        body = {"model": "mock", "messages": [{"role": "user", "content": "hi"}]}
        await plane.authenticator.renew()
        assert (await plane.send(post(CHAT, body, key))).status == status
        await asyncio.sleep(0.05)
        # The fixture's own tenant has not spent anything; this one has.
        plane.tenant_id = tenant.tenant_id


async def test_embeddings_do_not_fall_back(fleet: Fleet) -> None:
    """Vectors of another model lie in another space: worse than no answer."""
    (other,) = await fleet.engines(whole)
    plane = await fleet.plane(models("mock", dead_port(), fallbacks=("other",)), models("other", other.port))
    answer = await plane.send(post("/v1/embeddings", {"model": "mock", "input": "hello"}, plane.key))
    assert answer.status == 503
    assert other.asked == []


async def test_a_context_that_is_too_small_is_no_fallback(fleet: Fleet) -> None:
    (other,) = await fleet.engines(whole)
    plane = await fleet.plane(
        models("mock", dead_port(), fallbacks=("other",)), models("other", other.port, context=512)
    )
    assert (await plane.ask(messages=[{"role": "user", "content": "word " * 2000}])).status == 503
    assert (await plane.ask(max_tokens=500)).status == 503
    assert (await plane.ask()).status == 200


async def test_a_fallback_keeps_its_own_limit(fleet: Fleet) -> None:
    (other,) = await fleet.engines(whole)
    spare = models("other", other.port, max_output_tokens=99)
    plane = await fleet.plane(models("mock", dead_port(), fallbacks=("other",), max_output_tokens=256), spare)
    assert (await plane.ask()).status == 200
    assert (await plane.ask(max_tokens=7)).status == 200
    assert [asked.json["max_tokens"] for asked in other.asked] == [99, 7]


@pytest.mark.parametrize("overflow", [False, True])
async def test_what_is_full_flows_over_if_told_so(fleet: Fleet, overflow: bool) -> None:
    own, other = await fleet.engines(stream_slowly, whole)
    plane = await fleet.plane(
        models("mock", own.port, slots=1, fallbacks=("other",), overflow=overflow),
        models("other", other.port, cost=CHEAPER),
    )
    first = asyncio.create_task(plane.ask(stream=True))
    await asyncio.sleep(0.3)
    second = asyncio.create_task(plane.ask(stream=True) if not overflow else plane.ask())
    await asyncio.gather(first, second)
    assert len(other.asked) == overflow
