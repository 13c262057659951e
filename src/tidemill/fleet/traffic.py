"""What the gateways report of a model, made into the figures that a plan needs.

Rates, lateness, idleness, capacity.

All instants here are of one monotonic clock, in seconds: a wall clock that jumps changes nothing.
"""

import math
from collections import deque

from tidemill.tides.buckets import Buckets, add_up, quantile_us

NOW_TAU_S = 10.0
"""`ModelTraffic.rate` averages over about this long."""
LATE_TAU_S = 60.0
"""`ModelTraffic.late` likewise."""
PEAK_STEP_S = 1.0
SAMPLES_S = 8.0
"""Times to first token, and per token, are those of the last one to two times so long."""
CAPACITY_WINDOW_S = 10.0
"""Capacity is measured in windows of this length."""
BUSY_SHARE = 0.9
"""A replica that had requests in flight for so much of a window was at work throughout."""
FIRST_GUESS = 0.8
"""Of the first rate that is measured, so much is believed."""
RISE = 0.3
FALL = 0.97
MIN_ENDED = 3
"""Requests that have to end in a window for its lateness to say anything."""


class ModelTraffic:
    """One model's interactive traffic."""

    def __init__(self, now: float, *, percentile: float = 0.95) -> None:
        self.percentile = percentile
        """The objective's: a window is good when at least this share of its requests kept to it."""
        self._rate = self._arrivals = self._ended = self._late = 0.0
        self._ttft: tuple[Buckets, Buckets] = ({}, {})
        self._tpot: tuple[Buckets, Buckets] = ({}, {})
        self._samples_since = now
        self._at = now
        self._last_busy = now
        self._peaks: deque[tuple[float, float]] = deque()
        """Falling peaks with their instants: the first is the highest of the window."""

    def heard(self, arrivals: int, work: int, ended: int, late: int, now: float) -> None:
        """A report: so much has come and ended since the last one."""
        self._decay(now)
        self._rate += work / NOW_TAU_S
        self._arrivals += arrivals / NOW_TAU_S
        self._ended += ended
        self._late += late
        if arrivals:
            self._last_busy = now

    def sampled(self, ttft: Buckets, tpot: Buckets, now: float) -> None:
        """The times of requests that have ended."""
        self._age(now)
        add_up(self._ttft[0], ttft)
        add_up(self._tpot[0], tpot)

    def ttft_s(self, now: float) -> float | None:
        """The time to first token lately, at the objective's percentile; None: nobody has asked."""
        self._age(now)
        return self._quantile(self._ttft)

    def tpot_s(self, now: float) -> float | None:
        """The time per token after the first, likewise."""
        self._age(now)
        return self._quantile(self._tpot)

    def arrivals(self, now: float) -> float:
        """Requests a second."""
        self._decay(now)
        return self._arrivals if self.idle_s(now) < NOW_TAU_S else 0.0

    def busy(self, now: float) -> None:
        """A request is in flight or waits."""
        self._last_busy = max(self._last_busy, now)

    def rate(self, now: float) -> float:
        """Work a second that arrives, tokens of prefill.

        An average that fades would never be none: it is, once nobody has been there for as long as it averages over.
        """
        self._decay(now)
        return max(self._rate, 0.0) if self.idle_s(now) < NOW_TAU_S else 0.0

    def late(self, now: float) -> float:
        """The share of the last minutes' requests that missed the objective."""
        self._decay(now)
        return min(self._late / self._ended, 1.0) if self._ended >= 1.0 else 0.0

    def idle_s(self, now: float) -> float:
        """Seconds since the last request was there."""
        return max(now - self._last_busy, 0.0)

    def peak(self, level: float, now: float, within_s: float) -> float:
        """The highest `level` that was given here within so long; `level` is that of now."""
        peaks = self._peaks
        while peaks and peaks[-1][1] <= level:
            peaks.pop()
        if not peaks or now - peaks[-1][0] >= PEAK_STEP_S or not math.isclose(peaks[-1][1], level, rel_tol=0.01):
            peaks.append((now, level))
        while len(peaks) > 1 and peaks[0][0] < now - within_s:
            peaks.popleft()
        return peaks[0][1]

    def _decay(self, now: float) -> None:
        passed = now - self._at
        if passed <= 0:
            return
        self._at = now
        self._rate *= math.exp(-passed / NOW_TAU_S)
        self._arrivals *= math.exp(-passed / NOW_TAU_S)
        fade = math.exp(-passed / LATE_TAU_S)
        self._ended *= fade
        self._late *= fade

    def _age(self, now: float) -> None:
        passed = now - self._samples_since
        if passed < SAMPLES_S:
            return
        if passed >= 2 * SAMPLES_S:
            self._ttft, self._tpot = ({}, {}), ({}, {})
        else:
            self._ttft, self._tpot = ({}, self._ttft[0]), ({}, self._tpot[0])
        self._samples_since = now

    def _quantile(self, both: tuple[Buckets, Buckets]) -> float | None:
        merged = dict(both[0])
        add_up(merged, both[1])
        micros = quantile_us(merged, self.percentile)
        return None if micros is None else micros / 1e6


class CapacityMeter:
    """Measures what one replica of a model does within the objective: work a second.

    Windows in which a replica was at work throughout count. One that kept the objective shows that the replica can do
    at least that; one that missed it, that what was believed is too much.
    """

    def __init__(self, capacity: float = 0.0, *, percentile: float = 0.95) -> None:
        self.capacity = capacity
        """0: not known yet."""
        self._percentile = percentile
        self._began: float | None = None
        self._done: dict[str, int] = {}
        self._busy_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}
        self._ended = self._late = 0

    def served(self, replica: str, in_flight: int, done: int, now: float) -> None:
        """A report of a replica that people's requests go to."""
        if self._began is None:
            self._began = now
        if in_flight or done:
            passed = min(now - self._last_s.get(replica, now), 1.0)
            self._busy_s[replica] = self._busy_s.get(replica, 0.0) + passed
        self._last_s[replica] = now
        self._done[replica] = self._done.get(replica, 0) + done

    def ended(self, ended: int, late: int) -> None:
        """Requests of the model that have ended, and those of them that missed the objective."""
        self._ended += ended
        self._late += late

    def close_window(self, now: float) -> bool:
        """Evaluate the window if it is over; True when the capacity has changed."""
        if self._began is None or now - self._began < CAPACITY_WINDOW_S:
            return False
        length = now - self._began
        rates = [
            self._done[replica] / length for replica, busy_s in self._busy_s.items() if busy_s >= BUSY_SHARE * length
        ]
        enough = self._ended >= MIN_ENDED
        kept = self._late <= (1 - self._percentile) * self._ended
        before = self.capacity
        if rates and enough and length < 2 * CAPACITY_WINDOW_S:
            self._learn(sum(rates) / len(rates), kept=kept)
        self._began = now
        self._done.clear()
        self._busy_s.clear()
        self._ended = self._late = 0
        return self.capacity != before

    def _learn(self, rate: float, *, kept: bool) -> None:
        if rate <= 0:
            return
        if kept and self.capacity <= 0:
            self.capacity = FIRST_GUESS * rate
        elif kept and rate > self.capacity:
            self.capacity += RISE * (rate - self.capacity)
        elif not kept and self.capacity <= 0:
            self.capacity = FIRST_GUESS * FIRST_GUESS * rate
        elif not kept and rate < self.capacity:
            self.capacity *= FALL
