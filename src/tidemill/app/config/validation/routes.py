"""What models say of each other: aliases, fallbacks, splits, and prices against costs.

See docs/routing.md.
"""

from collections.abc import Mapping, Sequence

from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.platform import Config
from tidemill.app.config.validation.models import MODEL_NAME, first_twice
from tidemill.app.config.validation.rules import ledger_value
from tidemill.errors import ConfigError
from tidemill.ledger.pricing import covers
from tidemill.suggestions import did_you_mean

MAX_NAMES = 64
"""Aliases, fallbacks or arms of one model."""


def check_routes(config: Config) -> None:
    """All that concerns several models. Raises ConfigError."""
    models = config.models
    _check_aliases(config)
    for name, model in models.items():
        key = f"models.{name}"
        if model.cost is not None:
            _check_cost(f"{key}.cost", model)
        for other in _names(f"{key}.fallbacks", model.fallbacks):
            _check_other(f"{key}.fallbacks", name, other, models)
            _check_loss(f"{key}.fallbacks", model, other, models[other])
        _check_split(name, model, models)
        _check_own_price(name, config)
        if model.overflow and not model.fallbacks:
            raise ConfigError(f"{key}.overflow needs models to send requests to.", hint=f"Add {key}.fallbacks.")


def _check_aliases(config: Config) -> None:
    named: dict[str, str] = {}
    for name, model in config.models.items():
        key = f"models.{name}.aliases"
        for alias in _names(key, model.aliases):
            if not MODEL_NAME.fullmatch(alias):
                raise ConfigError(f"{key}: {alias!r} is not a valid model name.")
            if alias in config.models:
                raise ConfigError(f"{key}: {alias!r} is already the name of a model.")
            if alias in named:
                raise ConfigError(f"{key}: {alias!r} is already an alias of {named[alias]!r}.")
            named[alias] = name
    for name in config.prices:
        if name in named:
            raise ConfigError(
                f"prices.{name}: {name!r} is an alias, which has the price of its model.",
                hint=f"Set the price of {named[name]!r}.",
            )


def _check_split(name: str, model: ModelConfig, models: Mapping[str, ModelConfig]) -> None:
    key = f"models.{name}.split"
    for other in _names(key, tuple(model.split)):
        _check_other(key, name, other, models)
        if models[other].split:
            raise ConfigError(f"{key}: {other!r} has a split of its own.", hint="Give all shares in one split.")
        _check_loss(key, model, other, models[other])
        if not 0 < model.split[other] <= 100:
            raise ConfigError(
                f"{key}.{other} must be a percentage: more than 0 and at most 100, not {model.split[other]:g}."
            )
    if sum(model.split.values()) > 100:
        raise ConfigError(f"{key}: the shares add up to more than 100 percent.")


def _check_other(key: str, name: str, other: str, models: Mapping[str, ModelConfig]) -> None:
    if other == name:
        raise ConfigError(f"{key}: a model cannot name itself.", hint=f"Remove {name!r}.")
    if other not in models:
        hint = did_you_mean(other, models) or f"Add [models.{other}], which needs no price."
        raise ConfigError(f"{key}: there is no model {other!r}.", hint=hint)


def _check_loss(key: str, model: ModelConfig, other: str, target: ModelConfig) -> None:
    """Whether the price covers the cost is known per tenant.

    That there is a cost to compare with, already here.
    """
    if target.cost is None and target.bills_tokens and not model.allow_loss:
        raise ConfigError(
            f"{key}: the cost of {other!r} is not known, so requests might be sold at a loss.",
            hint=f"Add [models.{other}.cost], or set allow_loss = true to accept that. For an engine of your own, set"
            ' on_disconnect = "abort".',
        )


def _check_cost(key: str, model: ModelConfig) -> None:
    assert model.cost is not None
    if model.kind.runs_here:
        raise ConfigError(
            f'{key} is not supported with engine = "{model.engine}": nobody bills its tokens.',
            hint="Use cost_per_hour.",
        )
    ledger_value(key, model.cost.price)


def _check_own_price(name: str, config: Config) -> None:
    model = config.models[name]
    price = config.prices.get(name, {}).get(config.currency)
    if price is None or model.cost is None or model.allow_loss:
        return
    if not covers(price.price(), model.cost.price()):
        raise ConfigError(
            f"prices.{name} is below the cost in [models.{name}.cost].",
            hint="Each of input, cached_input and output must cover its cost, unless you set allow_loss = true.",
        )


def _names(key: str, names: Sequence[str]) -> Sequence[str]:
    if len(names) > MAX_NAMES:
        raise ConfigError(f"{key}: at most {MAX_NAMES} are allowed, not {len(names)}.")
    twice = first_twice(names)
    if twice:
        raise ConfigError(f"{key}: {twice!r} is listed twice.")
    return names
