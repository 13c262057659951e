"""/metrics: for whom, and in what form."""

from typing import Any

from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.control.conftest import Api
from tests.control.world import FakePlatform


def test_the_page_needs_the_admin_token_unless_it_is_open(client: TestClient[Any], platform: FakePlatform) -> None:
    assert client.get("/metrics").status_code == 200
    del client.headers["authorization"]
    refused = client.get("/metrics")
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "unauthorized"
    platform.metrics_open = True
    assert client.get("/metrics").status_code == 200


def test_the_page_is_what_prometheus_parses(client: TestClient[Any]) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    (family,) = text_string_to_metric_families(answer.text)
    assert [(each.name, each.labels, each.value) for each in family.samples] == [
        ("tidemill_requests_total", {"model": 'a "model"'}, 7.0)
    ]
    preferred = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert preferred.headers["content-type"].startswith("application/openmetrics-text")
    assert preferred.text.endswith("# EOF\n")


def test_an_open_page_opens_nothing_else(client: TestClient[Any], platform: FakePlatform, api: Api) -> None:
    platform.metrics_open = True
    del client.headers["authorization"]
    api.refused(401, "GET", "/tenants")
