"""Forecast of a model's interactive work.

From its own history, by time of day and weekday, corrected by how today goes, and with how wrong that was before.

No model is trained: the profile of a moment is a weighted median of what came at this time on the days before, recent
days and the same weekday counting more; the level is that of the last bins relative to their profile, and is believed
the less the further ahead one looks. What was wrong in the last day, at the same distance, gives the quantiles. So it
starts with no history, shrugs off gaps and single spikes, and can be explained. After seasonal naive forecasting with
level correction (Hyndman and Athanasopoulos, "Forecasting: Principles and Practice", 5.2 and 5.5); predictive lending
of GPUs by quantiles: GFS (arXiv 2509.11134), SageServe (arXiv 2502.14617).
"""

import math
from collections.abc import Sequence

import msgspec

from tidemill.tides.state import Demand

DAY_S = 86_400.0
MAX_DAYS = 28


class DemandSeries(msgspec.Struct, frozen=True):
    """Mean work per second in consecutive bins, the oldest first."""

    end: float
    """Unix time at which the last bin ends, seconds."""
    values: tuple[float | None, ...] = ()
    """None: nothing is known of it, the platform was down."""
    bin_s: float = 300.0


class ForecastSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a forecast."""

    quantile: float = 0.95
    """That `Demand.high` is meant to be: so often it was not more."""
    recent: int = 6
    """Bins that tell how today goes."""
    memory_s: float = 7200.0
    """After so long, a third of today's deviation from the profile is still expected."""
    day_weight: float = 0.85
    """What each day further back counts relative to the next."""
    weekday_weight: float = 4.0
    """What the same weekday counts relative to others, once there are two weeks."""
    errors: int = 288
    """Bins whose forecasts are looked at for how wrong they were."""
    spread: float = 0.5
    """Relative error that is assumed at the quantile where none is known."""
    enough: int = 24
    """Errors that weigh as much as that assumption."""


OUTLOOK = ForecastSettings()


def forecast(history: DemandSeries, horizon_s: float, outlook: ForecastSettings = OUTLOOK) -> Demand:
    """The highest work per second expected until `horizon_s` from now, and its quantile.

    It is the most of any bin until then, counted from the end of the history. Costs a few milliseconds for four weeks:
    ask once a bin.
    """
    ahead = max(math.ceil(horizon_s / history.bin_s), 1)
    view = _View(history, outlook)
    last = len(history.values)
    best = max((view.at(last + step, last) for step in range(ahead)), default=0.0)
    error = view.error(ahead)
    return Demand(best, max(best * (1 + error), best))


class _View:
    """A history, looked at from several moments; a moment is the number of bins that are known then."""

    def __init__(self, history: DemandSeries, outlook: ForecastSettings) -> None:
        self._values = history.values[-round((MAX_DAYS + 1) * DAY_S / history.bin_s) :]
        self._skipped = len(history.values) - len(self._values)
        self._day = max(round(DAY_S / history.bin_s), 1)
        self._outlook = outlook
        self._memory = outlook.memory_s / history.bin_s
        self._profiles: dict[int, float | None] = {}

    def at(self, target: int, known: int) -> float:
        """The forecast for bin `target` from the bins before `known`."""
        return self._at(target - self._skipped, known - self._skipped)

    def _at(self, target: int, known: int) -> float:
        recent = [
            (index, value)
            for index in range(max(known - self._outlook.recent, 0), known)
            if (value := self._values[index]) is not None
        ]
        profile = self._profile(target)
        if profile is None:
            return _level([value for _, value in recent]) if recent else self._last(known)
        pairs = [(value, base) for index, value in recent if (base := self._profile(index)) is not None]
        if not pairs:
            return profile
        # The middle of the ratios, not their mean: one bin with a burst does not make a busy day.
        floor = max(sum(base for _, base in pairs) / len(pairs), profile) * 0.02 + 1e-9
        ratio = _median([(value + floor) / (base + floor) for value, base in pairs])
        believed = math.exp(-(target - known) / self._memory)
        today: float = min(max(ratio, 0.1), 10.0) ** believed
        return max((profile + floor) * today - floor, 0.0)

    def _last(self, known: int) -> float:
        return next((value for value in reversed(self._values[:known]) if value is not None), 0.0)

    def _profile(self, target: int) -> float | None:
        """The work at this time on earlier days; None without any."""
        if target in self._profiles:
            return self._profiles[target]
        outlook, values, day = self._outlook, self._values, self._day
        weeks = target >= 14 * day
        weighted: list[tuple[float, float]] = []
        weight = 1.0
        for back in range(1, MAX_DAYS + 1):
            middle = target - back * day
            if middle < 0:
                break
            factor = weight * (outlook.weekday_weight if weeks and back % 7 == 0 else 1.0)
            for index in (middle - 1, middle, middle + 1):
                if 0 <= index < len(values) and (value := values[index]) is not None:
                    weighted.append((value, factor))
            weight *= outlook.day_weight
        profile = _weighted_median(weighted) if weighted else None
        self._profiles[target] = profile
        return profile

    def error(self, ahead: int) -> float:
        """The quantile of relative errors of forecasts so many bins ahead in the recent past."""
        outlook, values = self._outlook, self._values
        step = ahead - 1
        errors = []
        for target in range(max(len(values) - outlook.errors, ahead), len(values)):
            actual = values[target]
            if actual is None:
                continue
            guess = self._at(target, target - step)
            scale = max(guess, 0.05 * actual)
            if scale > 0:
                errors.append((actual - guess) / scale)
        if not errors:
            return outlook.spread
        found = max(quantile(errors, outlook.quantile), 0.0)
        known = len(errors) / outlook.enough
        return found if known >= 4 else (found * known + outlook.spread) / (known + 1)


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of the values: of those with a rank, the next higher."""
    ordered = sorted(values)
    return ordered[min(max(math.ceil(share * (len(ordered) + 1)) - 1, 0), len(ordered) - 1)]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _weighted_median(weighted: list[tuple[float, float]]) -> float:
    weighted.sort()
    half = sum(weight for _, weight in weighted) / 2
    for value, weight in weighted:
        half -= weight
        if half <= 0:
            return value
    return weighted[-1][0]


def _level(values: Sequence[float]) -> float:
    """The level of the last bins, without a profile: their median, or the last two if they rise."""
    return max(_median(values), _median(values[-2:]))
