"""The whole configuration: `validate` runs every check, those of models and routes among them."""

from ipaddress import ip_network

from tidemill.app.config.schema.fleet import FleetConfig, NodeConfig
from tidemill.app.config.schema.jobs import JobsConfig
from tidemill.app.config.schema.platform import BatchConfig, Config, FilesConfig, GatewayConfig
from tidemill.app.config.validation.models import MAX_NODE_DEVICES, check_model
from tidemill.app.config.validation.routes import check_routes
from tidemill.app.config.validation.rules import ledger_value, require_range
from tidemill.errors import ConfigError
from tidemill.ledger.money import check_currency, parse_amount
from tidemill.ledger.period import zone_named
from tidemill.suggestions import nearest

MAX_TEXT = 1000
"""Characters of `issuer`."""


def validate(config: Config) -> None:
    """Raises ConfigError for the first thing that does not fit together."""
    ledger_value("currency", lambda: check_currency(config.currency))
    ledger_value("timezone", lambda: zone_named(config.timezone))
    _check_prices(config)
    _check_first_tenant(config)
    for name, model in config.models.items():
        check_model(name, model)
    check_routes(config)
    _check_priced_models(config)
    _check_fleet(config.fleet, config)
    for name, node in config.nodes.items():
        _check_node(f"nodes.{name}.devices", node)
    _check_jobs(config.jobs)
    _check_gateway(config.gateway)
    _check_files(config.files, config.batch)
    require_range("responses.keep_days", config.responses.keep_days, 0, 3650)
    if len(config.issuer) > MAX_TEXT:
        raise ConfigError(f"issuer must be at most {MAX_TEXT} characters long.")


def price_key(name: str, code: str, currency: str, table: str = "prices") -> str:
    """The key of a price as the file has it: of the installation's own currency without the code."""
    return f"{table}.{name}" if code == currency else f"{table}.{name}.{code}"


def _check_prices(config: Config) -> None:
    for model, currencies in config.prices.items():
        for code, price in currencies.items():
            ledger_value(price_key(model, code, config.currency), price.price)
            ledger_value(price_key(model, code, config.currency), price.batch_price)
    for kind, by_currency in config.device_prices.items():
        for code, device_price in by_currency.items():
            ledger_value(price_key(kind, code, config.currency, "device_prices"), device_price.hours)
        if not kind or len(kind) > 64 or not kind.isprintable() or "," in kind or " " in kind:
            raise ConfigError(f"device_prices.{kind} is not a valid kind of device, such as cpu or h800-sxm.")


def _check_priced_models(config: Config) -> None:
    for model in config.prices:
        if model not in config.models:
            near = nearest(model, config.models)
            hint = f"Did you mean [prices.{near}]?" if near else f"Add [models.{model}], or remove the price."
            raise ConfigError(f"prices.{model}: there is no model of that name.", hint=hint)


def _check_first_tenant(config: Config) -> None:
    first = config.first_tenant
    if ledger_value("first_tenant.credit", lambda: parse_amount(first.credit)) < 0:
        raise ConfigError(f"first_tenant.credit must be zero or more, not {first.credit}.")
    name = first.name.strip()
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise ConfigError("first_tenant.name must be 1 to 128 printable characters.")


def _check_fleet(fleet: FleetConfig, config: Config) -> None:
    require_range("fleet.start_seconds", fleet.start_seconds, 1, 86_400)
    require_range("fleet.health_seconds", fleet.health_seconds, 2, 3_600)
    require_range("fleet.drain_seconds", fleet.drain_seconds, 0, 86_400)
    require_range("fleet.log_mib", fleet.log_mib, 1, 65_536)
    for name, model in config.models.items():
        if model.sleepers and fleet.backend == "ray":
            raise ConfigError(
                f'models.{name}.sleepers is not supported with fleet.backend = "ray": Ray keeps the devices of a'
                " process that sleeps.",
                hint="Remove the key.",
            )


def _check_node(key: str, node: NodeConfig) -> None:
    for entry in node.devices:
        require_range(f"{key}.count", entry.count, 1, MAX_NODE_DEVICES)
        require_range(f"{key}.memory_gib", entry.memory_gib, 0, 65_536)


def _check_jobs(jobs: JobsConfig) -> None:
    require_range("jobs.tenant_open", jobs.tenant_open, 1, 100_000)
    require_range("jobs.keep_days", jobs.keep_days, 1 / 24, 3650)
    require_range("jobs.max_grace_seconds", jobs.max_grace_seconds, 1, 86_400)
    require_range("jobs.grace_seconds", jobs.grace_seconds, 0, jobs.max_grace_seconds)
    require_range("jobs.stop_seconds", jobs.stop_seconds, 0, 86_400)


def _check_gateway(gateway: GatewayConfig) -> None:
    require_range("gateway.max_connections", gateway.max_connections, 1, 1_000_000)
    require_range("gateway.max_body_mib", gateway.max_body_mib, 1, 1024)
    require_range("gateway.drain_seconds", gateway.drain_seconds, 0, 86_400, "seconds")
    require_range("gateway.write_timeout_seconds", gateway.write_timeout_seconds, 1, 86_400, "seconds")
    for text in gateway.trusted_proxies:
        try:
            ip_network(text)
        except ValueError as error:
            raise ConfigError(
                f"gateway.trusted_proxies: {text!r} is not a valid network.",
                hint='Write "10.0.0.0/8" or "192.0.2.7".',
            ) from error


def _check_files(files: FilesConfig, batch: BatchConfig) -> None:
    require_range("files.max_file_mib", files.max_file_mib, 1, 16_384)
    require_range("files.tenant_mib", files.tenant_mib, 1, 2**30)
    require_range("files.tenant_files", files.tenant_files, 1, 10_000_000)
    require_range("files.keep_days", files.keep_days, 1 / 24, 3650)
    require_range("files.reserve_mib", files.reserve_mib, 0, 2**30)
    require_range("batch.max_lines", batch.max_lines, 1, 1_000_000)
    require_range("batch.tenant_open", batch.tenant_open, 1, 100_000)
