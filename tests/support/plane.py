"""The data plane of one gateway process, in the test's own event loop: real store, real log, real sockets."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tests.support.prices import token_price
from tests.support.stores import migrated_store
from tests.support.wire import Answer, Line, post
from tidemill.gateway.admission.admission import Admission
from tidemill.gateway.admission.fair_queue import FairQueues
from tidemill.gateway.admission.limit_leases import LimitLeases
from tidemill.gateway.admission.rate_limits import RateLimits
from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.endpoints.app import GatewayApp, RequestIds
from tidemill.gateway.protocols.responses.store import ResponseStore
from tidemill.gateway.proxy.inflight import GatewayMeter
from tidemill.gateway.routing.models import ModelRoutes, ModelSpec, ReplicaSpec
from tidemill.http.server import HttpServer
from tidemill.ledger.limits import Limit, LimitKind
from tidemill.ledger.money import parse_amount
from tidemill.ledger.posting import credit_grant
from tidemill.meter.balance_leases import BalanceLeases
from tidemill.meter.frames import read_frames
from tidemill.meter.live import LiveTable
from tidemill.meter.log import UsageLog
from tidemill.meter.records import Settled, decode_settled
from tidemill.store.accounts import post as post_money
from tidemill.store.ids import new_id
from tidemill.store.keys import create_key
from tidemill.store.limits import set_limit
from tidemill.store.prices import set_price
from tidemill.store.tenants import create_tenant, set_weight

CHAT = "/v1/chat/completions"
PRICE = token_price(1_000_000_000, 250_000_000, 2_000_000_000)
"""1.00, 0.25 and 2.00 per million tokens: 1000, 250 and 2000 nanos a token."""
SWEEP_S = 0.05
MAX_BODY_BYTES = 2 * 1024 * 1024
STORE_PATIENCE_S = 60.0
"""On a busy machine a store on a disk may take long; a request must not be refused for that."""


def model(port: int, name: str = "mock", **changes: Any) -> ModelSpec:
    """A model on an OpenAI-compatible engine at `port`."""
    spec = ModelSpec(
        name=name,
        engine="openai",
        replicas=(ReplicaSpec(f"{name}/0", f"http://127.0.0.1:{port}/v1", ready=True),),
        upstream_model=f"{name}-upstream",
        api_key="upstream-key",
        owned=False,
        context=None,
        max_output_tokens=256,
        drain_seconds=5.0,
        ttft_timeout_seconds=60.0,
        idle_timeout_seconds=60.0,
    )
    return msgspec.structs.replace(spec, **changes)


class Plane:
    """Open with `async with Plane(tmp_path, [model(port)]) as plane`. At its end nothing may be left hanging."""

    def __init__(
        self,
        path: Path,
        models: list[ModelSpec],
        *,
        credit: str = "100",
        write_timeout_s: float = 30.0,
        log_directory: Path | None = None,
        segment_bytes: int = 256 * 1024,
    ) -> None:
        """`log_directory`: where the usage log is, if that shall be a disk of its own."""
        self._path = path
        self._log_directory = log_directory or path / "log"
        self._segment_bytes = segment_bytes
        self._models = models
        self._credit = credit
        self._write_timeout_s = write_timeout_s

    async def __aenter__(self) -> "Plane":
        loop = asyncio.get_running_loop()
        self.store = migrated_store(self._path)
        now = datetime.now(UTC)
        with self.store.write() as connection:
            tenant = create_tenant(connection, name="acme", currency="USD", now=now)
            self.tenant_id = tenant.tenant_id
            _, self.key = create_key(connection, tenant_id=self.tenant_id, name="test", now=now)
            for spec in self._models:
                set_price(connection, model=spec.name, currency="USD", price=PRICE, now=now)
            if amount := parse_amount(self._credit):
                post_money(
                    connection,
                    credit_grant(new_id("txn"), tenant_id=self.tenant_id, currency="USD", amount=amount, at=now),
                )
        self.executor = ThreadPoolExecutor(2)
        self._log_directory.mkdir(exist_ok=True)
        self.log = UsageLog(self._log_directory, loop, segment_bytes=self._segment_bytes)
        self.live = LiveTable(self._path / "live", slots=256)
        self.leasing = BalanceLeases(self.store, "worker", self.executor, patience_s=STORE_PATIENCE_S)
        self.authenticator = Authenticator(self.store, self.executor)
        shares = LimitLeases(self.store, "worker", self.executor, patience_s=STORE_PATIENCE_S)
        self.limits = RateLimits(shares, "UTC")
        self.authenticator.on_news = self.limits.update
        await self.authenticator.renew()
        self.routes = ModelRoutes(loop)
        self.routes.update(self._models)
        self.queues = FairQueues(0, 1, time.monotonic)
        self.queues.update(self._models)
        self.response_store = ResponseStore(self.store)
        self.meter = GatewayMeter(self.log, self.live, self.leasing)
        self.gateway = GatewayApp(
            self.authenticator,
            self.routes,
            self.meter,
            started_at=int(time.time()),
            admission=Admission(self.leasing, self.limits, self.queues),
            response_store=self.response_store,
        )
        self.server = HttpServer(
            self.gateway,
            RequestIds(),
            loop=loop,
            max_body_bytes=MAX_BODY_BYTES,
            lets_in=self.gateway.lets_in,
            write_timeout_s=self._write_timeout_s,
        )
        await self.server.listen("127.0.0.1", 0)
        assert self.server._server is not None
        self.port = self.server._server.sockets[0].getsockname()[1]
        self._sweeping = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                await self.settled()
        finally:
            await self.server.stop(0.0)
            await self.server.cut_off()
            self._sweeping.cancel()
            self.log.close()
            self.live.close()
            await self.response_store.close(within_s=5.0)
            self.executor.shutdown()
            self.store.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.routes.sweep(asyncio.get_running_loop().time())

    @property
    def wallet(self) -> Any:
        return self.leasing.purse(self.tenant_id).wallet

    async def settled(self, within_s: float = 60.0) -> list[Settled]:
        """Wait until no request is open; gives the records. Holds, slots, reservations: none may be left."""
        async with asyncio.timeout(within_s):
            while self.live.open_requests or self.server.working:
                await asyncio.sleep(0.01)
        assert (self.wallet.held, self.wallet.holds) == (0, 0)
        assert all(purse.wallet.holds == purse.wallet.held == 0 for purse in self.leasing._purses.values())
        assert all(slots.share.used == 0 for slots in self.limits.shares._slots.values())
        assert all(queue.running == queue.queued == 0 for queue in self.queues._by_model.values())
        assert self.log._reserved == 0
        assert self.wallet.available >= 0
        assert all(replica.clock.active == 0 for route in self.routes.by_name.values() for replica in route.replicas)
        found = [decode_settled(each.payload) for each in read_frames(self._log_directory, (1, 0))]
        assert len({each.opened.request_id for each in found}) == len(found)
        own = [each for each in found if each.opened.tenant_id == self.tenant_id]
        assert self.wallet.spent == sum(each.charge for each in own)
        return found

    @property
    def holds_back(self) -> bool:
        """An engine is not read from, as a client does not read."""
        replicas = [replica for route in self.routes.by_name.values() for replica in route.replicas]
        return any(connection._paused for replica in replicas for connection in replica.pool._busy)

    async def record(self) -> Settled:
        """The one record there is, once it is there."""
        async with asyncio.timeout(60):
            while not self.log.records:
                await asyncio.sleep(0.01)
        (found,) = await self.settled()
        return found

    def request(self, *, key: str | None = None, **fields: Any) -> bytes:
        """A chat request, ready to be sent, of the one tenant or with another's key."""
        body = {"model": "mock", "messages": [{"role": "user", "content": "one two three"}], **fields}
        return post(CHAT, body, key or self.key)

    async def limit(self, kind: str, amount: int, **more: Any) -> Limit:
        """Put a limit on the tenant in force."""
        wanted = Limit(limit_id="", tenant_id=self.tenant_id, kind=LimitKind(kind), amount=amount, **more)
        with self.store.write() as connection:
            limit = set_limit(connection, wanted, now=datetime.now(UTC))
        await self.authenticator.renew()
        return limit

    async def new_tenant(self, name: str, *, weight: int = 1, credit: str = "100") -> str:
        """Another tenant; gives its key."""
        now = datetime.now(UTC)
        with self.store.write() as connection:
            tenant = create_tenant(connection, name=name, currency="USD", now=now)
            set_weight(connection, tenant_id=tenant.tenant_id, weight=weight)
            _, key = create_key(connection, tenant_id=tenant.tenant_id, name="test", now=now)
            amount = parse_amount(credit)
            post_money(
                connection,
                credit_grant(new_id("txn"), tenant_id=tenant.tenant_id, currency="USD", amount=amount, at=now),
            )
        await self.authenticator.renew()
        return key

    async def line(self, **options: Any) -> Line:
        return await Line.open(self.port, **options)

    async def ask(self, *, within_s: float = 60.0, **fields: Any) -> Answer:
        """Send a chat request on a connection of its own."""
        return await self.send(self.request(**fields), within_s=within_s)

    async def send(self, data: bytes, *, within_s: float = 60.0) -> Answer:
        """Send bytes on a connection of their own; gives the answer."""
        line = await self.line()
        try:
            await line.send(data)
            return await line.answer(within_s=within_s)
        finally:
            line.close()
