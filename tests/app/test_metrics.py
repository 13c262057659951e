"""The page of metrics, from what gateway processes report."""

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.plane import model
from tidemill.app.metrics import BatchBacklog, PlatformMetrics, families
from tidemill.gateway.metrics import MetricsSnapshot, ModelFigures, ProcessGauges
from tidemill.gateway.routing.models import ReplicaSpec
from tidemill.meter.histogram import Histogram


class Page:
    def __init__(self, metrics: list[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> list[Metric]:
        return self.metrics


def samples(standing: PlatformMetrics) -> dict[str, float]:
    """The page as Prometheus reads it: `name{label=value,...}` -> value."""
    registry = CollectorRegistry()
    registry.register(Page(list(families(standing))))
    text = generate_latest(registry).decode()
    return {
        each.name + "".join(f"{{{name}={value}}}" for name, value in sorted(each.labels.items())): each.value
        for family in text_string_to_metric_families(text)
        for each in family.samples
    }


def standing() -> PlatformMetrics:
    of_model = ModelFigures(requests={"ok": 2, "engine_lost": 1}, prompt=300, cached=40, completion=50)
    for us in (9_000, 60_000, 400_000_000):
        of_model.ttft.note(us)
    commits = Histogram((100, 1000))
    commits.note(150)
    replicas = tuple(ReplicaSpec(f"mock/{index}", "http://127.0.0.1:1/v1", ready=index == 0) for index in range(2))
    return PlatformMetrics(
        figures=MetricsSnapshot(
            models={"mock": {"standard": of_model}},
            refused={"x": 3},
            records=3,
            commits=commits,
            hedges={"mock": 4},
            hedges_won={"mock": 3},
        ),
        gauges=[
            ProcessGauges(active={"mock/0": 2}, queued={"mock": 5}, broken=["mock/1"]),
            ProcessGauges(active={"mock/0": 1, "gone/0": 7}, broken=["mock/1"]),
        ],
        gateways_ready=2,
        gateway_restarts=1,
        specs=[model(1, replicas=replicas)],
        engine_restarts={"mock/0": 4},
        stored=3,
        recovered=1,
        waiting=0,
        lag_s=0.25,
        started_at=1_700_000_000.0,
        backlog=BatchBacklog({"in_progress": 2}, 1500),
    )


def test_the_page_has_what_was_counted_in_base_units() -> None:
    page = samples(standing())
    assert page["tidemill_requests_total{model=mock}{status=engine_lost}{tier=standard}"] == 1
    assert page["tidemill_prompt_tokens_total{model=mock}{tier=standard}"] == 300
    ttft = "tidemill_time_to_first_token_seconds"
    assert page[ttft + "_bucket{le=0.01}{model=mock}{tier=standard}"] == 1
    assert page[ttft + "_bucket{le=0.1}{model=mock}{tier=standard}"] == 2
    assert page[ttft + "_bucket{le=300.0}{model=mock}{tier=standard}"] == 2
    assert page[ttft + "_bucket{le=+Inf}{model=mock}{tier=standard}"] == 3
    assert page[ttft + "_sum{model=mock}{tier=standard}"] == 400.069
    assert page["tidemill_log_commit_seconds_count"] == 1
    assert page["tidemill_requests_refused_total{code=x}"] == 3
    assert page["tidemill_hedges_total{model=mock}"] == 4 and page["tidemill_hedges_won_total{model=mock}"] == 3
    assert page["tidemill_loader_lag_seconds"] == 0.25


def test_gateway_processes_are_added_up_by_what_is_configured() -> None:
    page = samples(standing())
    assert page["tidemill_requests_in_flight{model=mock}{replica=mock/0}"] == 3
    assert page["tidemill_requests_queued{model=mock}"] == 5
    assert page["tidemill_replica_breaker_open{model=mock}{replica=mock/1}"] == 2
    assert page["tidemill_replicas_ready{model=mock}"] == 1
    assert page["tidemill_engine_restarts_total{model=mock}{replica=mock/0}"] == 4
    assert "tidemill_engine_restarts_total{model=mock}{replica=mock/1}" not in page, "nobody restarts an upstream"
    assert not any("gone/0" in name for name in page)


def test_batches_are_left_out_while_the_store_is_away() -> None:
    page = samples(standing())
    assert page["tidemill_batches_open{status=in_progress}"] == 2
    assert page["tidemill_batches_open{status=validating}"] == 0
    assert page["tidemill_batch_lines_left"] == 1500
    without = samples(msgspec.structs.replace(standing(), backlog=None))
    assert not any("batch" in name for name in without)
    assert without["tidemill_log_records_total"] == 3


def test_a_platform_that_did_nothing_has_a_page() -> None:
    page = samples(msgspec.structs.replace(standing(), figures=MetricsSnapshot(), gauges=[], specs=[]))
    assert page["tidemill_log_records_total"] == 0
