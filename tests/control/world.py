"""A platform to test the control plane against: a real store, and a supervisor that only keeps count."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.pricing import Price, PriceVersion, rate_capped
from tidemill.ledger.usage import Status, TokenUsage, UsageRecord
from tidemill.store.engine import Store, open_store, store_url
from tidemill.store.migrate import migrate
from tidemill.store.prices import set_price
from tidemill.store.revision import current_revision, set_setting
from tidemill.store.usage import store_records

TOKEN = "tm-admin-test"
ZONE = "Asia/Shanghai"
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
OCTOBER = datetime(2026, 10, 15, 12, tzinfo=UTC)
"""In a month that is over, whenever the tests run."""


class FakeModel(msgspec.Struct, frozen=True):
    name: str
    engine: str = "llamacpp"
    state: str = "ready"
    replicas_ready: int = 1
    replicas_total: int = 1
    endpoint: str | None = "http://127.0.0.1:9999"
    cost_per_hour: Nanos = Nanos(0)


class FakeStatus(msgspec.Struct, frozen=True):
    version: str = "1.2.3"
    state: str = "ready"
    started_at: datetime = OCTOBER
    gateway_url: str = "http://127.0.0.1:8080/v1"
    workers_ready: int = 2
    workers_total: int = 2


class FakeReport:
    def to_json(self) -> dict[str, object]:
        return {"replicas": [], "unchecked": ["mock/0"]}

    def to_text(self) -> str:
        return "mock/0: has no token counters to compare with"


class FakePlatform:
    """What was settled waits in `settled` until it is drained; `announced` is what the gateways know."""

    zone = ZONE
    currency = "USD"
    issuer = "Tide Cloud"

    def __init__(self, store: Store) -> None:
        self.store = store
        self.settled: list[UsageRecord] = []
        self.announced = 0
        self.running: list[FakeModel] = [FakeModel("big"), FakeModel("mock", engine="openai")]
        self.failure: Exception | None = None

    async def drain_usage(self) -> None:
        if self.failure is not None:
            raise self.failure
        with self.store.write() as connection:
            store_records(connection, self.settled, zone=self.zone)
        self.settled = []

    async def announce(self) -> None:
        self.announced = self.revision()

    def models(self) -> Sequence[FakeModel]:
        return self.running

    def status(self) -> FakeStatus:
        return FakeStatus()

    async def reconcile(self) -> FakeReport:
        return FakeReport()

    def revision(self) -> int:
        with self.store.read() as connection:
            return current_revision(connection)


def open_world(directory: Path) -> FakePlatform:
    """A platform on a new SQLite store, with the models `mock` (USD, CNY) and `big` (USD)."""
    store = open_store(store_url(None, directory))
    migrate(store)
    with store.write() as connection:
        for name, value in (("currency", "USD"), ("zone", ZONE), ("issuer", "Tide Cloud")):
            set_setting(connection, name, value)
        for model, currency, amounts in (
            ("mock", "USD", "4 1 16"),
            ("mock", "CNY", "30 7.3 115.123456789"),
            ("big", "USD", "0.000000001 0 0.3"),
        ):
            set_price(
                connection,
                model=model,
                currency=currency,
                price=Price(*map(parse_amount, amounts.split())),
                now=LONG_AGO,
            )
    return FakePlatform(store)


def prices(platform: FakePlatform) -> dict[tuple[str, str], PriceVersion]:
    from tidemill.store.prices import current_prices

    with platform.store.read() as connection:
        return current_prices(connection, datetime.now(UTC))


def record(
    platform: FakePlatform,
    request_id: str,
    tenant_id: str,
    *,
    model: str = "mock",
    currency: str = "USD",
    usage: TokenUsage = TokenUsage(1000, 200, 300),  # noqa: B008
    at: datetime = OCTOBER,
    device_ns: int = 1_000_000,
    status: Status = Status.OK,
) -> UsageRecord:
    """A settled request that finished at `at`."""
    price = prices(platform)[model, currency]
    charge = rate_capped(usage, price.price, Nanos(2**62))
    return UsageRecord(
        request_id=request_id,
        tenant_id=tenant_id,
        key_id="key_1",
        model=model,
        replica=f"{model}/0",
        usage=usage,
        estimated=status is Status.CLIENT_CLOSED,
        status=status,
        streamed=True,
        price_id=price.price_id,
        currency=currency,
        charge_input=charge.input,
        charge_cached=charge.cached,
        charge_output=charge.output,
        uncollected=charge.uncollected,
        hold=Nanos(2**62),
        started_at=at - timedelta(seconds=1),
        first_token_at=at - timedelta(milliseconds=500),
        finished_at=at,
        device_ns=device_ns,
    )
