"""The configuration file, read: TOML into structs that fit together.

Unknown keys are refused with the nearest right name, and every message says the key, so that a typing error costs
a minute and never a month's revenue.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from tidemill.app.config.decode import convert, refuse_unknown, tables, toml_message
from tidemill.app.config.schema.fleet import DevicesConfig, FleetConfig, NodeConfig
from tidemill.app.config.schema.jobs import JobsConfig
from tidemill.app.config.schema.models import LaunchConfig, ModelConfig, ObjectiveConfig
from tidemill.app.config.schema.platform import (
    BatchConfig,
    Config,
    FilesConfig,
    FirstTenantConfig,
    GatewayConfig,
    MetricsConfig,
    ResponsesConfig,
    StoreConfig,
    default_config,
)
from tidemill.app.config.schema.prices import CostConfig, DevicePriceConfig, PriceConfig
from tidemill.app.config.validation.platform import price_key, validate
from tidemill.errors import ConfigError

_CURRENCY_KEY = re.compile(r"[A-Z]{3}")

_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "first_tenant": FirstTenantConfig,
    "store": StoreConfig,
    "gateway": GatewayConfig,
    "files": FilesConfig,
    "batch": BatchConfig,
    "metrics": MetricsConfig,
    "responses": ResponsesConfig,
    "fleet": FleetConfig,
    "jobs": JobsConfig,
}
_PRICES: dict[str, type[msgspec.Struct]] = {"prices": PriceConfig, "device_prices": DevicePriceConfig}
"""Tables of prices by name and currency."""


def load_config(path: Path | None) -> Config:
    """Read a configuration file; the default without one.

    Raises ConfigError with the file and the line or key.
    """
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
        config = config_of(document)
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
    return config


def config_of(document: dict[str, Any]) -> Config:
    """A document of TOML as structs. Raises ConfigError for unknown keys and for values of another type."""
    currency = document.get("currency", "USD")
    if not isinstance(currency, str):
        raise ConfigError("currency must be a string.", hint='Write currency = "USD".')
    for table, kind in _PRICES.items():
        document[table] = _by_currency(document.get(table, {}), currency, table, kind)
    _refuse_unknown_keys(document)
    # One by one, as msgspec names a key within a table, but not the table.
    document["models"] = {
        name: convert(table, ModelConfig, f"models.{name}") for name, table in tables(document.get("models"), "models")
    }
    for table, kind in _PRICES.items():
        if isinstance(document[table], dict):
            document[table] = {
                name: {code: convert(each, kind, price_key(name, code, currency, table)) for code, each in part.items()}
                for name, part in document[table].items()
            }
    return convert(document, Config, "")


def _refuse_unknown_keys(document: dict[str, Any]) -> None:
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
    for section, kind in _SECTIONS.items():
        if isinstance(document.get(section), dict):
            refuse_unknown(document[section], kind, f"{section}.")


def _by_currency(prices: Any, currency: str, key: str, kind: type[msgspec.Struct]) -> Any:
    """Sort `[prices.M] input = ...` and `[prices.M.CNY] input = ...` into one form, by currency."""
    if not isinstance(prices, dict):
        return prices
    by_name: dict[str, Any] = {}
    for name, table in tables(prices, key):
        others = {code: value for code, value in table.items() if _CURRENCY_KEY.fullmatch(code)}
        own = {field: value for field, value in table.items() if field not in others}
        if own and currency in others:
            raise ConfigError(f"{key}.{name} is given twice in {currency}.", hint=f"Remove [{key}.{name}.{currency}].")
        for field in own:
            if field.upper() in (currency, "USD", "EUR", "CNY") and isinstance(own[field], dict):
                raise ConfigError(
                    f"unknown key {key}.{name}.{field}.", hint=f"Did you mean {key}.{name}.{field.upper()}?"
                )
        by_name[name] = {**({currency: own} if own or not others else {}), **others}
        for code, part in tables(by_name[name], f"{key}.{name}"):
            refuse_unknown(part, kind, price_key(name, code, currency, key) + ".")
    return by_name
