"""Rules that many keys share, each with one wording of its error."""

from collections.abc import Callable
from typing import TypeVar

from tidemill.errors import ConfigError
from tidemill.ledger.errors import LedgerError

T = TypeVar("T")


def require_range(key: str, value: float, low: float, high: float, unit: str = "") -> None:
    """Raises ConfigError unless `low <= value <= high`; NaN is refused.

    `unit` follows the bounds in the message.
    """
    if not low <= value <= high:
        bounds = f"{_shown(low)} to {_shown(high)}{unit and ' '}{unit}"
        raise ConfigError(f"{key} must be from {bounds}, not {_shown(value)}.")


def require_positive(key: str, value: float, high: float, unit: str = "") -> None:
    """Raises ConfigError unless `0 < value <= high`; NaN is refused."""
    if not 0 < value <= high:
        bounds = f"{_shown(high)}{unit and ' '}{unit}"
        raise ConfigError(f"{key} must be more than 0 and at most {bounds}, not {_shown(value)}.")


def ledger_value(key: str, read: Callable[[], T]) -> T:
    """What `read` returns; its LedgerError becomes a ConfigError that names the key."""
    try:
        return read()
    except LedgerError as error:
        text = str(error)
        raise ConfigError(f"{key}: {text}" if text.endswith("?") else f"{key}: {text}.") from error


def _shown(value: float) -> str:
    text = str(value) if isinstance(value, int) else f"{value:g}"
    return text if len(text) <= 40 else f"{text[:37]}..."
