"""Usage, invoices, margin: what they say adds up to the records."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidemill.ledger.money import Nanos, format_amount, parse_amount
from tidemill.ledger.usage import Status, TokenUsage

from .conftest import Api
from .world import OCTOBER, FakeModel, FakePlatform, record

in_a_world = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = count()
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


def total(rows: list[dict[str, Any]], field: str) -> int:
    return sum(int(row[field]) for row in rows)


def money(rows: list[dict[str, Any]], field: str) -> int:
    return sum(parse_amount(row[field]) for row in rows)


usages = st.builds(
    lambda prompt, cached, completion: TokenUsage(prompt, min(prompt, cached), completion),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
# Around Shanghai's midnights of 1 October and 1 November 2026.
finishes = st.datetimes(datetime(2026, 9, 30, 15), datetime(2026, 10, 31, 17)).map(lambda at: at.replace(tzinfo=UTC))
requests = st.lists(
    st.tuples(st.sampled_from(["mock", "big"]), usages, finishes | st.just(OCTOBER), st.sampled_from(list(Status))),
    max_size=12,
)


@in_a_world
@given(requests, st.integers(1, 5))
def test_sums_records_and_invoice_agree(api: Api, platform: FakePlatform, asked: list[Any], limit: int) -> None:
    tenant = api.post("/tenants", name=f"tenant {next(numbers)}")
    api.post("/credits", tenant=tenant["id"], amount="1000")
    platform.settled = [
        record(platform, f"req_{next(numbers):08}", tenant["id"], model=model, usage=usage, at=at, status=status)
        for model, usage, at, status in asked
    ]
    expected = list(platform.settled)
    for month in (None, "2026-09", "2026-10", "2026-11"):
        query: dict[str, Any] = {"tenant": tenant["name"]} | ({} if month is None else {"month": month})
        plain = api.get("/usage", **query)
        assert "records" not in plain and "next" not in plain
        rows, after, pages = [], None, 0
        while after or not pages:
            page = api.get("/usage", **query, records="true", limit=limit, **({"after": after} if after else {}))
            assert {k: v for k, v in page.items() if k not in ("records", "next")} == plain
            assert len(page["records"]) <= limit
            rows += page["records"]
            after, pages = page.get("next"), pages + 1
        assert plain["month"] == month and plain["requests"] == len(rows)
        assert rows == sorted(rows, key=lambda row: (datetime.fromisoformat(row["finished_at"]), row["request_id"]))
        for field in COUNTS[1:]:
            assert plain[field] == total(rows, field)
        assert parse_amount(plain["charge"]) == money(rows, "charge")
        for row in rows:
            assert parse_amount(row["charge"]) == sum(
                parse_amount(row[f"charge_{kind}"]) for kind in ("input", "cached", "output")
            )
        models = list(plain["models"].values())
        assert [total(models, field) for field in COUNTS] == [plain[field] for field in COUNTS]
        if month is not None:
            invoice = api.get("/invoices", tenant=tenant["name"], month=month)
            assert invoice["requests"] == plain["requests"]
            assert parse_amount(invoice["subtotal"]) == money(invoice["lines"], "amount") == money(rows, "charge")
            books = {name: parse_amount(value) for name, value in invoice["balance"].items()}
            assert books["opening"] + books["granted"] - books["used"] == books["closing"]
    whole = api.get("/usage", tenant=tenant["name"])
    assert whole["requests"] == len(expected)
    spent = sum(each.charge for each in expected)
    assert whole["charge"] == format_amount(spent)
    assert whole["balance"] == format_amount(parse_amount("1000") - spent)


def test_the_statement_has_the_keys_that_were_promised(api: Api, platform: FakePlatform) -> None:
    tenant = api.post("/tenants", name="acme", currency="CNY")
    api.post("/credits", tenant="acme", amount="100")
    platform.settled = [record(platform, "req_1", tenant["id"], currency="CNY", status=Status.CLIENT_CLOSED)]
    found = api.get("/usage", tenant="acme", month="2026-10", records="true")
    assert {name: found[name] for name in (*COUNTS, "charge", "balance", "currency", "month", "tenant", "zone")} == {
        "requests": 1,
        "prompt_tokens": 1000,
        "cached_tokens": 200,
        "completion_tokens": 300,
        "charge": "0.059997037",
        "balance": "99.940002963",
        "currency": "CNY",
        "month": "2026-10",
        "tenant": "acme",
        "zone": "Asia/Shanghai",
    }
    assert found["models"] == {"mock": {name: found[name] for name in (*COUNTS, "charge")}}
    [row] = found["records"]
    assert (row["request_id"], row["status"], row["estimated"]) == ("req_1", "client_closed", True)
    assert row["finished_at"] == "2026-10-15T12:00:00+00:00"
    assert api.get("/usage", tenant="acme", month="2026-09")["requests"] == 0


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"month": "2026-13"}, "month"),
        ({"month": "11-2026"}, "month"),
        ({"month": ""}, "month"),
        ({"records": "maybe"}, "records"),
        ({"records": "true", "limit": "0"}, "limit"),
        ({"records": "true", "limit": "10001"}, "limit"),
        ({"records": "true", "limit": "x"}, "limit"),
        ({"records": "true", "after": "nonsense"}, "after"),
        ({"records": "true", "after": "12."}, "after"),
        ({"records": "true", "after": "９.req"}, "after"),
    ],
)
def test_bad_questions_are_answered_with_the_field(api: Api, query: dict[str, str], param: str) -> None:
    api.post("/tenants", name="acme")
    assert api.refused(400, "GET", "/usage", params={"tenant": "acme", **query})["param"] == param


def test_a_month_that_has_not_begun_has_no_invoice(api: Api) -> None:
    api.post("/tenants", name="acme")
    error = api.refused(400, "GET", "/invoices", params={"tenant": "acme", "month": "2998-01"})
    assert error["message"] == "month: January 2998 has not begun yet."


def test_the_invoice_as_text(api: Api, platform: FakePlatform) -> None:
    tenant = api.post("/tenants", name="华东/智算")
    platform.settled = [record(platform, "req_1", tenant["id"])]
    page = api.client.get("/api/v1/invoices/text", params={"tenant": "华东/智算", "month": "2026-10"})
    assert page.headers["content-type"].startswith("text/plain")
    assert page.text.startswith("INVOICE") and "Tide Cloud" in page.text and "华东/智算" in page.text
    assert "0.0082" in page.text, "800 x 4 + 200 x 1 + 300 x 16 per million"


def test_margin(api: Api, platform: FakePlatform) -> None:
    platform.running = [FakeModel("mock", replicas_total=2, cost_per_hour=parse_amount("0.5")), FakeModel("idle")]
    acme = api.post("/tenants", name="acme")
    chinese = api.post("/tenants", name="北京", currency="CNY")
    hour = 3_600_000_000_000
    platform.settled = [
        record(platform, "req_1", acme["id"], usage=TokenUsage(0, 0, 10_000_000), device_ns=3 * hour),
        record(platform, "req_2", chinese["id"], currency="CNY", usage=TokenUsage(1_000_000, 0, 0), device_ns=hour),
        record(platform, "req_3", acme["id"], at=OCTOBER - timedelta(days=40)),
        record(platform, "req_4", acme["id"], model="big", device_ns=hour),
    ]
    found = api.get("/margin", month="2026-10")
    assert found["currency"] == "USD" and found["other_currencies"] == {"CNY": "30.00"}
    big, idle, mock = found["models"]
    assert (big["model"], big["cost"], big["replicas"]) == ("big", "0.00", 0), "it runs no more: its cost is not known"
    assert (idle["cost"], idle["ratio"], idle["tenants"]) == ("0.00", None, [])
    assert mock["revenue"] == "160.00"
    assert mock["cost"] == "744.00", "2 replicas x 31 days x 24 hours x 0.5"
    assert mock["busy_cost"] == "2.00" and mock["fill"] == round(4 / (2 * 31 * 24), 4)
    assert mock["gross_margin"] == "-584.00" and mock["since"] == "2026-09-30T16:00:00+00:00"
    assert {line["tenant"]: line["cost"] for line in mock["tenants"]} == {"acme": "558.00", "北京": "186.00"}
    revenue = parse_amount(found["revenue"])
    assert revenue == money(found["models"], "revenue")
    assert parse_amount(found["gross_margin"]) == revenue - parse_amount("744")


def test_the_margin_of_now_counts_from_the_first_price(api: Api, platform: FakePlatform) -> None:
    platform.running = [FakeModel("mock", cost_per_hour=Nanos(3_600_000_000_000))]
    found = api.get("/margin")
    assert parse_amount(found["cost"]) > 0 and found["revenue"] == "0.00" and found["ratio"] is None
    assert api.refused(400, "GET", "/margin", params={"month": "2999-01"})["param"] == "month"
