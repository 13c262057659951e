"""Models, prices, status, reconciliation, and the description of all that."""

import re
from datetime import UTC, datetime
from typing import Any

from litestar.testing import TestClient

from tests.control.conftest import Api
from tests.control.world import FakeModel, FakePlatform
from tests.support.prices import token_price
from tidemill.store.prices import set_price


def test_models_with_their_prices(api: Api, platform: FakePlatform) -> None:
    platform.running = [FakeModel("mock", state="starting", replicas_ready=0, endpoint=None), FakeModel("free")]
    free, mock = api.get("/models")["models"]
    assert free["prices"] == {}
    assert mock == {
        "name": "mock",
        "engine": "llamacpp",
        "state": "starting",
        "replicas_ready": 0,
        "replicas_total": 1,
        "endpoint": None,
        "prices": {
            "CNY": {"input": "30.00", "cached_input": "7.30", "output": "115.123456789"},
            "USD": {"input": "4.00", "cached_input": "1.00", "output": "16.00"},
        },
    }


def test_prices_in_force_and_their_history(api: Api, platform: FakePlatform) -> None:
    with platform.store.write() as connection:
        set_price(connection, model="mock", currency="USD", price=token_price(1, 2, 3), now=datetime.now(UTC))
    current = api.get("/prices")["prices"]
    assert [(price["model"], price["currency"]) for price in current] == [
        ("big", "USD"),
        ("mock", "CNY"),
        ("mock", "USD"),
    ]
    assert current[2]["output"] == "0.000000003"
    history = api.get("/prices", history="true")["prices"]
    assert len(history) == 4 and history[-1] == current[2]
    assert [price["valid_from"] for price in history] == sorted(price["valid_from"] for price in history)


def test_status(api: Api, platform: FakePlatform) -> None:
    found = api.get("/status")
    assert found["revision"] == platform.revision()
    assert (found["currency"], found["zone"], found["state"]) == ("USD", "Asia/Shanghai", "ready")


def test_reconcile(api: Api) -> None:
    assert api.get("/meter/reconcile")["unchecked"] == ["mock/0"]
    assert "no token counters" in api.client.get("/api/v1/meter/reconcile/text").text


def test_the_openapi_document_is_whole(client: TestClient[Any]) -> None:
    answer = client.get("/api/openapi.json")
    document = answer.json()
    assert answer.headers["content-type"].startswith("application/json")
    assert document["openapi"] == "3.1.0" and document["info"]["title"] and document["info"]["version"]
    assert document["components"]["securitySchemes"] == {"admin_token": {"type": "http", "scheme": "bearer"}}
    schemas = document["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', answer.text):
        assert name in schemas
    assert all(schema.get("description") for schema in schemas.values())
    operations = [(path, method, each) for path, item in document["paths"].items() for method, each in item.items()]
    assert {path for path, _, _ in operations} == {
        "/api/v1/" + path
        for path in "tenants tenants/weight keys keys/rotate keys/revoke limits limits/remove credits usage invoices"
        " invoices/text batches batches/{batch_id} batches/cancel jobs jobs/show jobs/cancel jobs/logs jobs/artifact"
        " jobs/artifacts queues queues/remove reservations reservations/cancel fleet fleet/why fleet/drain"
        " fleet/undrain models models/roll prices margin meter/reconcile meter/reconcile/text"
        " ledger/check status".split()
    }
    assert len({each["operationId"] for _, _, each in operations}) == len(operations)
    for path, method, each in operations:
        assert each["description"] and each["security"] == [{"admin_token": []}], path
        assert {"400", "401", "404", "503"} <= each["responses"].keys()
        assert ("requestBody" in each) == (method == "post")
        for status, response in each["responses"].items():
            [(kind, content)] = response["content"].items()
            if status >= "400":
                assert (kind, content["schema"]["$ref"]) == ("application/json", "#/components/schemas/ErrorAnswer")


def test_request_bodies_allow_no_other_fields(client: TestClient[Any]) -> None:
    schemas = client.get("/api/openapi.json").json()["components"]["schemas"]
    assert all(schema["additionalProperties"] is False for name, schema in schemas.items() if name.endswith("Request"))
