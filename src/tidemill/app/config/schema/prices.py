"""`[prices]`, `[device_prices]` and `[models.NAME.cost]`: amounts, written as strings.

What is priced by component has a key for each of the catalogue (`ledger.components`).
"""

from typing import TYPE_CHECKING

import msgspec

from tidemill.ledger.components import BASE, CATALOGUE, INPUT, OUTPUT, Component
from tidemill.ledger.devices import DeviceTier, check_hour
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, parse_amount, round_ratio
from tidemill.ledger.pricing import Price

BATCH = "batch_"
"""Before a component's name: its price in batches."""


class RateTable(msgspec.Struct, frozen=True):
    """A table of amounts by component; each key that is not given is None."""

    def price(self) -> Price:
        """What is asked, or paid, for each component that has a key here.

        Input and output must have one, unless something else has. Raises LedgerError for what is missing, or cannot be
        taken.
        """
        rates = self._rates("")
        for component in (INPUT, OUTPUT):
            if component not in rates and rates.keys() <= set(BASE):
                raise LedgerError(f"missing key `{component.key}`")
        return Price(rates)

    def _rates(self, prefix: str) -> dict[Component, int]:
        texts = ((component, getattr(self, prefix + component.key, None)) for component in CATALOGUE)
        return {component: parse_amount(text) for component, text in texts if text is not None}


class PriceTable(RateTable, frozen=True):
    """`[prices.NAME]` or `[prices.NAME.CNY]`: amounts per so many units as the catalogue says."""

    def batch_price(self) -> Price:
        """What the lines of batches cost: half of the price, but for components that have a key of their own.

        Cached input as `batch_input` if only that is given. Raises LedgerError for an amount that cannot be taken.
        """
        given, standard = self._rates(BATCH), self._rates("")
        rates = self.price().scaled(1, 2).rates | given
        if INPUT in given and Component.CACHED_INPUT not in standard.keys() | given.keys():
            rates[Component.CACHED_INPUT] = given[INPUT]
        return Price(rates)


if TYPE_CHECKING:
    PriceConfig = PriceTable
    CostConfig = RateTable
else:
    _KEYS = [component.key for component in CATALOGUE]

    PriceConfig = msgspec.defstruct(
        "PriceConfig",
        [(prefix + key, str | None, None) for prefix in ("", BATCH) for key in _KEYS],
        bases=(PriceTable,),
        namespace={"__doc__": PriceTable.__doc__},
        module=__name__,
        frozen=True,
        forbid_unknown_fields=True,
    )
    CostConfig = msgspec.defstruct(
        "CostConfig",
        [(key, str | None, None) for key in _KEYS],
        bases=(RateTable,),
        namespace={"__doc__": "`[models.NAME.cost]`: what an upstream charges the operator, in `currency`."},
        module=__name__,
        frozen=True,
        forbid_unknown_fields=True,
    )


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
