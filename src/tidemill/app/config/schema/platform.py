"""The whole configuration file, and the sections that concern the platform itself."""

import msgspec

from tidemill.app.config.schema.fleet import FleetConfig, NodeConfig
from tidemill.app.config.schema.jobs import JobsConfig
from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.prices import DevicePriceConfig, PriceConfig

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_PRICE = {"input": "0.10", "cached_input": "0.025", "output": "0.40"}


class FirstTenantConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[first_tenant]`: made at the first start, with a key and a credit to try things out."""

    name: str = "demo"
    credit: str = "100"


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[store]`: where the data lives; SQLite under the data directory when there is no url."""

    url: str | None = None


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[gateway]`: the data plane's process limits."""

    max_body_mib: int = 32
    """The largest request body, MiB."""
    max_connections: int = 10_000
    """Connections that clients may have open to one gateway process; one more is told so."""
    drain_seconds: float = 30.0
    """How long open requests may go on when the platform stops."""
    write_timeout_seconds: float = 30.0
    """A client that takes nothing of its stream for this long is taken for gone."""
    trusted_proxies: tuple[str, ...] = ()
    """Networks (CIDR) of reverse proxies, whose X-Forwarded-For is believed where keys are bound to addresses."""
    charge_header: bool = False
    """Answers say what they cost."""


class MetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[metrics]`: what Prometheus reads on the control plane's port."""

    open: bool = False
    """`/metrics` needs no admin token."""


class ResponsesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[responses]`: what is kept of the Responses API."""

    store_default: bool = True
    """Keep a response whose request does not say; false: only what is asked for."""
    keep_days: float = 30.0
    """How long; 0: nothing is kept, whatever is asked for."""


class FilesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[files]`: what tenants upload, and what batches give them."""

    path: str | None = None
    """Where the files lie, relative to the configuration file; DATA/files when not set."""
    max_file_mib: int = 200
    tenant_mib: int = 10_240
    """What a tenant may keep, MiB."""
    tenant_files: int = 10_000
    keep_days: float = 30.0
    """How long a file is kept when its owner does not say."""
    reserve_mib: int = 512
    """What uploads leave free on the disk, MiB."""


class BatchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[batch]`: batches of requests."""

    max_lines: int = 50_000
    tenant_open: int = 100
    """Unfinished batches that a tenant may have."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration file."""

    currency: str = "USD"
    timezone: str = "UTC"
    """The operator's IANA zone: it decides when a billing month begins."""
    issuer: str = ""
    """Who sends the invoices."""
    host: str = "127.0.0.1"
    """The address that the data plane listens on; 0.0.0.0 for all of the machine's."""
    control_host: str = "127.0.0.1"
    """The address that the control plane listens on, apart, so that tenants need not reach it."""
    models: dict[str, ModelConfig] = {}
    prices: dict[str, dict[str, PriceConfig]] = {}
    """By model, then by currency."""
    first_tenant: FirstTenantConfig = FirstTenantConfig()
    store: StoreConfig = StoreConfig()
    gateway: GatewayConfig = GatewayConfig()
    files: FilesConfig = FilesConfig()
    batch: BatchConfig = BatchConfig()
    metrics: MetricsConfig = MetricsConfig()
    responses: ResponsesConfig = ResponsesConfig()
    fleet: FleetConfig = FleetConfig()
    nodes: dict[str, NodeConfig] = {}
    jobs: JobsConfig = JobsConfig()
    device_prices: dict[str, dict[str, DevicePriceConfig]] = {}
    """By kind of device, then by currency."""


def default_config() -> Config:
    """What runs without a configuration file: the embedded model, at a price."""
    return Config(
        models={EMBEDDED_MODEL: ModelConfig(engine="llamacpp", cost_per_hour="0.02")},
        prices={EMBEDDED_MODEL: {"USD": msgspec.convert(EMBEDDED_PRICE, PriceConfig)}},
        device_prices={"cpu": {"USD": DevicePriceConfig(hour="0.04", preemptible_hour="0.02")}},
    )
