"""/metrics: the platform's figures as Prometheus reads them."""

from typing import Any

from litestar import Request, Response, get
from litestar.types import Guard
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tidemill.control.api.access import Running
from tidemill.control.platform import Platform


class _Page(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


@get("/metrics", include_in_schema=False)
async def get_metrics(platform: Running, request: Request[Any, Any, Any]) -> Response[bytes]:
    """The platform's figures, in Prometheus' text form, or OpenMetrics where the client prefers it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(list(await platform.metrics())))
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"content-type": content_type})


def metrics_guard(platform: Platform, guard: Guard) -> Guard:
    """Asks for the admin token, unless the operator has opened the metrics."""

    def check(connection: Any, handler: Any) -> None:
        if not platform.metrics_open:
            guard(connection, handler)

    return check
