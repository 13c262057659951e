"""What the configuration says of routing: replicas, addresses, aliases, fallbacks, splits, and what upstreams cost.

The keys are fields of `app.config.platform.ModelConfig`; here is what makes them fit together. See docs/routing.md.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import msgspec

from tidemill.app.config.fleet import OWN_ENGINES
from tidemill.errors import ConfigError
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import parse_amount
from tidemill.ledger.pricing import Price, covers

if TYPE_CHECKING:
    from tidemill.app.config.models import ModelConfig
    from tidemill.app.config.platform import Config

MAX_REPLICAS = 64
MAX_NAMES = 64
"""Aliases, fallbacks or arms of one model."""


class CostConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[models.NAME.cost]`: what an upstream charges the operator per million tokens, in `currency`."""

    input: str
    output: str
    cached_input: str | None = None
    """What it charges for prompt tokens that it reports as cached; the price of `input` when not set."""

    def price(self) -> Price:
        """Raises LedgerError for an amount that cannot be taken."""
        cached = self.input if self.cached_input is None else self.cached_input
        return Price(parse_amount(self.input), parse_amount(cached), parse_amount(self.output))


def addresses(model: "ModelConfig") -> tuple[str, ...]:
    """Where the replicas of an upstream listen."""
    return model.base_urls or ((model.base_url,) if model.base_url else ())


def bills_tokens(model: "ModelConfig") -> bool:
    """Somebody else bills the operator for each token; so does a vendor's API, and not an engine of one's own."""
    return model.engine == "openai" and model.on_disconnect == "drain"


def check_replicas(name: str, model: "ModelConfig", is_address: Callable[[str], bool]) -> None:
    """`replicas`, `base_url`, `base_urls`. Raises ConfigError."""
    key = f"models.{name}"
    if model.engine in OWN_ENGINES:
        for field in ("base_url", "base_urls"):
            if getattr(model, field):
                raise ConfigError(f"{key}.{field}: the engine {model.engine} runs here and has no address.")
        if not 1 <= model.replicas <= MAX_REPLICAS:
            raise ConfigError(f"{key}.replicas: {model.replicas} is out of range; it is from 1 to {MAX_REPLICAS}.")
        return
    if model.replicas != 1:
        raise ConfigError(
            f"{key}.replicas: of an upstream, each replica has an address.",
            hint='Write base_urls = ["http://HOST:PORT/v1", ...].',
        )
    if model.base_url and model.base_urls:
        raise ConfigError(f"{key}: has both base_url and base_urls.", hint="Keep one of them.")
    if not addresses(model):
        raise ConfigError(f"{key}.base_url is missing.", hint='Write base_url = "http://HOST:PORT/v1".')
    for url in addresses(model):
        if not is_address(url):
            field = "base_urls" if model.base_urls else "base_url"
            raise ConfigError(f"{key}.{field}: {url!r} is not an address.", hint="Write http://HOST:PORT/v1.")
    if len(model.base_urls) > MAX_REPLICAS:
        raise ConfigError(f"{key}.base_urls: there are {len(model.base_urls)}; {MAX_REPLICAS} are allowed.")
    twice = _twice([url.rstrip("/") for url in model.base_urls])
    if twice:
        raise ConfigError(f"{key}.base_urls: {twice!r} is there twice.")
    if model.probe_seconds and not 1 <= model.probe_seconds <= 3600:
        raise ConfigError(f"{key}.probe_seconds: is from 1 to 3600 seconds, or 0 for never.")


def check_routing(config: "Config", is_name: Callable[[str], object]) -> None:
    """All that concerns several models. Raises ConfigError."""
    models = config.models
    named: dict[str, str] = {}
    for name, model in models.items():
        for alias in _names(f"models.{name}.aliases", model.aliases):
            if not is_name(alias):
                raise ConfigError(f"models.{name}.aliases: {alias!r} is not a model name.")
            if alias in models:
                raise ConfigError(f"models.{name}.aliases: {alias!r} is a model of its own.")
            if alias in named:
                raise ConfigError(f"models.{name}.aliases: {alias!r} is an alias of {named[alias]!r} already.")
            named[alias] = name
    for name in config.prices:
        if name in named:
            raise ConfigError(f"prices.{name}: {name!r} is an alias.", hint=f"Its price is that of {named[name]!r}.")
    for name, model in models.items():
        if model.cost is not None:
            _check_cost(f"models.{name}.cost", model)
        for other in _names(f"models.{name}.fallbacks", model.fallbacks):
            _check_other(f"models.{name}.fallbacks", name, other, models)
            _check_loss(f"models.{name}.fallbacks", model, other, models[other])
        _check_split(name, model, models)
        _check_own_price(name, config)
        if model.overflow and not model.fallbacks:
            raise ConfigError(f"models.{name}.overflow: there is nothing to flow over to.", hint="Add fallbacks.")


def _check_split(name: str, model: "ModelConfig", models: Mapping[str, "ModelConfig"]) -> None:
    key = f"models.{name}.split"
    for other in _names(key, tuple(model.split)):
        _check_other(key, name, other, models)
        if models[other].split:
            raise ConfigError(f"{key}: {other!r} is split itself.", hint="Give all shares here.")
        _check_loss(key, model, other, models[other])
        if not 0 < model.split[other] <= 100:
            raise ConfigError(f"{key}.{other}: {model.split[other]:g} is no share; it is a percentage.")
    if sum(model.split.values()) > 100:
        raise ConfigError(f"{key}: the shares are more than 100 percent together.")


def _check_other(key: str, name: str, other: str, models: Mapping[str, "ModelConfig"]) -> None:
    if other == name:
        raise ConfigError(f"{key}: {name!r} names itself.")
    if other not in models:
        import difflib  # slow to import, and only errors need it

        near = difflib.get_close_matches(other, models, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Add [models.{other}], which needs no price."
        raise ConfigError(f"{key}: there is no model {other!r}.", hint=hint)


def _check_loss(key: str, model: "ModelConfig", other: str, target: "ModelConfig") -> None:
    """Whether the price covers the cost is known per tenant; that there is a cost to compare with, already here."""
    if target.cost is None and bills_tokens(target) and not model.allow_loss:
        raise ConfigError(
            f"{key}: what {other!r} costs is not known, so it might be sold at a loss.",
            hint=f"Add [models.{other}.cost], or allow_loss = true if you mean it; an engine of your own says so by"
            ' on_disconnect = "abort".',
        )


def _check_cost(key: str, model: "ModelConfig") -> None:
    assert model.cost is not None
    if model.engine in OWN_ENGINES:
        raise ConfigError(f"{key}: nobody bills the tokens of an engine that runs here.", hint="Use cost_per_hour.")
    try:
        model.cost.price()
    except LedgerError as error:
        raise ConfigError(f"{key}: {error}.") from error


def _check_own_price(name: str, config: "Config") -> None:
    model = config.models[name]
    price = config.prices.get(name, {}).get(config.currency)
    if price is None or model.cost is None or model.allow_loss:
        return
    if not covers(price.price(), model.cost.price()):
        raise ConfigError(
            f"prices.{name}: is below what the model costs in [models.{name}.cost].",
            hint="Each of input, cached_input and output has to cover its own; or write allow_loss = true.",
        )


def _names(key: str, names: Sequence[str]) -> Sequence[str]:
    if len(names) > MAX_NAMES:
        _too_many(key)
    twice = _twice(names)
    if twice:
        raise ConfigError(f"{key}: {twice!r} is there twice.")
    return names


def _too_many(key: str) -> NoReturn:
    raise ConfigError(f"{key}: more than {MAX_NAMES} are not taken.")


def _twice(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)
