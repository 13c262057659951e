"""Limits, policies of keys and weights in the admin API."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.control.conftest import Api
from tests.control.world import FakePlatform, record
from tidemill.control.names import read_duration, read_expiry
from tidemill.errors import BadInput

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def acme(api: Api) -> Any:
    api.post("/tenants", name="acme")
    return api.post("/keys", tenant="acme", name="laptop")


def test_limits_are_set_listed_and_removed(api: Api, acme: Any, platform: FakePlatform) -> None:
    made = api.post(
        "/limits", tenant="acme", rpm=100, tpm=20_000, concurrency=4, budget="12.5", per="day", soft_percent=80
    )
    assert platform.announced == platform.revision()
    assert [each["text"] for each in made["limits"]] == [
        "100 requests per minute",
        "20,000 tokens per minute",
        "4 concurrent requests",
        "a budget of 12.50 USD per day",
    ]
    narrow = api.post("/limits", tenant="acme", key=acme["key"], model="big", rpm=7)["limits"][0]
    assert (narrow["key"], narrow["model"], narrow["amount"], narrow["used"]) == (acme["id"], "big", 7, 0)
    changed = api.post("/limits", tenant="acme", rpm=50)["limits"][0]
    assert changed["id"] == made["limits"][0]["id"] and changed["amount"] == 50
    listed = api.get("/limits", tenant="acme")["limits"]
    assert len(listed) == 5 and api.get("/limits")["limits"] == listed
    budget = next(each for each in listed if each["kind"] == "budget")
    assert (budget["budget"], budget["spent"], budget["leased"], budget["currency"]) == ("12.50", "0.00", "0.00", "USD")
    assert (budget["per"], budget["soft_percent"], budget["warned"]) == ("day", 80, False)
    assert budget["ends_at"] > datetime.now(UTC).isoformat() and len(budget["period"]) == len("2026-11-24")
    assert api.post("/limits/remove", limit=narrow["id"])["id"] == narrow["id"]
    assert narrow["id"] not in {each["id"] for each in api.get("/limits")["limits"]}


def test_a_budget_begins_with_what_was_spent(api: Api, acme: Any, platform: FakePlatform) -> None:
    tenant = api.get("/tenants", tenant="acme")["tenants"][0]["id"]
    platform.settled = [record(platform, f"req_{n}", tenant, at=datetime.now(UTC)) for n in range(3)]
    (budget,) = api.post("/limits", tenant="acme", budget="1", per="month")["limits"]
    assert budget["spent"] == api.get("/usage", tenant="acme")["charge"] != "0.00"
    (narrow,) = api.post("/limits", tenant="acme", model="big", budget="1")["limits"]
    assert (narrow["spent"], narrow["per"]) == ("0.00", "month")


@pytest.mark.parametrize(
    ("wish", "status", "param", "says"),
    [
        ({}, 400, None, "No limit was given."),
        ({"rpm": 0}, 400, "rpm", "rpm must be from 1 to 1,000,000,000,000, not 0."),
        ({"tpm": 10**13}, 400, "tpm", "tpm must be from 1 to"),
        ({"concurrency": -1}, 400, "concurrency", "concurrency must be from 1 to"),
        ({"budget": "0"}, 400, "budget", "budget must be more than zero."),
        ({"budget": "ten"}, 400, "budget", "budget: 'ten' is not an amount"),
        ({"budget": "1", "per": "mouth"}, 400, "per", "per: 'mouth' is not a budget period."),
        ({"budget": "1", "soft_percent": 101}, 400, "soft_percent", "soft_percent must be from 1 to 100, not 101."),
        ({"rpm": 1, "per": "day"}, 400, "per", "per is only allowed with budget"),
        ({"rpm": 1, "soft_percent": 5}, 400, "soft_percent", "soft_percent is only allowed with budget"),
        ({"rpm": 1, "model": "bigg"}, 400, "model", "There is no model 'bigg'."),
        ({"rpm": 1, "key": "key_nope"}, 404, "key", "acme has no such key."),
        ({"rpm": 1, "tenant": "acne"}, 404, "tenant", "There is no tenant 'acne'."),
        ({"rpn": 1}, 400, "rpn", "rpn is not a known field"),
    ],
)
def test_what_cannot_be_a_limit(
    api: Api, acme: Any, wish: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    error = api.refused(status, "POST", "/limits", json={"tenant": "acme", **wish})
    assert error["message"].startswith(says) and error["param"] == param
    assert api.get("/limits")["limits"] == []


def test_errors_name_the_nearest_right_name(api: Api, acme: Any) -> None:
    def hint(**wish: Any) -> str:
        return str(
            api.refused(wish.pop("status"), "POST", "/limits", json={"tenant": "acme", "rpm": 1, **wish})["hint"]
        )

    assert hint(status=400, model="bigg") == "Did you mean 'big'?"
    assert hint(status=400, model="zzzz") == "Known models: big, mock."
    assert hint(status=404, tenant="acne") == "Did you mean 'acme'?"
    assert hint(status=404, key=acme["id"][:-1]) == f"Did you mean '{acme['id']}'?"
    assert hint(status=400, budget="1", per="mont") == "Did you mean 'month'?"
    (made,) = api.post("/limits", tenant="acme", rpm=1)["limits"]
    error = api.refused(404, "POST", "/limits/remove", json={"limit": made["id"] + "x"})
    assert error["hint"] == f"Did you mean '{made['id']}'?"


def test_another_tenants_key_is_not_bound(api: Api, acme: Any) -> None:
    api.post("/tenants", name="other")
    error = api.refused(404, "POST", "/limits", json={"tenant": "other", "key": acme["id"], "rpm": 1})
    assert error["hint"] == "The key belongs to another tenant."
    secret = api.refused(404, "POST", "/limits", json={"tenant": "acme", "key": "sk-tm-secret", "rpm": 1})
    assert "secret" not in secret["message"] + secret["hint"]


def test_a_key_is_bound_when_it_is_made(api: Api, acme: Any) -> None:
    made = api.post(
        "/keys", tenant="acme", expires="90d", models=["big", "mock", "big"], ips=["10.1.0.0/16", "192.0.2.7"]
    )
    ends = datetime.fromisoformat(made["expires_at"])
    assert timedelta(days=89) < ends - datetime.now(UTC) < timedelta(days=91)
    assert (made["models"], made["ips"]) == (["big", "mock"], ["10.1.0.0/16", "192.0.2.7/32"])
    listed = {each["id"]: each for each in api.get("/keys")["keys"]}
    assert listed[made["id"]]["ips"] == made["ips"] and listed[acme["id"]]["models"] == []
    for body, param, says in (
        ({"expires": "soon"}, "expires", "expires: 'soon' is neither a duration nor a date."),
        ({"expires": "2020-01-01"}, "expires", "expires: 2020-01-01 is in the past."),
        ({"models": ["bik"]}, "model", "There is no model 'bik'."),
        ({"ips": ["10.1.2.3/16"]}, "ips", "ips: '10.1.2.3/16' is not a valid network."),
        ({"ips": ["10.1"] * 61}, "ips", "ips: at most 60 entries are allowed."),
    ):
        error = api.refused(400, "POST", "/keys", json={"tenant": "acme", **body})
        assert (error["message"], error["param"]) == (says, param)
    assert (
        api.refused(400, "POST", "/keys", json={"tenant": "acme", "ips": ["10.1.2.3/16"]})["hint"]
        == "Did you mean 10.1.0.0/16?"
    )


def test_a_key_is_rotated(api: Api, acme: Any, platform: FakePlatform) -> None:
    made = api.post("/keys/rotate", key=acme["key"], overlap="2h")
    assert platform.announced == platform.revision()
    assert made["key"].startswith("sk-tm-") and made["key"] != acme["key"]
    assert made["replaces"]["id"] == acme["id"] == made["first_id"]
    left = datetime.fromisoformat(made["replaces"]["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=1) < left <= timedelta(hours=2)
    assert api.refused(400, "POST", "/keys/rotate", json={"key": acme["key"], "overlap": "a day"})["param"] == "overlap"
    api.post("/keys/revoke", key=acme["key"])
    assert "was revoked" in api.refused(409, "POST", "/keys/rotate", json={"key": acme["key"]})["message"]
    assert api.refused(404, "POST", "/keys/rotate", json={"key": "sk-tm-unknown"})["code"] == "not_found"


def test_a_weight_is_given(api: Api, acme: Any) -> None:
    assert api.get("/tenants", tenant="acme")["tenants"][0]["weight"] == 1
    assert api.post("/tenants/weight", tenant="acme", weight=5)["weight"] == 5
    assert api.get("/tenants", tenant="acme")["tenants"][0]["weight"] == 5
    assert api.refused(400, "POST", "/tenants/weight", json={"tenant": "acme", "weight": 0})["param"] == "weight"


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("90d", NOW + timedelta(days=90)),
        (" 30 m ", NOW + timedelta(minutes=30)),
        ("2w", NOW + timedelta(weeks=2)),
        ("2026-11-30", datetime(2026, 11, 30, 16, tzinfo=UTC)),  # the end of that day in Shanghai
        ("2026-11-30T10:00:00Z", datetime(2026, 11, 30, 10, tzinfo=UTC)),
        ("2026-11-30T10:00", datetime(2026, 11, 30, 2, tzinfo=UTC)),
    ],
)
def test_when_a_key_ends(text: str, ends: datetime) -> None:
    assert read_expiry("expires", text, zone="Asia/Shanghai", now=NOW) == ends


@pytest.mark.parametrize(
    "text", ["", "d", "-1d", "1y", "999999w", "9999-12-31", "0001-01-01", "2026-11-24T11:00Z", "0s"]
)
def test_when_no_key_ends(text: str) -> None:
    with pytest.raises(BadInput):
        read_expiry("expires", text, zone="Asia/Shanghai", now=NOW)


def test_durations() -> None:
    assert read_duration("overlap", "0s") == timedelta(0)
    with pytest.raises(BadInput, match="Write 24h, 90d or 30m"):
        read_duration("overlap", "24 hours")
