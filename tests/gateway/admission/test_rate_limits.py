"""Limits of several gateway processes that share a store: objects in one event loop here, but for that real."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from tests.store.databases import FlakyStore
from tests.support.stores import migrated_store
from tests.support.waiting import until
from tidemill.errors import Unavailable
from tidemill.gateway.admission import limit_leases as shares_module
from tidemill.gateway.admission import rate_limits as limits_module
from tidemill.gateway.admission.limit_leases import LimitLeases
from tidemill.gateway.admission.rate_limits import BoundLimits, LimitReservation, RateLimits, estimate
from tidemill.gateway.auth.snapshot import EMPTY, Principal
from tidemill.gateway.errors import RateLimited
from tidemill.gateway.protocols.request import read_chat, read_embeddings
from tidemill.ledger.limits import Limit, LimitKind
from tidemill.store.limits import set_limit
from tidemill.store.tenants import create_tenant

BODY = (
    b'{"model":"m","messages":[{"role":"user","content":"1234567890123456789012345678901234567890"}],"max_tokens":%d}'
)


def chat(max_tokens: int = 10) -> Any:
    body = BODY % max_tokens
    return read_chat(body), body


class Site:
    """Gateway processes on one store."""

    def __init__(self, path: Path) -> None:
        self.store = FlakyStore(migrated_store(path).engine)
        with self.store.write() as connection:
            self.tenant = create_tenant(connection, name="acme", currency="USD", now=datetime.now(UTC)).tenant_id
        self.pool = ThreadPoolExecutor(8)
        self.processes: list[RateLimits] = []
        self._beats: list[asyncio.Task[None]] = []
        self._limits: tuple[Limit, ...] = ()

    def limit(self, kind: str, amount: int, **more: Any) -> Limit:
        wanted = Limit(limit_id="", tenant_id=self.tenant, kind=LimitKind(kind), amount=amount, **more)
        with self.store.write() as connection:
            made = set_limit(connection, wanted, now=datetime.now(UTC))
        self._limits = (*(each for each in self._limits if each.limit_id != made.limit_id), made)
        for process in self.processes:
            process.update(structs.replace(EMPTY, limit_ids=frozenset(each.limit_id for each in self._limits)))
        return made

    @property
    def principal(self) -> Principal:
        return Principal(self.tenant, "key_1", "USD", first_key_id="key_1", limits=self._limits)

    def start(self, count: int, *, beat: bool = True, patience_s: float = 60.0) -> list[RateLimits]:
        for _ in range(count):
            shares = LimitLeases(self.store, f"w{len(self.processes)}", self.pool, patience_s=patience_s)
            process = RateLimits(shares, "UTC")
            self.processes.append(process)
            if beat:
                self._beats.append(asyncio.create_task(self._beat(process)))
        return self.processes

    async def _beat(self, process: RateLimits) -> None:
        while True:
            await asyncio.sleep(0.2)  # five times as fast as it does
            await process.shares.beat()

    def plan(self, process: RateLimits) -> BoundLimits:
        plan = process.plan(self.principal, "m")
        assert plan is not None
        return plan

    async def enter(self, process: RateLimits, max_tokens: int = 10) -> LimitReservation:
        request, body = chat(max_tokens)
        plan = self.plan(process)
        return process.enter_now(plan, request, body) or await process.enter(plan, request, body)

    async def flood(self, counts: list[int], **options: Any) -> list[LimitReservation]:
        """So many requests at each process, all at once; gives those that were let in."""
        asked = [
            self.enter(process, **options)
            for process, count in zip(self.processes, counts, strict=True)
            for _ in range(count)
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(each, LimitReservation | RateLimited) for each in answers), answers
        return [each for each in answers if isinstance(each, LimitReservation)]

    def close(self) -> None:
        for beat in self._beats:
            beat.cancel()
        self.pool.shutdown(wait=False)
        self.store.close()


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


@pytest.mark.parametrize("counts", [[200], [100, 100], [190, 10], [50, 50, 50, 50]])
async def test_of_200_requests_exactly_100_pass_however_they_fall_on_processes(site: Site, counts: list[int]) -> None:
    """LiteLLM's documentation: 100 RPM x 4 workers lets 400 through without Redis."""
    site.start(len(counts))
    site.limit("rpm", 100)
    assert len(await site.flood(counts)) == 100


