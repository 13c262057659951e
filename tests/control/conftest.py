from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient

from tests.control.world import TOKEN, FakePlatform, app_of, open_world


class Api:
    """The admin API, asked as an operator's program asks it."""

    def __init__(self, client: TestClient[Any]) -> None:
        self.client = client

    def get(self, path: str, **query: str | int) -> Any:
        answer = self.client.get("/api/v1" + path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, **body: Any) -> Any:
        answer = self.client.post("/api/v1" + path, json=body)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def refused(self, status: int, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The error that is answered, whose status must be `status`."""
        answer = self.client.request(method, "/api/v1" + path, **request)
        assert answer.status_code == status, answer.text
        assert list(answer.json()) == ["error"]
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"code", "message", "hint", "param"}
        assert error["message"].endswith("."), error["message"]
        return error


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[FakePlatform]:
    world = open_world(tmp_path)
    yield world
    world.store.close()


@pytest.fixture
def client(platform: FakePlatform) -> Iterator[TestClient[Any]]:
    with TestClient(app_of(platform), raise_server_exceptions=False) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        yield client


@pytest.fixture
def api(client: TestClient[Any]) -> Api:
    return Api(client)
