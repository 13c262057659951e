"""The figures of `/metrics`: what all gateway processes have counted, and how the platform stands now.

Names and units follow Prometheus' conventions (prometheus.io, "Metric and label naming"): base units, `_total` for
what only rises. Counters go on over the restarts of gateway processes; they begin anew with the platform.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from sqlalchemy import Connection, func, select

from tidemill import __version__
from tidemill.gateway.metrics import MetricsSnapshot, ModelFigures, ProcessGauges
from tidemill.gateway.routing.models import ModelSpec
from tidemill.meter.histogram import Histogram
from tidemill.store.files import UNFINISHED
from tidemill.store.tables.files import batches

US = 1_000_000
OF_MODEL = ("model", "tier")


class BatchBacklog(msgspec.Struct, frozen=True):
    """The batches that are not finished."""

    open: Mapping[str, int]
    """By status."""
    lines_left: int


def read_backlog(connection: Connection) -> BatchBacklog:
    """What is in the store of unfinished batches."""
    rows = connection.execute(
        select(
            batches.c.status,
            func.count(),
            func.sum(batches.c.total - batches.c.completed - batches.c.failed),
        )
        .where(batches.c.status.in_(UNFINISHED))
        .group_by(batches.c.status)
    ).all()
    return BatchBacklog({row[0]: row[1] for row in rows}, sum(int(row[2]) for row in rows))


class PlatformMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a page of metrics is made of."""

    figures: MetricsSnapshot
    gauges: Sequence[ProcessGauges]
    """One of each gateway process."""
    gateways_ready: int
    gateway_restarts: int
    specs: Sequence[ModelSpec]
    engine_restarts: Mapping[str, int]
    """By replica."""
    stored: int
    recovered: int
    waiting: int
    lag_s: float
    started_at: float
    """Seconds since 1970 UTC."""
    backlog: BatchBacklog | None
    """None when the store does not answer."""


def families(now: PlatformMetrics) -> Iterator[Metric]:
    """The page, family by family."""
    info = GaugeMetricFamily("tidemill_info", "The running version of Tidemill.", labels=["version"])
    info.add_metric([__version__], 1)
    yield info
    yield _gauge("tidemill_start_time_seconds", "Start time of the platform in seconds since 1970 UTC.", now.started_at)
    yield from _requests(now.figures)
    yield from _fleet(now)
    yield from _hedges(now.figures)
    yield from _meter(now)
    if now.backlog is not None:
        backlog = GaugeMetricFamily("tidemill_batches_open", "Unfinished batches by status.", labels=["status"])
        for status in sorted(UNFINISHED):
            backlog.add_metric([status], now.backlog.open.get(status, 0))
        yield backlog
        yield _gauge(
            "tidemill_batch_lines_left", "Lines of unfinished batches without a result.", now.backlog.lines_left
        )


def _requests(figures: MetricsSnapshot) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "tidemill_requests", "Metered requests by final status.", labels=[*OF_MODEL, "status"]
    )
    for model, tier, of_model in _each(figures):
        for status, count in sorted(of_model.requests.items()):
            requests.add_metric([model, tier, status], count)
    yield requests
    refused = CounterMetricFamily(
        "tidemill_requests_refused", "Requests refused before metering, by error code.", labels=["code"]
    )
    for code, count in sorted(figures.refused.items()):
        refused.add_metric([code], count)
    yield refused
    counts: Sequence[tuple[str, str, Callable[[ModelFigures], int]]] = (
        ("tidemill_prompt_tokens", "Prompt tokens, including cached ones.", lambda each: each.prompt),
        (
            "tidemill_cached_prompt_tokens",
            "Prompt tokens served from an engine's prefix cache.",
            lambda each: each.cached,
        ),
        ("tidemill_completion_tokens", "Completion tokens.", lambda each: each.completion),
        ("tidemill_requests_estimated", "Requests with estimated token counts.", lambda each: each.estimated),
    )
    for name, text, count_of in counts:
        counter = CounterMetricFamily(name, text, labels=OF_MODEL)
        for model, tier, of_model in _each(figures):
            counter.add_metric([model, tier], count_of(of_model))
        yield counter
    times: Sequence[tuple[str, str, Callable[[ModelFigures], Histogram]]] = (
        (
            "tidemill_time_to_first_token_seconds",
            "Time from admission to the first token, including time in the queue.",
            lambda each: each.ttft,
        ),
        (
            "tidemill_time_per_output_token_seconds",
            "Mean time per output token of a request, after the first.",
            lambda each: each.tpot,
        ),
    )
    for name, text, histogram_of in times:
        family = HistogramMetricFamily(name, text, labels=OF_MODEL)
        for model, tier, of_model in _each(figures):
            _add_histogram(family, [model, tier], histogram_of(of_model))
        yield family