async def test_permits_that_another_process_does_not_use_are_called_in(site: Site) -> None:
    one, other = site.start(2)
    site.limit("rpm", 40)
    stays = [await site.enter(one) for _ in range(10)]  # and asks ahead for more of them
    await asyncio.sleep(0.05)
    assert site.plan(one).requests[0].share.held > 0
    passed = await site.flood([0, 60])
    assert len(stays) + len(passed) == 40
    assert await site.flood([5, 5]) == []
    with pytest.raises(RateLimited) as refused:
        await site.enter(other)
    assert 50 < (refused.value.retry_after_s or 0) <= 61
    assert str(refused.value).startswith("Rate limit reached for your account: 40 requests per minute. Try again in ")


async def test_a_limit_is_raised_lowered_and_removed_at_once(site: Site) -> None:
    (one,) = site.start(1)
    site.limit("rpm", 10)
    assert len(await site.flood([20])) == 10
    site.limit("rpm", 15)
    assert len(await site.flood([20])) == 5
    site.limit("rpm", 3)
    assert await site.flood([5]) == []
    site._limits = ()
    assert one.plan(site.principal, "m") is None


async def test_concurrent_requests_are_counted_over_processes(site: Site) -> None:
    one, _ = site.start(2)
    site.limit("concurrency", 5)
    stays = await site.flood([3, 9])
    assert len(stays) == 5
    with pytest.raises(RateLimited, match="5 concurrent requests. Try again when one of them has finished"):
        await site.enter(one)
    for stay in stays:
        stay.leave(10)
    await asyncio.sleep(0.5)
    assert len(await site.flood([9, 0])) == 5, "slots that the other has no use for come back"


async def test_tokens_are_taken_by_estimate_and_counted_by_use(site: Site) -> None:
    (one,) = site.start(1)
    site.limit("tpm", 1000)
    (rate,) = site.plan(one).tokens
    stay = await site.enter(one, max_tokens=400)
    assert stay.tokens == 428  # 28 of the prompt's 112 bytes
    assert rate.remaining(one.shares.second()) == 1000 - 428
    with pytest.raises(RateLimited, match="1,000 tokens per minute. This request needs 628 tokens"):
        await site.enter(one, max_tokens=600)
    stay.leave(100)
    second = await site.enter(one, max_tokens=600)
    second.leave(1200)  # it was more than anybody could know: it counts, beyond the limit
    with pytest.raises(RateLimited):
        await site.enter(one, max_tokens=1)
    assert rate.share.spent and sum(rate.share.spent.values()) == 1300


async def test_an_answer_of_unknown_length_does_not_need_all_of_a_small_limit(site: Site) -> None:
    (one,) = site.start(1)
    site.limit("tpm", 500)
    stay = await site.enter(one, max_tokens=100_000)
    assert stay.tokens == 500
    stay.cancel()
    request, body = read_chat(long := BODY.replace(b"1234567890", b"x" * 3000) % 5), long
    with pytest.raises(RateLimited, match="too large for your account: its prompt is estimated at 3,017 tokens"):
        await one.enter(site.plan(one), request, body)


def test_estimates() -> None:
    request, body = chat(10)
    assert estimate(request, body) == (27, 10)
    request, body = chat(50_000)
    assert estimate(request, body) == (28, 1024)
    picture = b'{"model":"m","messages":[{"role":"user","content":[{"image_url":"data:image/png;base64,%s"}]}]}'
    big = picture % (b"A" * 1_000_000)
    assert estimate(read_chat(big), big) == (4096 + 1024, 1024), "a picture's bytes are no tokens"
    vectors = b'{"model":"m","input":"12345678"}'
    assert estimate(read_embeddings(vectors), vectors) == (8, 0)


