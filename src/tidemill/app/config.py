"""The configuration: one TOML file, decoded into frozen structs. Everything has a default that works.

Unknown keys are refused with the nearest right name, and every message says the key, so that a typing error costs
a minute and never a month's revenue.
"""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from tidemill.errors import ConfigError
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import check_currency, parse_amount
from tidemill.ledger.pricing import Price

EMBEDDED_MODEL = "smollm2-135m-instruct"
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_CURRENCY_KEY = re.compile(r"[A-Z]{3}")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[models.NAME]`: a model, and what runs it."""

    engine: Literal["llamacpp", "openai"]

    # llamacpp
    path: str | None = None
    """A GGUF file, relative to the configuration file; none: the embedded model."""
    parallel: int = 8
    """Requests that a replica works on at a time."""
    threads: int = 0
    """CPU threads of a replica; 0: as many as there are cores."""

    # openai
    base_url: str | None = None
    api_key_env: str | None = None
    """The environment variable that holds the upstream's API key."""
    upstream_model: str | None = None
    """The model's name at the upstream, when it differs."""
    on_disconnect: Literal["drain", "abort"] = "drain"
    """When a client leaves: read the upstream's answer to its end (it bills it anyway), or abort it."""
    drain_seconds: float = 30.0
    """How long an upstream is read to the end for a client that left."""

    # both
    context: int | None = None
    """Tokens that one request may use, prompt and answer together."""
    max_output_tokens: int = 4096
    """The answer's limit when the client sets none."""
    ttft_timeout_seconds: float = 300.0
    """How long an engine may take until its answer begins."""
    idle_timeout_seconds: float = 60.0
    """How long an engine may be silent within an answer."""
    cost_per_hour: str = "0"
    """What a replica costs the operator an hour, in the installation's currency (for the margin)."""


class PriceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[prices.NAME]` or `[prices.NAME.CNY]`: amounts per million tokens, written as strings."""

    input: str
    output: str
    cached_input: str | None = None
    """Prompt tokens found in the engine's cache; the price of `input` when not set."""

    def price(self) -> Price:
        """Raises LedgerError for an amount that cannot be taken."""
        cached = self.input if self.cached_input is None else self.cached_input
        return Price(parse_amount(self.input), parse_amount(cached), parse_amount(self.output))


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
    drain_seconds: float = 30.0
    """How long open requests may go on when the platform stops."""
    write_timeout_seconds: float = 30.0
    """A client that takes nothing of its stream for this long is taken for gone."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole configuration file."""

    currency: str = "USD"
    timezone: str = "UTC"
    """The operator's IANA zone: it decides when a billing month begins."""
    issuer: str = ""
    """Who sends the invoices."""
    host: str = "127.0.0.1"
    """The address that both planes listen on."""
    models: dict[str, ModelConfig] = {}
    prices: dict[str, dict[str, PriceConfig]] = {}
    """By model, then by currency."""
    first_tenant: FirstTenantConfig = FirstTenantConfig()
    store: StoreConfig = StoreConfig()
    gateway: GatewayConfig = GatewayConfig()


