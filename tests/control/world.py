"""A platform to test the control plane against: a real store, and a supervisor that only keeps count."""

import functools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from litestar import Litestar
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

from tests.support.prices import token_price
from tests.support.stores import migrated_store
from tidemill.control.api import create_app
from tidemill.errors import NotFound
from tidemill.fleet.recipe import WeightsVersion
from tidemill.fleet.roll import RollState
from tidemill.fleet.status import DeviceStatus, FleetStatus, ModelStatus, NodeStatus, ReplicaStatus, WaitStatus
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.pricing import Price, PriceVersion, rate_capped
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_submission import JobLimits
from tidemill.store.keys import digest_of
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
    token_cost: Price | None = None


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
        return "mock/0: has no token counters to compare"


class FakePlatform:
    """What was settled waits in `settled` until it is drained; `announced` is what the gateways know."""

    zone = ZONE
    currency = "USD"
    issuer = "Tide Cloud"

    def __init__(self, store: Store, directory: Path) -> None:
        self.store = store
        self.settled: list[UsageRecord] = []
        self.job_files = JobFiles(directory / "jobs")
        self.woken = 0
        self.drained: dict[str, str] = {}
        self.announced = 0
        self.running: list[FakeModel] = [FakeModel("big"), FakeModel("mock", engine="openai")]
        self.failure: Exception | None = None
        self.metrics_open = False
        self.rolled: RollState | None = None

    @property
    def job_limits(self) -> JobLimits:
        return JobLimits(site=self.job_files.site, tenant_open=5)

    def wake_jobs(self) -> None:
        self.woken += 1

    def roll(self, model: str, path: str, version: str) -> RollState:
        self.rolled = RollState(
            model, WeightsVersion(version, path), WeightsVersion("", "old.gguf"), of=2, began_at=1.0
        )
        return self.rolled

    def rolls(self) -> list[RollState]:
        return [self.rolled] if self.rolled is not None else []

    def fleet(self) -> FleetStatus:
        out = "n/0" in self.drained
        return FleetStatus(
            nodes=(NodeStatus(name="n", up=True, drained=False, devices=1, why=""),),
            devices=(
                DeviceStatus(
                    device="n/0",
                    node="n",
                    kind="cpu",
                    memory_bytes=2**30,
                    holder="drained" if out else "replica mock/0",
                    until=None,
                    why=self.drained["n/0"] if out else "serves mock",
                    reserved_by=None,
                ),
            ),
            replicas=(
                ReplicaStatus(
                    name="mock/0",
                    model="mock",
                    version="",
                    phase="ready",
                    devices=("n/0",),
                    requests=3,
                    lines=0,
                    batch_only=False,
                    beside=False,
                    since=OCTOBER.isoformat(),
                    why="it was ready",
                ),
            ),
            models=(
                ModelStatus(
                    name="mock",
                    ready=1,
                    min_replicas=0,
                    max_replicas=2,
                    waiting=0,
                    now=1.5,
                    expected=2.0,
                    high=3.0,
                    capacity=100.0,
                    startup_s=1.0,
                    late=0.0,
                ),
            ),
            waiting=(WaitStatus("job job_1", "2 devices"),),
        )

    async def drain(self, name: str, why: str) -> None:
        if name not in ("n", "n/0"):
            raise NotFound(f"There is no node or device {name!r}.")
        self.drained[name] = why

    async def undrain(self, name: str) -> None:
        if self.drained.pop(name, None) is None:
            raise NotFound(f"{name!r} is not drained.")

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

    async def metrics(self) -> list[Metric]:
        family = CounterMetricFamily("tidemill_requests", "Requests.", labels=["model"])
        family.add_metric(['a "model"'], 7)
        return [family]

    def revision(self) -> int:
        with self.store.read() as connection:
            return current_revision(connection)


def open_world(directory: Path) -> FakePlatform:
    """A platform on a new SQLite store, with the models `mock` (USD, CNY) and `big` (USD)."""
    store = migrated_store(directory)
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
                price=token_price(*map(parse_amount, amounts.split())),
                now=LONG_AGO,
            )
    return FakePlatform(store, directory)


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
    status: RequestStatus = RequestStatus.OK,
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
        estimated=status is RequestStatus.CLIENT_CLOSED,
        status=status,
        streamed=True,
        price_id=price.price_id,
        currency=currency,
        charges=charge.amounts,
        uncollected=charge.uncollected,
        hold=Nanos(2**62),
        started_at=at - timedelta(seconds=1),
        first_token_at=at - timedelta(milliseconds=500),
        finished_at=at,
        device_ns=device_ns,
    )


class _Current:
    """Whatever platform is served now: an application takes longer to make than most tests take with it."""

    def __init__(self) -> None:
        self.platform: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.platform, name)


_current = _Current()


@functools.cache
def _app() -> Litestar:
    platform: Any = _current
    return create_app(platform, digest_of(TOKEN))


def app_of(platform: FakePlatform) -> Litestar:
    """The control plane's application on this platform; there is one at a time."""
    _current.platform = platform
    return _app()
