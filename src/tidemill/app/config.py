"""The configuration: one TOML file, decoded into frozen structs. Everything has a default that works.

Unknown keys are refused with the nearest right name, and every message says the key, so that a typing error costs
a minute and never a month's revenue.
"""

import re
import tomllib
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from tidemill.app.fleet_config import (
    OWN_ENGINES,
    DevicesConfig,
    Filler,
    FleetConfig,
    LaunchConfig,
    NodeConfig,
    ObjectiveConfig,
    check_fleet,
    replica_bounds,
)
from tidemill.app.jobs_config import DevicePriceConfig, JobsConfig, check_jobs
from tidemill.app.routes_config import CostConfig, check_replicas, check_routing
from tidemill.errors import ConfigError
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import check_currency, parse_amount
from tidemill.ledger.period import zone_named
from tidemill.ledger.pricing import Price

EMBEDDED_MODEL = "smollm2-135m-instruct"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_CURRENCY_KEY = re.compile(r"[A-Z]{3}")
_TWICE = re.compile(r"Cannot declare \((.+?),?\) twice (.*)")
_TERMS = {
    "Object missing": "missing",
    "required field": "key",
    "enum value": "choice",
    "`object`": "a table",
    "`array`": "a list",
    "`str`": "a text",
    "`int`": "an integer",
    "`float`": "a number",
}
"""msgspec's words, and TOML's."""
MAX_TEXT = 1000
"""Characters of `issuer`."""

