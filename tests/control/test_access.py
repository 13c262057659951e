"""Who is let in, and how errors look."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.testing import TestClient

from tests.control.conftest import Api
from tests.control.world import TOKEN, FakePlatform
from tests.support.examples import examples
from tidemill.errors import Unavailable


def paths(client: TestClient[Any]) -> list[tuple[str, str]]:
    document = client.get("/api/openapi.json").json()
    return [(method.upper(), path) for path, item in document["paths"].items() for method in item]


def test_nothing_under_api_v1_is_open(client: TestClient[Any]) -> None:
    operations = paths(client)
    assert len(operations) > 10
    del client.headers["authorization"]
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        "Bearer \xe9",
    ):
        headers = {} if wrong is None else {b"authorization": wrong.encode("latin-1")}
        for method, path in operations:
            answer = client.request(method, path, content=b"{not json", headers=headers)
            assert answer.status_code == 401, (wrong, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "admin-token" in answer.json()["error"]["hint"]


@pytest.mark.parametrize("header", [f"bearer {TOKEN}", f"Bearer   {TOKEN} "])
def test_the_scheme_is_read_leniently(client: TestClient[Any], header: str) -> None:
    assert client.get("/api/v1/status", headers={"authorization": header}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/api/openapi.json"])
def test_what_is_open(client: TestClient[Any], path: str) -> None:
    del client.headers["authorization"]
    assert client.get(path).status_code == 200


def test_the_index_says_where_to_go(client: TestClient[Any]) -> None:
    assert client.get("/").text.count("\n") == 1
    assert "/api/openapi.json" in client.get("/").text


def test_unknown_paths_and_methods(api: Api) -> None:
    assert api.refused(404, "GET", "/nothing")["code"] == "not_found"
    assert api.refused(405, "DELETE", "/tenants")["code"] == "method_not_allowed"


def test_a_misspelt_query_parameter_is_refused(api: Api) -> None:
    error = api.refused(400, "GET", "/usage", params={"tenant": "acme", "mnth": "2026-11"})
    assert error["param"] == "mnth" and error["hint"] == "Did you mean month?"


def test_a_query_parameter_given_twice_is_refused(api: Api) -> None:
    assert api.refused(400, "GET", "/usage?tenant=a&tenant=b")["param"] == "tenant"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b"\xff", None),
        (b'{"name": ' + b"[" * 50_000, None),
        (b"{}", "name"),
        (b'{"name": 5}', "name"),
        (b'{"name": "a", "nmae": "b"}', "nmae"),
        (b'{"name": ""}', "name"),
        (b'{"name": "a\\nb"}', "name"),
        (b'{"name": "a", "currency": "dollar"}', "currency"),
    ],
)
def test_a_bad_body_names_the_field(api: Api, body: bytes, param: str | None) -> None:
    error = api.refused(400, "POST", "/tenants", content=body)
    assert error["code"] == "invalid_request"
    assert error["param"] == param


def test_a_large_body_is_refused(api: Api) -> None:
    assert api.refused(413, "POST", "/tenants", content=b" " * (1 << 20) + b"{}")["code"] == "too_large"


def test_what_does_not_answer_is_503(api: Api, platform: FakePlatform) -> None:
    platform.failure = Unavailable("The database does not answer.", hint="Try again.")
    assert api.refused(503, "GET", "/tenants")["code"] == "unavailable"


def test_a_bug_is_logged_and_tells_nothing(
    api: Api, platform: FakePlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.failure = RuntimeError("secret detail")
    error = api.refused(500, "GET", "/tenants")
    assert error["code"] == "internal_error"
    assert "secret" not in json.dumps(error)
    assert "secret detail" in capsys.readouterr().out


@examples(1.5)
@given(data=st.data())
def test_nothing_that_is_sent_makes_it_fail(api: Api, data: st.DataObject) -> None:
    """Whatever the values: an answer, or an error that says what is wrong; never a 500."""
    operations = api.client.get("/api/openapi.json").json()
    path, item = data.draw(st.sampled_from(sorted(operations["paths"].items())))
    method, operation = data.draw(st.sampled_from(sorted(item.items())))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(["2026-10", "acme", "1"])
    query = {
        parameter["name"]: data.draw(text)
        for parameter in operation.get("parameters", [])
        if parameter["required"] or data.draw(st.booleans())
    }
    body = None
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        fields = operations["components"]["schemas"][schema]["properties"]
        value = (
            text
            | st.integers()
            | st.none()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.lists(text, max_size=2)
        )
        body = {name: data.draw(value) for name in fields if data.draw(st.integers(0, 9))}
    answer = api.client.request(method.upper(), path, params=query, json=body)
    assert answer.status_code < 500, answer.text
    assert answer.status_code < 300 or answer.json()["error"]["message"]