async def test_several_limits_are_taken_all_or_none(site: Site) -> None:
    (one,) = site.start(1)
    site.limit("rpm", 10)
    site.limit("concurrency", 3)
    assert len(await site.flood([10])) == 3
    (requests,) = site.plan(one).requests
    assert sum(requests.share.spent.values()) == 3, "who was refused for one limit costs nothing of another"


async def test_without_the_store_permits_at_hand_go_on_and_then_the_error_says_so(site: Site) -> None:
    (one,) = site.start(1, beat=False)
    site.limit("rpm", 100)
    await site.flood([8])
    await asyncio.sleep(0.3)
    await site.enter(one)
    await asyncio.sleep(0.3)
    held = site.plan(one).requests[0].share.held
    assert held > 0
    site.store.down = True
    began = time.monotonic()
    for _ in range(held):
        await site.enter(one)
    with pytest.raises(Unavailable, match=r"Your limits \(rpm\) cannot be checked now: the database does not answer"):
        await site.enter(one)
    assert time.monotonic() - began < 1.0
    site.store.down = False
    await site.enter(one)


async def test_a_frozen_store_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM PR 35273: Redis frozen, every request hangs."""
    thaw = threading.Event()
    exchange_in = shares_module.exchange_in

    def frozen(*arguments: Any) -> Any:
        thaw.wait(60)
        return exchange_in(*arguments)

    monkeypatch.setattr(shares_module, "exchange_in", frozen)
    (one,) = site.start(1, patience_s=1.0)
    site.limit("rpm", 100)
    took = []
    for _ in range(2):
        began = time.monotonic()
        answers = await asyncio.gather(*(site.enter(one) for _ in range(50)), return_exceptions=True)
        took.append(time.monotonic() - began)
        assert all(isinstance(each, Unavailable) for each in answers)
    assert took[1] < took[0] / 2, "the first wait their patience, those behind them not again"
    thaw.set()
    await until(lambda: one.shares._task is None)
    await site.enter(one)


async def test_a_lost_answer_does_no_harm(site: Site) -> None:
    site.start(2)
    site.limit("rpm", 60)
    passed = 0
    for round in range(12):
        site.store.lose_commit = round % 3 == 0
        asked = [site.enter(process) for process in site.processes for _ in range(4)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        passed += sum(isinstance(each, LimitReservation) for each in answers)
    assert passed <= 60
    passed += len(await site.flood([60, 60]))
    assert passed == 60


async def test_a_refused_flood_costs_the_store_nothing(site: Site) -> None:
    (one,) = site.start(1)
    site.limit("rpm", 5)
    await site.flood([10])
    await asyncio.sleep(0.4)
    before = one.shares.rounds
    for _ in range(2000):
        with pytest.raises(RateLimited):
            await site.enter(one)
    assert one.shares.rounds - before <= 12


async def test_what_is_not_used_goes_back_and_at_the_end_all_does(site: Site) -> None:
    (one,) = site.start(1)
    site.limit("rpm", 1000)
    await site.flood([50])
    (rate,) = site.plan(one).requests
    await asyncio.sleep(0.3)
    assert rate.share.held > 0
    async with asyncio.timeout(60):
        while rate.share.held > 1000 // shares_module.CUSHION:
            await asyncio.sleep(0.05)
    await one.shares.give_back()
    assert rate.share.held == 0 and rate.free == 950


async def test_nobody_waits_for_others_longer_than_a_moment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that died holds permits that nobody gives back."""
    monkeypatch.setattr(limits_module, "RECALL_S", 0.4)
    dead, _ = site.start(2, beat=False)
    site.limit("rpm", 40)
    await site.enter(dead)
    await asyncio.sleep(0.3)
    began = time.monotonic()
    assert len(await site.flood([0, 60])) + site.plan(dead).requests[0].share.held == 39
    assert time.monotonic() - began < 2.0


def test_no_limits_no_plan() -> None:
    limits = RateLimits(LimitLeases(None, "w", None), "UTC")  # type: ignore[arg-type]
    limits.update(EMPTY)
    assert limits.plan(Principal("ten_1", "key_1", "USD"), "m") is None