T = TypeVar("T")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[models.NAME]`: a model, and what runs it."""

    engine: Literal["llamacpp", "vllm", "sglang", "openai"]

    # llamacpp
    path: str | None = None
    """llamacpp: a GGUF file, relative to the configuration file; none: the embedded model. vllm, sglang: a folder
    with the weights, or their name on a hub; NAME when not set."""
    parallel: int = 8
    """Requests that a replica works on at a time."""
    threads: int = 0
    """CPU threads of a replica; 0: the cores, shared among the replicas."""
    embeddings: Literal["", "model", "mean", "cls", "last"] = ""
    """It gives embeddings, too: how a text's vectors become one; `model`: as its file says. Empty: it gives none."""
    replicas: int = 1
    """How many engines run it, each a process of its own."""

    # engines of our own (docs/fleet.md)
    devices: int | None = None
    """What a replica takes, all of one node; of llamacpp its share of the CPU slots when not set."""
    kinds: tuple[str, ...] = ()
    """Kinds of devices that it runs on, the best first; any when not set."""
    min_replicas: int | None = None
    """The fewest that there are; 0: none while nobody asks. `replicas` when not set."""
    max_replicas: int | None = None
    """The most that there are; `replicas` when not set."""
    objective: ObjectiveConfig = ObjectiveConfig()
    scale_down_seconds: float = 300.0
    """How long less must have been enough before a replica is given up."""
    sleepers: int = 0
    """Replicas that are given up and sleep in the machine's memory instead of ending, at most so many at a time; vllm
    and sglang, on this machine."""
    wake_seconds: float = 120.0
    """How long a request waits for a model that has no replica."""
    filler: Filler | None = None
    """Where lines of batches run: `inside` the replicas, or `beside` them in one that gets what they leave; of
    llamacpp beside, of the others inside when not set."""
    priority: int = 0
    """Of models that both need a device, the higher gets it."""
    version: str = ""
    """What its weights are called."""
    launch: LaunchConfig = LaunchConfig()
    """vllm, sglang: how the engine is started."""

    # openai
    base_url: str | None = None
    base_urls: tuple[str, ...] = ()
    """In place of `base_url`, for several replicas of one model."""
    probe_seconds: float = 10.0
    """How often an upstream is asked whether it is well; 0: never."""
    cost: CostConfig | None = None
    api_key_env: str | None = None
    """The environment variable that holds the upstream's API key."""
    upstream_model: str | None = None
    """The model's name at the upstream, when it differs."""
    on_disconnect: Literal["drain", "abort"] = "drain"
    """When a client leaves: read the upstream's answer to its end (it bills it anyway), or abort it."""
    drain_seconds: float = 30.0
    """How long an upstream is read to the end for a client that left."""

    # both
    aliases: tuple[str, ...] = ()
    """Other names that tenants may ask for it by."""
    fallbacks: tuple[str, ...] = ()
    """Models that answer when this one cannot, in this order."""
    overflow: bool = False
    """They answer also when all replicas of this one have as many requests as they work on at a time."""
    split: dict[str, float] = {}
    """Models that get a share of its requests, in percent."""
    allow_loss: bool = False
    """Sell it below cost where a fallback or an arm of the split costs more than the tenant pays."""
    context: int | None = None
    """Tokens that one request may use, prompt and answer together."""
    max_output_tokens: int = 4096
    """The answer's limit when the client sets none."""
    ttft_timeout_seconds: float = 300.0
    """How long an engine may take until its answer begins."""
    hedge_seconds: float | None = None
    """A streamed answer that has not begun after so long is asked for at a second replica as well; of engines of one's
    own. When not set: never."""
    idle_timeout_seconds: float = 60.0
    """How long an engine may be silent within an answer."""
    max_concurrent: int | None = None
    """Requests that it works on at a time; more wait here, in order. 0: as many as come. When not set: of llamacpp
    `parallel` times `replicas` (unless it overflows), of an upstream as many as come."""
    max_queued: int = 1024
    """Requests that may wait."""
    queue_seconds: float = 60.0
    """How long a request may wait."""
    batch_parallel: int | None = None
    """Lines of batches that are worked on at a time; half of `parallel` when not set, of an upstream 8."""
    cost_per_hour: str = "0"
    """What a replica costs the operator an hour, in the installation's currency (for the margin)."""

    @property
    def replica_bounds(self) -> tuple[int, int]:
        """The fewest and the most replicas of an engine of our own."""
        return replica_bounds(self)

    @property
    def slots(self) -> int | None:
        """Requests that a replica of our own works on at a time; None: not known."""
        if self.engine == "llamacpp":
            return self.parallel
        return None if self.launch.max_sequences is None else self.launch.max_sequences * self.launch.dp


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
        raise ConfigError(f"{path}: {_toml_message(str(error))}") from error
    try:
        return _from_document(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error


def _toml_message(text: str) -> str:
    twice = _TWICE.fullmatch(text)
    if twice:
        return f"[{twice[1].replace(chr(39), '').replace(', ', '.')}] is declared twice {twice[2]}."
    return f"is not valid TOML: {text}."


def _from_document(document: dict[str, Any]) -> Config:
    currency = document.get("currency", "USD")
    if not isinstance(currency, str):
        raise ConfigError("currency: is not a text.", hint='Write currency = "USD".')
    for room, kind in _PRICES:
        document[room] = _prices_by_currency(document.get(room, {}), currency, room, kind)
    _refuse_unknown(document, Config, "")
    for name, table in _tables(document.get("models"), "models"):
        _refuse_unknown(table, ModelConfig, f"models.{name}.")
        for key, inner in (("cost", CostConfig), ("objective", ObjectiveConfig), ("launch", LaunchConfig)):
            if isinstance(table.get(key), dict):
                _refuse_unknown(table[key], inner, f"models.{name}.{key}.")
    for name, table in _tables(document.get("nodes"), "nodes"):
        _refuse_unknown(table, NodeConfig, f"nodes.{name}.")
        for entry in table["devices"] if isinstance(table.get("devices"), list) else ():
            if isinstance(entry, dict):
                _refuse_unknown(entry, DevicesConfig, f"nodes.{name}.devices.")
    for section, kind in _SECTIONS:
        if isinstance(document.get(section), dict):
            _refuse_unknown(document[section], kind, f"{section}.")
    # One by one, as msgspec names a key within a table, but not the table.
    document["models"] = {
        name: _convert(table, ModelConfig, f"models.{name}")
        for name, table in _tables(document.get("models"), "models")
    }
    for room, kind in _PRICES:
        if isinstance(document[room], dict):
            document[room] = {
                name: {
                    code: _convert(each, kind, _price_key(name, code, currency, room)) for code, each in part.items()
                }
                for name, part in document[room].items()
            }
    config = _convert(document, Config, "")
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
    for name, table in _tables(prices, room):
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
        for code, part in _tables(by_name[name], f"{room}.{name}"):
            _refuse_unknown(part, kind, _price_key(name, code, currency, room) + ".")
    return by_name


def _price_key(name: str, code: str, currency: str, room: str = "prices") -> str:
    return f"{room}.{name}" if code == currency else f"{room}.{name}.{code}"


def _tables(value: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    if value is None:
        return []
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is a table of tables.", hint=f"Write [{key}.NAME].")
    for name, table in value.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{key}.{name} is not a table.", hint=f"Write [{key}.{name}] and its keys below it.")
    return list(value.items())


def _refuse_unknown(table: dict[str, Any], struct: type[msgspec.Struct], prefix: str) -> None:
    import difflib  # slow to import, and only errors need it

    known = struct.__struct_fields__
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            if (
                isinstance(table[key], dict)
                and not near
                and prefix.startswith(("models.", "prices.", "device_prices."))
            ):
                room, _, name = prefix.rstrip(".").partition(".")
                raise ConfigError(
                    f"unknown key {prefix}{key}.", hint=f'A name with a dot is quoted: [{room}."{name}.{key}"].'
                )
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known here: {', '.join(known)}."
            raise ConfigError(f"unknown key {prefix}{key}.", hint=hint)


def _convert(value: Any, kind: type[T], key: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").strip(".")
        where = ".".join(part for part in (key, field) if part)
        hint = ""
        if "xpected `str`, got" in message:
            hint = 'Texts and amounts are written in quotes, such as "4.00".'
        elif "enum value" in message:
            hint = f"Choose one of: {', '.join(_choices(kind, field))}."
        for theirs, ours in _TERMS.items():
            message = message.replace(theirs, ours)
        message = f"{message[:1].lower()}{message[1:]}"
        raise ConfigError(f"{where}: {message}." if where else f"{message}.", hint=hint) from error


def _choices(kind: Any, path: str) -> list[str]:
    """What may stand at a path of keys, such as `launch.dtype`."""
    from msgspec import inspect  # only errors need it

    found: Any = inspect.type_info(kind)
    for key in path.replace("[", ".[").split("."):
        if isinstance(found, inspect.UnionType):
            found = next(each for each in found.types if not isinstance(each, inspect.NoneType))
        if isinstance(found, inspect.StructType):
            found = next(field.type for field in found.fields if field.encode_name == key)
        else:
            found = found.value_type if isinstance(found, inspect.DictType) else found.item_type
    options = found.types if isinstance(found, inspect.UnionType) else (found,)
    return [str(value) for each in options if isinstance(each, inspect.LiteralType) for value in each.values]


def _check(config: Config) -> None:
    _taken("currency", lambda: check_currency(config.currency))
    _taken("timezone", lambda: zone_named(config.timezone))
    for model, currencies in config.prices.items():
        for code, price in currencies.items():
            _taken(_price_key(model, code, config.currency), price.price)
            _taken(_price_key(model, code, config.currency), price.batch_price)
    for kind, by_currency in config.device_prices.items():
        for code, device_price in by_currency.items():
            _taken(_price_key(kind, code, config.currency, "device_prices"), device_price.hours)
    check_jobs(config.jobs, config.device_prices)
    if _taken("first_tenant.credit", lambda: parse_amount(config.first_tenant.credit)) < 0:
        raise ConfigError("first_tenant.credit: is zero or more.")
    for name, model_config in config.models.items():
        _check_model(name, model_config)
    check_routing(config, _MODEL_NAME.fullmatch)
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


def _taken(key: str, read: Callable[[], T]) -> T:
    """What `read` gives; the ledger's refusal as one of the configuration that names the key."""
    try:
        return read()
    except LedgerError as error:
        text = str(error)
        raise ConfigError(f"{key}: {text}" if text.endswith("?") else f"{key}: {text}.") from error


def _check_model(name: str, model: ModelConfig) -> None:
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"models.{name}: is not a model name.",
            hint="Use letters, digits and . _ : / @ + -, at most 128 of them.",
        )
    check_replicas(name, model, _is_address)
    for key in ("parallel", "max_output_tokens", "context", "batch_parallel"):
        value = getattr(model, key)
        if value is not None and not 1 <= value <= 16_777_216:
            raise ConfigError(f"models.{name}.{key}: {value} is out of range; it is at least 1.")
    if not 0 <= model.threads <= 1024:
        raise ConfigError(f"models.{name}.threads: {model.threads} is out of range; 0 takes all cores.")
    for key in ("drain_seconds", "ttft_timeout_seconds", "idle_timeout_seconds"):
        if not 0 < getattr(model, key) <= 86_400:
            raise ConfigError(f"models.{name}.{key}: is more than 0 and at most 86400 seconds.")
    _check_hedge(name, model)
    for key, low in (("max_concurrent", 0), ("max_queued", 1)):
        value = getattr(model, key)
        if value is not None and not low <= value <= 1_000_000:
            raise ConfigError(f"models.{name}.{key}: {value} is out of range; it is from {low} to 1000000.")
    if not 0 < model.queue_seconds <= 3600:
        raise ConfigError(f"models.{name}.queue_seconds: is more than 0 and at most 3600 seconds.")
    for key in ("upstream_model", "api_key_env"):
        if getattr(model, key) == "":
            raise ConfigError(f"models.{name}.{key}: is empty.", hint="Remove it, or write a name.")
    cost = _taken(f"models.{name}.cost_per_hour", lambda: parse_amount(model.cost_per_hour))
    if cost < 0:
        raise ConfigError(f"models.{name}.cost_per_hour: a cost is zero or more.")


def _check_hedge(name: str, model: ModelConfig) -> None:
    if model.hedge_seconds is None:
        return
    if not 0.01 <= model.hedge_seconds <= 3600:
        raise ConfigError(f"models.{name}.hedge_seconds: is from 0.01 to 3600 seconds.")
    if model.engine not in OWN_ENGINES and model.on_disconnect != "abort":
        raise ConfigError(
            f"models.{name}.hedge_seconds: an upstream bills both answers.",
            hint='Leave it out; where the upstream is an engine of your own, say on_disconnect = "abort".',
        )


def _is_address(text: str) -> bool:
    """Whether an HTTP client can go there. The gateway processes would find out too, but only once they start."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
