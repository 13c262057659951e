"""`[models.NAME]` by itself: names, addresses, bounds, and which keys an engine has."""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from tidemill.app.config.schema.models import LaunchConfig, ModelConfig
from tidemill.app.config.validation.rules import ledger_value, require_positive, require_range
from tidemill.engines.registry import LAUNCHERS, SLEEPERS
from tidemill.errors import ConfigError
from tidemill.ledger.money import parse_amount

_MAX_REPLICAS = 64
MAX_NODE_DEVICES = 4096
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")

_ONLY_OWN: dict[str, object] = {
    "devices": None,
    "kinds": (),
    "min_replicas": None,
    "max_replicas": None,
    "filler": None,
    "version": "",
    "sleepers": 0,
}
"""Keys that only engines of our own have, and what they are when nobody has set them."""


def check_model(name: str, model: ModelConfig) -> None:
    """All that a model says by itself. Raises ConfigError."""
    key = f"models.{name}"
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"{key} is not a valid model name.",
            hint="Use letters, digits and . _ : / @ + -, at most 128 of them.",
        )
    _check_limits(key, model)
    if model.reranking and model.embeddings:
        raise ConfigError(
            f"{key}.reranking: an engine gives embeddings or ranks documents, not both.",
            hint="Remove embeddings, or make another model of the same file.",
        )
    _check_hedge(key, model)
    _check_launch(key, model)
    if model.kind.runs_here:
        _check_own(key, model)
    else:
        _check_upstream(key, model)


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that is listed a second time."""
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


def _check_limits(key: str, model: ModelConfig) -> None:
    for field in ("parallel", "max_output_tokens", "context", "batch_parallel"):
        value = getattr(model, field)
        if value is not None:
            require_range(f"{key}.{field}", value, 1, 16_777_216)
    require_range(f"{key}.threads", model.threads, 0, 1024)
    for field in ("drain_seconds", "ttft_timeout_seconds", "idle_timeout_seconds"):
        require_positive(f"{key}.{field}", getattr(model, field), 86_400, "seconds")
    if model.max_concurrent is not None:
        require_range(f"{key}.max_concurrent", model.max_concurrent, 0, 1_000_000)
    require_range(f"{key}.max_queued", model.max_queued, 1, 1_000_000)
    require_positive(f"{key}.queue_seconds", model.queue_seconds, 3600, "seconds")
    for field in ("upstream_model", "api_key_env"):
        if getattr(model, field) == "":
            raise ConfigError(f"{key}.{field} must not be empty.", hint="Remove the key, or write a name.")
    if ledger_value(f"{key}.cost_per_hour", lambda: parse_amount(model.cost_per_hour)) < 0:
        raise ConfigError(f"{key}.cost_per_hour must be zero or more, not {model.cost_per_hour}.")


def _check_hedge(key: str, model: ModelConfig) -> None:
    if model.hedge_seconds is None:
        return
    require_range(f"{key}.hedge_seconds", model.hedge_seconds, 0.01, 3600, "seconds")
    if not model.kind.runs_here and model.on_disconnect != "abort":
        raise ConfigError(
            f"{key}.hedge_seconds: the upstream would bill both answers.",
            hint='Remove the key; if the upstream is an engine of your own, set on_disconnect = "abort".',
        )


def _check_launch(key: str, model: ModelConfig) -> None:
    launch = model.launch
    if model.kind.launcher is None:
        if launch != LaunchConfig():
            raise ConfigError(
                f"{key}.launch is only for the engines {' and '.join(LAUNCHERS)}.", hint="Remove the table."
            )
        return
    for field in ("tp", "pp", "dp", "max_sequences", "prefill_chunk"):
        value = getattr(launch, field)
        if value is not None:
            require_range(f"{key}.launch.{field}", value, 1, 1_000_000)
    if launch.memory_share is not None:
        require_positive(f"{key}.launch.memory_share", launch.memory_share, 1)
    needed = launch.tp * launch.pp * launch.dp
    if model.devices is not None and model.devices != needed:
        raise ConfigError(
            f"{key}.devices is {model.devices}, but tp x pp x dp is {needed}.", hint="Remove `devices`, or change one."
        )


def _check_own(key: str, model: ModelConfig) -> None:
    for field in ("base_url", "base_urls"):
        if getattr(model, field):
            raise ConfigError(
                f'{key}.{field} is not supported with engine = "{model.engine}", which Tidemill runs itself.',
                hint="Remove the key.",
            )
    require_range(f"{key}.replicas", model.replicas, 1, _MAX_REPLICAS)
    low, high = model.replica_bounds
    require_range(f"{key}.min_replicas", low, 0, _MAX_REPLICAS)
    require_range(f"{key}.max_replicas", high, max(low, 1), _MAX_REPLICAS)
    if model.devices is not None:
        require_range(f"{key}.devices", model.devices, 1, MAX_NODE_DEVICES)
    require_range(f"{key}.scale_down_seconds", model.scale_down_seconds, 0, 86_400, "seconds")
    require_range(f"{key}.wake_seconds", model.wake_seconds, 1, 3_600, "seconds")
    require_range(f"{key}.priority", model.priority, -1_000, 1_000)
    require_range(f"{key}.sleepers", model.sleepers, 0, _MAX_REPLICAS)
    if model.sleepers and model.engine not in SLEEPERS:
        raise ConfigError(f"{key}.sleepers is only for the engines {' and '.join(SLEEPERS)}.", hint="Remove it.")
    if len(model.version) > 100 or not model.version.isprintable():
        raise ConfigError(f"{key}.version must be at most 100 printable characters.")
    objective = model.objective
    require_positive(f"{key}.objective.ttft_seconds", objective.ttft_seconds, 3_600, "seconds")
    require_positive(f"{key}.objective.tpot_seconds", objective.tpot_seconds, 3_600, "seconds")
    if not 0 < objective.percentile < 1:
        raise ConfigError(f"{key}.objective.percentile must be between 0 and 1, such as 0.95.")


def _check_upstream(key: str, model: ModelConfig) -> None:
    for field, unset in _ONLY_OWN.items():
        if getattr(model, field) != unset:
            raise ConfigError(
                f'{key}.{field} is not supported with engine = "{model.engine}", which Tidemill does not run itself.',
                hint="Remove the key.",
            )
    if model.replicas != 1:
        raise ConfigError(
            f"{key}.replicas: each replica of an upstream has an address of its own.",
            hint='Write base_urls = ["http://HOST:PORT/v1", ...] instead.',
        )
    if model.base_url and model.base_urls:
        raise ConfigError(f"{key} has both base_url and base_urls.", hint="Keep one of them.")
    if not model.addresses:
        raise ConfigError(f"{key}.base_url is missing.", hint='Write base_url = "http://HOST:PORT/v1".')
    for url in model.addresses:
        if not _is_address(url):
            field = "base_urls" if model.base_urls else "base_url"
            raise ConfigError(f"{key}.{field}: {url!r} is not a valid address.", hint="Write http://HOST:PORT/v1.")
    if len(model.base_urls) > _MAX_REPLICAS:
        raise ConfigError(f"{key}.base_urls: at most {_MAX_REPLICAS} are allowed, not {len(model.base_urls)}.")
    twice = first_twice([url.rstrip("/") for url in model.base_urls])
    if twice:
        raise ConfigError(f"{key}.base_urls: {twice!r} is listed twice.")
    if model.probe_seconds and not 1 <= model.probe_seconds <= 3600:
        raise ConfigError(f"{key}.probe_seconds must be from 1 to 3600 seconds, or 0 for never.")


def _is_address(text: str) -> bool:
    """True if an HTTP client can go there.

    The gateway processes would find out too, but only once they start.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
