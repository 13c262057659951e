"""The configuration: one TOML file, decoded into frozen structs. Everything has a default that works.

Unknown keys are refused with the nearest right name, and every message says the key, so that a typing error costs
a minute and never a month's revenue.
"""

import re
import tomllib
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import msgspec

from tidemill.app.config.fleet import (
    DevicesConfig,
    FleetConfig,
    LaunchConfig,
    NodeConfig,
    ObjectiveConfig,
    check_fleet,
)
from tidemill.app.config.jobs import DevicePriceConfig, JobsConfig, check_jobs
from tidemill.app.config.models import MODEL_NAME, ModelConfig, check_model
from tidemill.app.config.reading import convert, refuse_unknown, tables, taken, toml_message
from tidemill.app.config.routes import CostConfig, check_routing
from tidemill.errors import ConfigError
from tidemill.ledger.money import check_currency, parse_amount
from tidemill.ledger.period import zone_named
from tidemill.ledger.pricing import Price

EMBEDDED_MODEL = "smollm2-135m-instruct"
_CURRENCY_KEY = re.compile(r"[A-Z]{3}")
MAX_TEXT = 1000
"""Characters of `issuer`."""


class PriceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[prices.NAME]` or `[prices.NAME.CNY]`: amounts per million tokens, written as strings."""

    input: str
    output: str
    cached_input: str | None = None
    """Prompt tokens found in the engine's cache; the price of `input` when not set."""
    batch_input: str | None = None
    """In batches; half of `input` when not set, and so on."""
    batch_cached_input: str | None = None
    """In batches; when not set, half of `cached_input` if that is set, else the price of `batch_input`."""
    batch_output: str | None = None

    def price(self) -> Price:
        """Raises LedgerError for an amount that cannot be taken."""
        cached = self.input if self.cached_input is None else self.cached_input
        return Price(parse_amount(self.input), parse_amount(cached), parse_amount(self.output))

    def batch_price(self) -> Price:
        """What the lines of batches cost. Raises LedgerError for an amount that cannot be taken."""
        half = self.price().scaled(1, 2)
        given = [None if text is None else parse_amount(text) for text in self._batch_texts]
        cached = half.cached_input
        if given[0] is not None and self.cached_input is None:
            cached = given[0]
        amounts = zip(given, (half.input, cached, half.output), strict=True)
        return Price(*(default if amount is None else amount for amount, default in amounts))

    @property
    def _batch_texts(self) -> tuple[str | None, str | None, str | None]:
        return self.batch_input, self.batch_cached_input, self.batch_output


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
        prices={EMBEDDED_MODEL: {"USD": PriceConfig(input="0.10", cached_input="0.025", output="0.40")}},
        device_prices={"cpu": {"USD": DevicePriceConfig(hour="0.04", preemptible_hour="0.02")}},
    )


def load_config(path: Path | None) -> Config:
    """Read a configuration file; the default without one. Raises ConfigError with the file and the line or key."""
    if path is None:
        return default_config()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text.") from error
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or a thousand brackets
        raise ConfigError(f"{path}: {toml_message(str(error))}") from error
    try:
        return _from_document(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error


def _from_document(document: dict[str, Any]) -> Config:
    currency = document.get("currency", "USD")
    if not isinstance(currency, str):
        raise ConfigError("currency: is not a text.", hint='Write currency = "USD".')
    for room, kind in _PRICES:
        document[room] = _prices_by_currency(document.get(room, {}), currency, room, kind)
    refuse_unknown(document, Config, "")
    for name, table in tables(document.get("models"), "models"):
        refuse_unknown(table, ModelConfig, f"models.{name}.")
        for key, inner in (("cost", CostConfig), ("objective", ObjectiveConfig), ("launch", LaunchConfig)):
            if isinstance(table.get(key), dict):
                refuse_unknown(table[key], inner, f"models.{name}.{key}.")
    for name, table in tables(document.get("nodes"), "nodes"):
        refuse_unknown(table, NodeConfig, f"nodes.{name}.")
        for entry in table["devices"] if isinstance(table.get("devices"), list) else ():
            if isinstance(entry, dict):
                refuse_unknown(entry, DevicesConfig, f"nodes.{name}.devices.")
    for section, kind in _SECTIONS:
        if isinstance(document.get(section), dict):
            refuse_unknown(document[section], kind, f"{section}.")
    # One by one, as msgspec names a key within a table, but not the table.
    document["models"] = {
        name: convert(table, ModelConfig, f"models.{name}") for name, table in tables(document.get("models"), "models")
    }
    for room, kind in _PRICES:
        if isinstance(document[room], dict):
            document[room] = {
                name: {code: convert(each, kind, _price_key(name, code, currency, room)) for code, each in part.items()}
                for name, part in document[room].items()
            }
    config = convert(document, Config, "")
    _check(config)
    return config


_SECTIONS: tuple[tuple[str, type[msgspec.Struct]], ...] = (
    ("first_tenant", FirstTenantConfig),
    ("store", StoreConfig),
    ("gateway", GatewayConfig),
    ("files", FilesConfig),
    ("batch", BatchConfig),
    ("metrics", MetricsConfig),
    ("responses", ResponsesConfig),
    ("fleet", FleetConfig),
    ("jobs", JobsConfig),
)
_PRICES: tuple[tuple[str, type[msgspec.Struct]], ...] = (("prices", PriceConfig), ("device_prices", DevicePriceConfig))
"""Tables of prices by name and currency."""


def _prices_by_currency(prices: Any, currency: Any, room: str, kind: type[msgspec.Struct]) -> Any:
    """Sort `[prices.M] input = ...` and `[prices.M.CNY] input = ...` into one form, by currency."""
    if not isinstance(prices, dict):
        return prices
    by_name: dict[str, Any] = {}
    for name, table in tables(prices, room):
        others = {key: value for key, value in table.items() if _CURRENCY_KEY.fullmatch(key)}
        own = {key: value for key, value in table.items() if key not in others}
        if own and currency in others:
            raise ConfigError(
                f"{room}.{name} is given twice in {currency}.", hint=f"Remove [{room}.{name}.{currency}]."
            )
        for key in own:
            if key.upper() in (currency, "USD", "EUR", "CNY") and isinstance(own[key], dict):
                raise ConfigError(
                    f"unknown key {room}.{name}.{key}.", hint=f"Did you mean {room}.{name}.{key.upper()}?"
                )
        by_name[name] = {**({currency: own} if own or not others else {}), **others}
        for code, part in tables(by_name[name], f"{room}.{name}"):
            refuse_unknown(part, kind, _price_key(name, code, currency, room) + ".")
    return by_name


def _price_key(name: str, code: str, currency: str, room: str = "prices") -> str:
    return f"{room}.{name}" if code == currency else f"{room}.{name}.{code}"


def _check(config: Config) -> None:
    taken("currency", lambda: check_currency(config.currency))
    taken("timezone", lambda: zone_named(config.timezone))
    for model, currencies in config.prices.items():
        for code, price in currencies.items():
            taken(_price_key(model, code, config.currency), price.price)
            taken(_price_key(model, code, config.currency), price.batch_price)
    for kind, by_currency in config.device_prices.items():
        for code, device_price in by_currency.items():
            taken(_price_key(kind, code, config.currency, "device_prices"), device_price.hours)
    check_jobs(config.jobs, config.device_prices)
    if taken("first_tenant.credit", lambda: parse_amount(config.first_tenant.credit)) < 0:
        raise ConfigError("first_tenant.credit: is zero or more.")
    for name, model_config in config.models.items():
        check_model(name, model_config)
    check_routing(config, MODEL_NAME.fullmatch)
    check_fleet(config)
    for name in config.prices:
        if name not in config.models:
            import difflib

            near = difflib.get_close_matches(name, config.models, n=1)
            hint = f"Did you mean [prices.{near[0]}]?" if near else f"Add [models.{name}], or remove the price."
            raise ConfigError(f"prices.{name}: there is no model of that name.", hint=hint)
    if not 1 <= config.gateway.max_connections <= 1_000_000:
        raise ConfigError("gateway.max_connections: is from 1 to 1000000.")
    if not 1 <= config.gateway.max_body_mib <= 1024:
        raise ConfigError("gateway.max_body_mib: is from 1 to 1024.")
    if not 0 <= config.gateway.drain_seconds <= 86_400:
        raise ConfigError("gateway.drain_seconds: is from 0 to 86400 seconds.")
    if not 1 <= config.gateway.write_timeout_seconds <= 86_400:
        raise ConfigError("gateway.write_timeout_seconds: is from 1 to 86400 seconds.")
    _check_files(config.files, config.batch)
    if not 0 <= config.responses.keep_days <= 3650:
        raise ConfigError("responses.keep_days: is from 0 (nothing is kept) to 3650.")
    for text in config.gateway.trusted_proxies:
        try:
            ip_network(text)
        except ValueError as error:
            raise ConfigError(
                f"gateway.trusted_proxies: {text!r} is not a network.", hint='Write "10.0.0.0/8" or "192.0.2.7".'
            ) from error
    first = config.first_tenant.name.strip()
    if not 1 <= len(first) <= 128 or not first.isprintable():
        raise ConfigError("first_tenant.name: is a name of 1 to 128 printable characters.")
    if len(config.issuer) > MAX_TEXT:
        raise ConfigError(f"issuer: is at most {MAX_TEXT} characters long.")


def _check_files(files: FilesConfig, batch: BatchConfig) -> None:
    for key, value, low, high in (
        ("files.max_file_mib", files.max_file_mib, 1, 16_384),
        ("files.tenant_mib", files.tenant_mib, 1, 2**30),
        ("files.tenant_files", files.tenant_files, 1, 10_000_000),
        ("files.keep_days", files.keep_days, 1 / 24, 3650),
        ("files.reserve_mib", files.reserve_mib, 0, 2**30),
        ("batch.max_lines", batch.max_lines, 1, 1_000_000),
        ("batch.tenant_open", batch.tenant_open, 1, 100_000),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{key}: {value} is out of range; it is from {low:g} to {high:g}.")
