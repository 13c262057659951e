"""Interactive requests over a day.

A daily curve with a trough below half of its peak, and within it the bursts and the lengths of a recorded trace.

The traces are the Azure LLM inference traces of 2023 (Patel et al., "Splitwise", ISCA 2024; CC-BY 4.0), an hour each.
A model with several times the trace's rate gets as many copies of it, each from another place on: laid upon each
other, as the requests of more users would be.
"""

import csv
import datetime as dt
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tidemill.errors import BadInput
from tidemill.tides.forecast import DAY_S


class ArrivalBin(msgspec.Struct, frozen=True, gc=False):
    """Requests that come in one step of time, and their tokens."""

    requests: float = 0.0
    prompt: float = 0.0
    output: float = 0.0


class Trace(msgspec.Struct, frozen=True):
    """A recorded hour in bins."""

    bins: tuple[ArrivalBin, ...]
    bin_s: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return sum(each.requests for each in self.bins) / (len(self.bins) * self.bin_s)

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt."""
        return sum(each.prompt for each in self.bins) / sum(each.requests for each in self.bins)

    @property
    def output(self) -> float:
        """Mean tokens of an answer."""
        return sum(each.output for each in self.bins) / sum(each.requests for each in self.bins)


def read_trace(path: Path, bin_s: float) -> Trace:
    """Read an Azure trace (TIMESTAMP, ContextTokens, GeneratedTokens).

    Raises BadInput for a file that is none.
    """
    counts: dict[int, list[float]] = {}
    begin: float | None = None
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                at = dt.datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=dt.UTC).timestamp()
                begin = at if begin is None else begin
                sums = counts.setdefault(int((at - begin) / bin_s), [0.0, 0.0, 0.0])
                sums[0] += 1
                sums[1] += int(row["ContextTokens"])
                sums[2] += int(row["GeneratedTokens"])
    except (OSError, KeyError, ValueError) as error:
        raise BadInput(f"{path} is no trace of arrivals: {error!r}") from error
    if not counts:
        raise BadInput(f"{path} has no requests")
    bins = tuple(ArrivalBin(*counts.get(index, (0.0, 0.0, 0.0))) for index in range(max(counts) + 1))
    return Trace(bins, bin_s)


def daily_curve(at_s: float, trough: float = 0.3) -> float:
    """Demand relative to its peak at a second of the day.

    Least at 4:30, a first peak late in the morning, a second one in the evening. An assumption in the form that
    published days have (FIELD: a trough below half of the peak).
    """
    hour = at_s / 3600 % 24
    wave = 0.5 - 0.5 * math.cos((hour - 4.5) / 24 * 2 * math.pi)
    humps = 0.25 * math.exp(-(((hour - 10.5) / 2.2) ** 2)) + 0.3 * math.exp(-(((hour - 20.5) / 2.5) ** 2))
    shape: float = min((wave**1.3 + humps) / 1.06, 1.0)
    return trough + (1 - trough) * shape


class Day(msgspec.Struct, frozen=True):
    """What is asked of one model."""

    peak_rate: float
    """Requests a second at the peak of the daily curve."""
    trough: float = 0.3
    level: float = 1.0
    """How busy this day is, relative to others."""
    surge_at_s: float | None = None
    """An hour that nobody could foresee begins here."""
    surge: float = 1.0
    """How much more comes then."""
    noise: float = 0.0
    """Standard deviation of each quarter of an hour's own deviation."""


def requests_of(day: Day, trace: Trace, seed: int, seconds: float = DAY_S) -> list[ArrivalBin]:
    """The bins of a day."""
    chance = random.Random(seed)
    bin_s = trace.bin_s
    size = len(trace.bins)
    copies = max(round(day.peak_rate / trace.rate), 1)
    mean = trace.rate * bin_s * copies
    wobble = [math.exp(chance.gauss(0, day.noise)) for _ in range(int(seconds / 900) + 2)]
    bins: list[ArrivalBin] = []
    starts: list[int] = []
    for index in range(round(seconds / bin_s)):
        at = index * bin_s
        if index % size == 0:
            starts = [chance.randrange(size) for _ in range(copies)]
        here = [trace.bins[(start + index) % size] for start in starts]
        surge = day.surge if day.surge_at_s is not None and 0 <= at - day.surge_at_s < 3600 else 1.0
        part = at % 900 / 900
        own = wobble[int(at / 900)] * (1 - part) + wobble[int(at / 900) + 1] * part
        scale = day.peak_rate * bin_s * daily_curve(at, day.trough) * day.level * surge * own / mean
        bins.append(
            ArrivalBin(
                sum(each.requests for each in here) * scale,
                sum(each.prompt for each in here) * scale,
                sum(each.output for each in here) * scale,
            )
        )
    return bins


def history_of(
    days: int, work: Callable[[ArrivalBin], float], day: Day, trace: Trace, seed: int, bin_s: float = 300.0
) -> list[float]:
    """Mean work a second in bins of `bin_s` over days before; these have a level of their own each."""
    chance = random.Random(seed)
    values: list[float] = []
    coarse = coarser(trace, round(bin_s / trace.bin_s))
    for number in range(days):
        before = msgspec.structs.replace(day, level=math.exp(chance.gauss(0, 0.06)), surge_at_s=None)
        values += [work(each) / bin_s for each in requests_of(before, coarse, seed * 1000 + number)]
    return values


def coarser(trace: Trace, times: int) -> Trace:
    """The same trace in longer bins."""
    whole = [trace.bins[index : index + times] for index in range(0, len(trace.bins) - times + 1, times)]
    return Trace(tuple(_sum(part) for part in whole), trace.bin_s * times)


def _sum(bins: Sequence[ArrivalBin]) -> ArrivalBin:
    return ArrivalBin(
        sum(each.requests for each in bins), sum(each.prompt for each in bins), sum(each.output for each in bins)
    )
