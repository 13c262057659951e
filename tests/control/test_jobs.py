"""Jobs, queues and reservations through the admin API: what is asked for is checked and kept, nothing is run."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.control.conftest import Api
from tests.control.world import LONG_AGO, FakePlatform
from tidemill.ledger.devices import DeviceTier
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.store.device_prices import set_device_price


@pytest.fixture(autouse=True)
def priced(platform: FakePlatform, api: Api) -> None:
    with platform.store.write() as connection:
        for kind, currency, tier in (
            ("cpu", "USD", DeviceTier.STANDARD),
            ("cpu", "USD", DeviceTier.PREEMPTIBLE),
            ("h800-sxm", "USD", DeviceTier.STANDARD),
        ):
            hour = Nanos(parse_amount("2.5"))
            set_device_price(connection, kind=kind, currency=currency, tier=tier, hour=hour, now=LONG_AGO)
    api.post("/tenants", name="acme")
    api.post("/tenants", name="other")


def submitted(api: Api, **wish: Any) -> Any:
    return api.post("/jobs", **{"tenant": "acme", "command": ["python", "train.py"], **wish})


def test_a_job_and_what_is_said_of_it(api: Api, platform: FakePlatform) -> None:
    made = submitted(
        api, devices=8, deadline="6h", grace="90s", estimate="2h", checkpoint_signal="sigusr1", env={"A": "1"}
    )
    assert made["state"] == "queued" and made["name"] == "python" and made["queue"] == "acme"
    assert (made["grace_seconds"], made["estimate_seconds"], made["checkpoint_signal"]) == (90, 7200, "USR1")
    assert made["ranks"] == "node" and made["preemptible"] is True
    assert datetime.fromisoformat(made["deadline_at"]) - datetime.now(UTC) > timedelta(hours=5)
    assert platform.woken == 1
    whole = api.get("/jobs/show", job=made["id"])
    assert whole["env"] == ["A"] and whole["history"] == [] and whole["charge"] == "0.00"
    assert api.get("/jobs/show", job="python")["id"] == made["id"]
    assert [job["id"] for job in api.get("/jobs", tenant="acme", unfinished="true")["jobs"]] == [made["id"]]
    assert api.get("/jobs", tenant="other")["jobs"] == []
    assert api.get("/jobs/artifacts", job=made["id"])["artifacts"] == []
    cancelled = api.post("/jobs/cancel", job=made["id"])
    assert cancelled["state"] == "cancelled" and platform.woken == 2
    assert api.post("/jobs/cancel", job=made["id"])["state"] == "cancelled"
    assert api.get("/jobs", status="queued")["jobs"] == []


def test_pages(api: Api) -> None:
    ids = [submitted(api, name=f"j{number}")["id"] for number in range(3)]
    page = api.get("/jobs", limit=2)
    assert [job["id"] for job in page["jobs"]] == ids[:0:-1] and page["next"] == ids[1]
    rest = api.get("/jobs", limit=2, after=page["next"])
    assert [job["id"] for job in rest["jobs"]] == ids[:1] and rest["next"] is None


@pytest.mark.parametrize(
    ("wish", "param", "says"),
    [
        ({"command": []}, "command", "There is no command"),
        ({"command": ["x"] * 1001}, "command", "at most 1000 words"),
        ({"command": ["a\0b"]}, "command", "NUL"),
        ({"devices": 0}, "devices", "from 1 to"),
        ({"kinds": ["h80"]}, "kind", "has no price in USD"),
        ({"kinds": ["h800-sxm"]}, "kind", "has no price in USD"),  # not as preemptible
        ({"queue": "acmee"}, "queue", "no queue 'acmee' for acme"),
        ({"ranks": "core"}, "ranks", "must be node or device"),
        ({"priority": 101}, "priority", "from -100 to 100"),
        ({"retries": -1}, "retries", "from 0 to 100"),
        ({"grace": "1h"}, "grace", "from 0 to 600 seconds"),
        ({"grace": "soon"}, "grace", "is not a duration"),
        ({"deadline": "2020-01-01"}, "deadline", "is in the past"),
        ({"estimate": "0"}, "estimate", "more than zero"),
        ({"checkpoint_signal": "KILL"}, "checkpoint_signal", "is not supported"),
        ({"env": {"TIDEMILL_RANK": "1"}}, "env", "is not allowed"),
        ({"env": {"A B": "1"}}, "env", "is not allowed"),
        ({"workdir": "here"}, "workdir", "absolute path"),
        ({"reservation": "res_1"}, "reservation", "no reservation"),
        ({"comand": ["x"]}, "comand", "not a known field"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_by_its_field(api: Api, wish: Any, param: str, says: str) -> None:
    status = 404 if "no reservation" in says else 400
    error = api.refused(status, "POST", "/jobs", json={"tenant": "acme", "command": ["true"], **wish})
    assert error["param"] == param and says in error["message"], error


def test_what_else_can_be_wrong(api: Api) -> None:
    api.refused(404, "POST", "/jobs", json={"tenant": "acm", "command": ["true"]})
    for path in ("/jobs/show", "/jobs/logs", "/jobs/artifacts"):
        assert "no job" in api.refused(404, "GET", path, params={"job": "job_x"})["message"]
    job = submitted(api)["id"]
    api.refused(404, "GET", "/jobs/logs", params={"job": job})
    api.refused(404, "GET", "/jobs/artifact", params={"job": job, "path": "../site"})
    api.refused(400, "GET", "/jobs", params={"status": "runing"})
    api.refused(400, "GET", "/jobs", params={"limit": 0})
    for _ in range(4):
        submitted(api)
    assert "5 unfinished" in api.refused(429, "POST", "/jobs", json={"tenant": "acme", "command": ["true"]})["message"]


def test_a_log_and_an_artefact(api: Api, platform: FakePlatform) -> None:
    job = submitted(api)["id"]
    files = platform.job_files
    files.prepare(job, 1)
    files.log(job, 1, 0).write_bytes("é\xff".encode()[:2] + b"\xff\n")
    (files.artifacts_of(job) / "a b.txt").write_bytes(b"made")
    piece = api.get("/jobs/logs", job=job, attempt=1)
    assert piece["text"] == "é�\n" and not piece["ended"]
    assert api.get("/jobs/logs", job=job, attempt=1, cursor=piece["next"])["text"] == ""
    answer = api.client.get("/api/v1/jobs/artifact", params={"job": job, "path": "a b.txt"})
    assert answer.content == b"made" and answer.headers["x-artifact-bytes"] == "4"


def test_queues(api: Api) -> None:
    made = api.post("/queues", name="night", quota=4, borrow=2, weight=3)
    assert (made["tenant"], made["quota"], made["borrow"], made["weight"]) == (None, 4, 2, 3)
    own = api.post("/queues", name="acme", tenant="acme", quota=1)
    assert own["tenant"] == "acme" and own["borrow"] is None
    assert [each["name"] for each in api.get("/queues")["queues"]] == ["acme", "night"]
    assert submitted(api, queue="night")["queue"] == "night"
    assert api.post("/queues", name="night", quota=5)["quota"] == 5
    api.refused(409, "POST", "/queues/remove", json={"queue": "night"})
    api.refused(400, "POST", "/queues", json={"name": "other"})
    api.refused(409, "POST", "/queues", json={"name": "night", "tenant": "other"})
    api.refused(400, "POST", "/queues", json={"name": "x", "quota": -1})
    api.refused(400, "POST", "/queues", json={"name": "x", "weight": 0})
    api.refused(404, "POST", "/queues/remove", json={"queue": "nigt"})
    assert api.post("/queues/remove", queue="acme")["name"] == "acme"
    error = api.refused(400, "POST", "/jobs", json={"tenant": "other", "command": ["x"], "queue": "acme"})
    assert "night" in error["hint"]


def test_reservations(api: Api) -> None:
    made = api.post("/reservations", tenant="acme", kind="h800-sxm", devices=2, start="now", end="30d", lend=True)
    assert (made["state"], made["price_per_hour"], made["lend"]) == ("booked", "2.50", True)
    agreed = api.post("/reservations", tenant="acme", kind="910b", devices=2, start="1h", end="2h", price="9.99")
    assert agreed["price_per_hour"] == "9.99"
    starts, ends = (datetime.fromisoformat(agreed[name]) for name in ("starts_at", "ends_at"))
    assert ends - starts == timedelta(hours=2)
    assert len(api.get("/reservations", tenant="acme")["reservations"]) == 2
    assert api.get("/reservations", tenant="other")["reservations"] == []
    on_it = submitted(api, reservation=made["id"], devices=2)
    assert on_it["reservation"] == made["id"] and on_it["kinds"] == ["h800-sxm"]
    for wish, status in (({"devices": 3}, 400), ({"tenant": "other"}, 404)):
        json = {"tenant": "acme", "command": ["x"], "reservation": made["id"], **wish}
        error = api.refused(status, "POST", "/jobs", json=json)
    # A tenant may be asking: what is another's is not there.
    assert error["message"] == f"There is no reservation '{made['id']}' for other." and not error.get("hint")
    assert api.post("/reservations/cancel", reservation=made["id"])["state"] == "cancelled"
    api.refused(409, "POST", "/reservations/cancel", json={"reservation": made["id"]})
    assert len(api.get("/reservations", over="true")["reservations"]) == 2
    for wish, param in (
        ({"kind": "910b"}, "kind"),
        ({"devices": 0}, "devices"),
        ({"start": "2020-01-01"}, "from"),
        ({"end": "2020-01-01"}, "to"),
        ({"price": "-1"}, "price"),
        ({"price": "x"}, "price"),
    ):
        json = {"tenant": "acme", "kind": "cpu", "devices": 1, "start": "now", "end": "1h", **wish}
        assert api.refused(400, "POST", "/reservations", json=json)["param"] == param
