"""Counters of a gateway process for `/metrics`.

Plain integers on the way of a request, sent to the supervisor once a second, which adds up all processes.
"""

from collections.abc import Mapping

import msgspec

from tidemill.gateway.routing.models import ModelRoutes
from tidemill.ledger.pricing import PriceTier
from tidemill.meter.balance_leases import BalanceLeases
from tidemill.meter.histogram import Histogram, milliseconds
from tidemill.meter.log import UsageLog
from tidemill.meter.records import Settled

TTFT_BOUNDS = milliseconds(10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 120_000, 300_000)
TPOT_BOUNDS = milliseconds(1, 2.5, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000, 2500)
MAX_CODES = 64
"""Codes of refusals that are told apart; further ones are counted as `other`."""


class ModelFigures(msgspec.Struct):
    """The settled requests of one model in one tier."""

    requests: dict[str, int] = {}
    """By the record's status."""
    estimated: int = 0
    """Requests whose usage the engine did not report."""
    prompt: int = 0
    """Tokens of prompts, those found in a cache among them."""
    cached: int = 0
    completion: int = 0
    ttft: Histogram = msgspec.field(default_factory=lambda: Histogram(TTFT_BOUNDS))
    """From admission to the first token, where it was seen."""
    tpot: Histogram = msgspec.field(default_factory=lambda: Histogram(TPOT_BOUNDS))
    """Between tokens after the first, a request's mean."""

    def add(self, other: "ModelFigures") -> None:
        _add_counts(self.requests, other.requests)
        self.estimated += other.estimated
        self.prompt += other.prompt
        self.cached += other.cached
        self.completion += other.completion
        self.ttft.add(other.ttft)
        self.tpot.add(other.tpot)


class MetricsSnapshot(msgspec.Struct):
    """The counters of gateway processes since their start."""

    models: dict[str, dict[str, ModelFigures]] = {}
    """By model, then by tier."""
    refused: dict[str, int] = {}
    """Requests that were refused before they were metered, by the error's code."""
    hedges: dict[str, int] = {}
    """Requests that a second replica was asked for as well, by model."""
    hedges_won: dict[str, int] = {}
    """Those that it answered."""
    shortages: int = 0
    """Requests that found too little money at hand and had to ask the store for more."""
    records: int = 0
    """Records written to the usage log."""
    commits: Histogram | None = None
    """The usage log's writes to disk, each with its sync."""

    def add(self, other: "MetricsSnapshot") -> None:
        """Add another process's counters."""
        for model, tiers in other.models.items():
            for tier, figures in tiers.items():
                self.models.setdefault(model, {}).setdefault(tier, ModelFigures()).add(figures)
        _add_counts(self.refused, other.refused)
        _add_counts(self.hedges, other.hedges)
        _add_counts(self.hedges_won, other.hedges_won)
        self.shortages += other.shortages
        self.records += other.records
        if other.commits is not None:
            if self.commits is None:
                self.commits = Histogram(other.commits.bounds)
            self.commits.add(other.commits)


class ProcessGauges(msgspec.Struct):
    """The gauges of a gateway process."""

    active: dict[str, int] = {}
    """Requests at each replica."""
    queued: dict[str, int] = {}
    """Requests of all classes that wait for a full model."""
    broken: list[str] = []
    """Replicas whose circuit breaker is open."""


class RequestMetrics:
    """Counts the requests of one gateway process."""

    def __init__(self) -> None:
        self._by_model: dict[tuple[str, PriceTier], ModelFigures] = {}
        self._refused: dict[str, int] = {}
        self._hedges: dict[str, int] = {}
        self._hedges_won: dict[str, int] = {}

    def note(self, settled: Settled) -> None:
        """Count a settled request. The hot path."""
        opened = settled.opened
        name = (opened.model, opened.tier)
        figures = self._by_model.get(name)
        if figures is None:
            figures = self._by_model[name] = ModelFigures()
        requests = figures.requests
        requests[settled.status] = requests.get(settled.status, 0) + 1
        figures.estimated += settled.estimated
        figures.prompt += settled.prompt
        figures.cached += settled.cached
        figures.completion += settled.completion
        first_us = settled.first_token_us
        if first_us:
            figures.ttft.note(first_us - opened.started_us)
            if settled.completion > 1:
                figures.tpot.note((settled.finished_us - first_us) // (settled.completion - 1))

    def refuse(self, code: str) -> None:
        """Count a request that was refused before it was metered."""
        if code not in self._refused and len(self._refused) >= MAX_CODES:
            code = "other"
        self._refused[code] = self._refused.get(code, 0) + 1

    def hedge(self, model: str, *, won: bool) -> None:
        """Count a hedged request."""
        _add_counts(self._hedges, {model: 1})
        _add_counts(self._hedges_won, {model: int(won)})

    def figures(self, leasing: BalanceLeases, log: UsageLog) -> MetricsSnapshot:
        """The counters as of now."""
        models: dict[str, dict[str, ModelFigures]] = {}
        for (model, tier), figures in self._by_model.items():
            models.setdefault(model, {})[tier.value] = figures
        return MetricsSnapshot(
            models=models,
            refused=self._refused,
            hedges=self._hedges,
            hedges_won=self._hedges_won,
            shortages=leasing.shortages,
            records=log.records,
            commits=log.commit_times,
        )


def process_gauges(routes: ModelRoutes, queued: Mapping[str, int]) -> ProcessGauges:
    """The gauges of a gateway process: its replicas and its queues."""
    replicas = [replica for route in routes.by_name.values() for replica in route.replicas]
    return ProcessGauges(
        active={replica.spec.name: replica.clock.active for replica in replicas},
        queued=dict(queued),
        broken=[replica.spec.name for replica in replicas if replica.breaker.is_open],
    )


def _add_counts(into: dict[str, int], other: Mapping[str, int]) -> None:
    for name, count in other.items():
        into[name] = into.get(name, 0) + count