def _fleet(now: PlatformMetrics) -> Iterator[Metric]:
    active: Counter[str] = Counter()
    queued: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    for gauges in now.gauges:
        active.update(gauges.active)
        queued.update(gauges.queued)
        broken.update(gauges.broken)
    of_replica = ["model", "replica"]
    flying = GaugeMetricFamily("tidemill_requests_in_flight", "Requests in flight at a replica.", labels=of_replica)
    waiting = GaugeMetricFamily("tidemill_requests_queued", "Requests queued for a full model.", labels=["model"])
    ready = GaugeMetricFamily("tidemill_replicas_ready", "Replicas ready for requests.", labels=["model"])
    wanted = GaugeMetricFamily("tidemill_replicas", "Replicas in any state.", labels=["model"])
    breakers = GaugeMetricFamily(
        "tidemill_replica_breaker_open",
        "Gateway processes with an open circuit breaker for the replica.",
        labels=of_replica,
    )
    restarts = CounterMetricFamily("tidemill_engine_restarts", "Engine restarts.", labels=of_replica)
    for spec in now.specs:
        waiting.add_metric([spec.name], queued[spec.name])
        ready.add_metric([spec.name], sum(replica.ready for replica in spec.replicas))
        wanted.add_metric([spec.name], len(spec.replicas))
        for replica in spec.replicas:
            flying.add_metric([spec.name, replica.name], active[replica.name])
            breakers.add_metric([spec.name, replica.name], broken[replica.name])
            if replica.name in now.engine_restarts:
                restarts.add_metric([spec.name, replica.name], now.engine_restarts[replica.name])
    yield from (flying, waiting, ready, wanted, breakers, restarts)
    yield _gauge("tidemill_gateways_ready", "Gateway processes ready for requests.", now.gateways_ready)
    yield _counter("tidemill_gateway_restarts", "Gateway process restarts.", now.gateway_restarts)


def _hedges(figures: MetricsSnapshot) -> Iterator[Metric]:
    asked = CounterMetricFamily("tidemill_hedges", "Requests sent to a second replica as a hedge.", labels=["model"])
    won = CounterMetricFamily(
        "tidemill_hedges_won", "Hedged requests that the second replica answered first.", labels=["model"]
    )
    for model, count in sorted(figures.hedges.items()):
        asked.add_metric([model], count)
        won.add_metric([model], figures.hedges_won.get(model, 0))
    yield from (asked, won)


def _meter(now: PlatformMetrics) -> Iterator[Metric]:
    figures = now.figures
    yield _counter(
        "tidemill_lease_shortages", "Holds that needed a larger balance lease from the store.", figures.shortages
    )
    yield _counter("tidemill_log_records", "Records written to the usage logs.", figures.records)
    commits = HistogramMetricFamily(
        "tidemill_log_commit_seconds", "Duration of a usage log's write to disk, including the sync."
    )
    if figures.commits is not None:
        _add_histogram(commits, [], figures.commits)
    yield commits
    yield _counter("tidemill_loader_records", "Usage records loaded into the store.", now.stored)
    yield _counter("tidemill_records_recovered", "Usage records completed for processes that died.", now.recovered)
    yield _gauge("tidemill_loader_records_waiting", "Usage records in the logs that are not stored yet.", now.waiting)
    yield _gauge(
        "tidemill_loader_lag_seconds", "Age of the oldest settled record that is not stored yet, in seconds.", now.lag_s
    )


def _each(figures: MetricsSnapshot) -> Iterator[tuple[str, str, ModelFigures]]:
    for model, tiers in sorted(figures.models.items()):
        for tier, of_model in sorted(tiers.items()):
            yield model, tier, of_model


def _add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    buckets: list[tuple[str, float]] = []
    total = 0
    ends = [*(str(bound / US) for bound in histogram.bounds), "+Inf"]
    for end, count in zip(ends, histogram.counts, strict=True):
        total += count
        buckets.append((end, total))
    family.add_metric(labels, buckets, histogram.sum_us / US)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)
