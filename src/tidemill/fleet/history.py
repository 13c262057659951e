"""What the tide remembers of demand, expects from it, and has measured of models.

Demand is kept by five minutes.

Demand is read off the usage records, so there is a past from the first start on, and no second count to go wrong
(`store.demand`). It is kept for five weeks: the forecast looks at four.
"""

import asyncio
from collections.abc import Iterable, Mapping
from functools import partial

import structlog

from tidemill.clock import PROCESS_CLOCK
from tidemill.errors import TidemillError
from tidemill.store.demand import (
    BIN_S,
    DemandBin,
    bin_of,
    drop_bins,
    keep_measures,
    last_bin,
    mark_bin,
    read_bins,
    read_measures,
    refresh_bins,
)
from tidemill.store.engine import Store
from tidemill.tides.forecast import DemandSeries, forecast
from tidemill.tides.routing import POLICY
from tidemill.tides.state import Demand

KEEP_S = 35 * 86_400
REFRESH_S = 60.0
LATE_BINS = 3
"""So many of the last bins are computed anew each time: a request's record comes when it ends."""
MIN_HORIZON_S = 60.0

log = structlog.get_logger()


class DemandHistory:
    """Demand and measures of all models. Its store work is done in threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._expected: dict[str, tuple[float, Demand]] = {}
        """By model: the horizon that was asked for, and what is expected within it."""
        self._horizons: dict[str, float] = {}
        self.measures: dict[str, dict[str, float]] = {}
        """`startup_s` and `capacity` by model, as an earlier run has left them."""
        self._kept: dict[tuple[str, str], float] = {}
        self._unkept: dict[tuple[str, str], float] = {}

    async def open(self, models: Iterable[str]) -> None:
        """Read what there is; the forecasts are there afterwards. Raises Unavailable."""
        self._horizons = dict.fromkeys(models, MIN_HORIZON_S)
        await asyncio.to_thread(self._open)

    def _open(self) -> None:
        with self._store.read() as connection:
            self.measures = read_measures(connection)
        self._kept = {
            (model, name): value for model, measures in self.measures.items() for name, value in measures.items()
        }
        self._refresh()

    async def run(self) -> None:
        """Keep it up to date until cancelled."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await asyncio.to_thread(self._refresh)
            except TidemillError as error:
                log.warning("demand is not brought up to date: the store does not answer", reason=str(error))
            except Exception:
                log.exception("demand could not be brought up to date")

    def demand(self, model: str, horizon_s: float) -> Demand:
        """What is expected of a model until then; it is brought up to date each minute."""
        self._horizons[model] = max(horizon_s, MIN_HORIZON_S)
        _, expected = self._expected.get(model, (0.0, Demand()))
        return expected

    def measure(self, model: str, name: str, value: float) -> None:
        """Keep what was measured; it is written down within a minute."""
        kept = self._kept.get((model, name), 0.0)
        if abs(value - kept) > 0.02 * abs(kept):
            self._unkept[model, name] = value

    def _refresh(self) -> None:
        now = PROCESS_CLOCK.seconds()
        current = bin_of(now)
        with self._store.write() as connection:
            newest = last_bin(connection)
            first = bin_of(now - KEEP_S) if newest is None else min(newest, current) - LATE_BINS + 1
            refresh_bins(connection, first, decode_weight=POLICY.decode_weight)
            mark_bin(connection, current)
            drop_bins(connection, bin_of(now - KEEP_S))
            unkept, self._unkept = self._unkept, {}
            keep_measures(connection, unkept, PROCESS_CLOCK.now())
            bins = read_bins(connection, bin_of(now - KEEP_S))
        self._kept |= unkept
        pasts = pasts_of(bins, current)
        expect = partial(_expect, pasts)
        self._expected = {model: (horizon, expect(model, horizon)) for model, horizon in self._horizons.items()}


def pasts_of(bins: Mapping[str, list[DemandBin]], current: int) -> dict[str, DemandSeries]:
    """Each model's past until the bin that is not over yet, without gaps.

    A bin in which the platform was up, or any model was asked, and this one was not, is one of no demand; of the others
    nothing is known.
    """
    known = {each.number for of_model in bins.values() for each in of_model if each.number < current}
    if not known:
        return {}
    first = min(known)
    pasts = {}
    for model, of_model in bins.items():
        work = {each.number: each.work for each in of_model}
        values = tuple(work.get(number, 0) / BIN_S if number in known else None for number in range(first, current))
        pasts[model] = DemandSeries(current * BIN_S, values, BIN_S)
    return pasts


def _expect(pasts: Mapping[str, DemandSeries], model: str, horizon_s: float) -> Demand:
    past = pasts.get(model)
    # The horizon begins now, which may be a bin after the past's end.
    return Demand() if past is None else forecast(past, horizon_s + BIN_S)