def default_config() -> Config:
    """What runs without a configuration file: the embedded model, at a price."""
    return Config(
        models={EMBEDDED_MODEL: ModelConfig(engine="llamacpp", cost_per_hour="0.02")},
        prices={EMBEDDED_MODEL: {"USD": PriceConfig(input="0.10", cached_input="0.025", output="0.40")}},
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
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {_toml_message(str(error))}") from error
    try:
        return _from_document(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error


def _toml_message(text: str) -> str:
    if text.startswith("Cannot declare") and "twice" in text:
        return text.replace("Cannot declare", "declared twice:", 1).replace(" twice", "", 1) + "."
    return f"is not valid TOML: {text}."


def _from_document(document: dict[str, Any]) -> Config:
    currency = document.get("currency", "USD")
    document["prices"] = _prices_by_currency(document.get("prices", {}), currency)
    _refuse_unknown(document, Config, "")
    for name, table in _tables(document.get("models"), "models"):
        _refuse_unknown(table, ModelConfig, f"models.{name}.")
    for section, kind in (("first_tenant", FirstTenantConfig), ("store", StoreConfig), ("gateway", GatewayConfig)):
        if isinstance(document.get(section), dict):
            _refuse_unknown(document[section], kind, f"{section}.")
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_validation_message(str(error))) from error
    _check(config)
    return config


def _prices_by_currency(prices: Any, currency: Any) -> Any:
    """Sort `[prices.M] input = ...` and `[prices.M.CNY] input = ...` into one form, by currency."""
    if not isinstance(prices, dict):
        return prices
    by_model: dict[str, Any] = {}
    for model, table in _tables(prices, "prices"):
        others = {key: value for key, value in table.items() if _CURRENCY_KEY.fullmatch(key)}
        own = {key: value for key, value in table.items() if key not in others}
        by_model[model] = {**({currency: own} if own or not others else {}), **others}
        for code, part in _tables(by_model[model], f"prices.{model}"):
            _refuse_unknown(part, PriceConfig, f"prices.{model}." + ("" if code == currency else f"{code}."))
    return by_model


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
            hint = f"Did you mean {prefix}{near[0]}?" if near else f"Known here: {', '.join(known)}."
            raise ConfigError(f"unknown key {prefix}{key}.", hint=hint)


def _validation_message(text: str) -> str:
    message, _, path = text.partition(" - at `$")
    key = re.sub(r"\[\.\.\.\]", ".*", path.rstrip("`")).strip(".")
    return f"{key}: {message[:1].lower()}{message[1:]}." if key else f"{message}."


def _check(config: Config) -> None:
    try:
        check_currency(config.currency)
        ZoneInfo(config.timezone)
        for model, currencies in config.prices.items():
            for code, price in currencies.items():
                try:
                    check_currency(code)
                    price.price()
                except LedgerError as error:
                    raise ConfigError(f"prices.{model}: {error}.") from error
        parse_amount(config.first_tenant.credit)
    except ConfigError:
        raise
    except LedgerError as error:
        raise ConfigError(f"{error}.") from error
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ConfigError(
            f"timezone: {config.timezone!r} is not a time zone.", hint="Write an IANA name such as Asia/Shanghai."
        ) from error
    for name, model_config in config.models.items():
        _check_model(name, model_config)
    for name in config.prices:
        if name not in config.models:
            import difflib

            near = difflib.get_close_matches(name, config.models, n=1)
            hint = f"Did you mean [prices.{near[0]}]?" if near else f"Add [models.{name}], or remove the price."
            raise ConfigError(f"prices.{name}: there is no model of that name.", hint=hint)
    if config.gateway.max_body_mib < 1:
        raise ConfigError("gateway.max_body_mib: is at least 1.")


def _check_model(name: str, model: ModelConfig) -> None:
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"models.{name}: is not a model name.",
            hint="Use letters, digits and . _ : / @ + -, at most 128 of them.",
        )
    if model.engine == "openai" and not model.base_url:
        raise ConfigError(f"models.{name}.base_url is missing.", hint='Write base_url = "http://HOST:PORT/v1".')
    if model.engine == "llamacpp" and model.base_url:
        raise ConfigError(f"models.{name}.base_url: the engine llamacpp runs here and has no address.")
    for key in ("parallel", "max_output_tokens", "context"):
        value = getattr(model, key)
        if value is not None and not 1 <= value <= 16_777_216:
            raise ConfigError(f"models.{name}.{key}: {value} is out of range; it is at least 1.")
    if not 0 <= model.threads <= 1024:
        raise ConfigError(f"models.{name}.threads: {model.threads} is out of range; 0 takes all cores.")
    for key in ("drain_seconds", "ttft_timeout_seconds", "idle_timeout_seconds"):
        if not 0 < getattr(model, key) <= 86_400:
            raise ConfigError(f"models.{name}.{key}: is more than 0 and at most 86400 seconds.")
    try:
        cost = parse_amount(model.cost_per_hour)
    except LedgerError as error:
        raise ConfigError(f"models.{name}.cost_per_hour: {error}.") from error
    if cost < 0:
        raise ConfigError(f"models.{name}.cost_per_hour: a cost is zero or more.")
