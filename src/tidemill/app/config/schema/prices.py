"""`[prices]`, `[device_prices]` and `[models.NAME.cost]`: amounts, written as strings."""

import msgspec

from tidemill.ledger.devices import DeviceTier, check_hour
from tidemill.ledger.money import Nanos, parse_amount, round_ratio
from tidemill.ledger.pricing import Price


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


class DevicePriceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[device_prices.KIND]` or `[device_prices.KIND.CNY]`.

    Amounts for a device and hour, written as strings.
    """

    hour: str
    preemptible_hour: str | None = None
    """Of jobs that give their devices back when something more urgent comes; half of `hour` when not set."""

    def hours(self) -> dict[DeviceTier, Nanos]:
        """Raises LedgerError for an amount that cannot be taken."""
        standard = check_hour(parse_amount(self.hour))
        if self.preemptible_hour is None:
            preemptible = Nanos(round_ratio(standard, 2))
        else:
            preemptible = check_hour(parse_amount(self.preemptible_hour))
        return {DeviceTier.STANDARD: standard, DeviceTier.PREEMPTIBLE: preemptible}
