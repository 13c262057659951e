"""The platform's own way in: who may use it, in whose name, and at which price."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.plane import CHAT, Plane, model
from tests.support.prices import token_price
from tests.support.upstream import Upstream, completion, usage_object
from tests.support.wire import Answer, post
from tidemill.gateway.auth.internal_token import InternalAuth
from tidemill.http.server import Exchange
from tidemill.ledger.pricing import PriceTier
from tidemill.ledger.usage import RequestStatus
from tidemill.store.keys import create_key, revoke_key
from tidemill.store.prices import set_price

TOKEN = "the-token-of-this-start"
BATCH_PRICE = token_price(500_000_000, 100_000_000, 700_000_000)


async def whole(asked: Any, caller: Any) -> None:
    await caller.whole(completion("hi", usage_object(10, 4, 3)))


async def failing(asked: Any, caller: Any) -> None:
    await caller.whole({"error": {"message": "broken"}}, 500)


@pytest.fixture
async def plane(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Plane]:
    upstream = Upstream(getattr(request, "param", whole))
    await upstream.start()
    async with Plane(tmp_path, [model(upstream.port)]) as plane:
        plane.authenticator._road = InternalAuth(TOKEN)
        with plane.store.write() as connection:
            now = datetime.now(UTC)
            set_price(connection, model="mock", currency="USD", price=BATCH_PRICE, now=now, tier=PriceTier.BATCH)
        await plane.authenticator.renew()
        yield plane
    await upstream.stop()


async def ask(
    plane: Plane,
    *,
    token: str = TOKEN,
    tenant: str | None = None,
    key: str = "key_gone",
    line: str = "batch_x_1",
) -> Answer:
    headers = f"authorization: Tidemill {token}\r\nx-tidemill-tenant: {tenant or plane.tenant_id}\r\n"
    headers += f"x-tidemill-key: {key}\r\nx-tidemill-request: {line}\r\n"
    body = {"model": "mock", "messages": [{"role": "user", "content": "one two three"}]}
    return await plane.send(post(CHAT, body, None, headers.encode()))


async def test_a_line_is_metered_in_its_tenants_name_at_the_batch_price(plane: Plane) -> None:
    answer = await ask(plane)
    assert answer.status == 200 and answer.headers["x-request-id"] == "batch_x_1"
    record = await plane.record()
    opened = record.opened
    assert (opened.request_id, opened.tenant_id, opened.key_id) == ("batch_x_1", plane.tenant_id, "key_gone")
    assert opened.tier is PriceTier.BATCH and opened.price == BATCH_PRICE
    assert record.charge == 7 * 500 + 3 * 100 + 4 * 700


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", TOKEN[:-1]])
async def test_another_token_is_refused(plane: Plane, token: str) -> None:
    answer = await ask(plane, token=token)
    assert answer.status == 401 and answer.error["code"] == "invalid_internal_key"
    assert await plane.settled() == []


async def test_without_a_token_of_its_own_a_gateway_admits_nobody(plane: Plane) -> None:
    plane.authenticator._road = InternalAuth()
    assert (await ask(plane, token="")).status == 401
    assert (await ask(plane)).status == 401


async def test_the_token_counts_only_on_this_machine(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "from_here", property(lambda self: False))
    assert (await ask(plane)).status == 401


@pytest.mark.parametrize(
    "line", ["", "req_1", "batch_x", "batch_x_1_2", "batch_X_1", "batch_x_1\x7f", "batch_" + "a" * 30 + "_1"]
)
async def test_only_lines_of_batches_come_this_way(plane: Plane, line: str) -> None:
    assert (await ask(plane, line=line)).status == 400


async def test_a_revoked_key_does_not_stop_its_batch_but_the_last_one_does(plane: Plane) -> None:
    with plane.store.write() as connection:
        key, secret = create_key(connection, tenant_id=plane.tenant_id, name="second", now=datetime.now(UTC))
        revoke_key(connection, key=plane.key, now=datetime.now(UTC))
    await plane.authenticator.renew()
    assert (await ask(plane, key="key_gone")).status == 200
    with plane.store.write() as connection:
        revoke_key(connection, key=secret, now=datetime.now(UTC))
    await plane.authenticator.renew()
    answer = await ask(plane, key=key.key_id)
    assert answer.status == 401 and answer.error["code"] == "invalid_api_key"


async def test_another_tenants_key_is_not_borrowed(plane: Plane) -> None:
    assert (await ask(plane, tenant="ten_unknown")).status == 401


async def test_a_model_without_a_batch_price_is_not_sold_at_another(plane: Plane) -> None:
    snapshot = plane.authenticator.snapshot
    plane.authenticator.snapshot = type(snapshot)(snapshot.revision, snapshot.keys, snapshot.prices)
    answer = await ask(plane)
    assert answer.status == 400 and "price" in answer.error["message"]


@pytest.mark.parametrize("plane", [failing], indirect=True)
async def test_an_attempt_that_gives_no_answer_costs_nothing(plane: Plane) -> None:
    assert (await ask(plane)).status == 502
    record = await plane.record()
    assert record.charge == 0 and record.status == RequestStatus.ENGINE_ERROR


async def test_tenants_cannot_choose_the_id_of_a_request(plane: Plane) -> None:
    headers = b"x-tidemill-request: batch_x_1\r\nx-tidemill-tenant: ten_other\r\n"
    body = {"model": "mock", "messages": [{"role": "user", "content": "one"}]}
    answer = await plane.send(post(CHAT, body, plane.key, headers))
    assert answer.status == 200 and answer.headers["x-request-id"].startswith("req_")
    record = await plane.record()
    assert record.opened.tenant_id == plane.tenant_id and record.opened.tier is PriceTier.STANDARD
