"""Usage, invoices, margin: what they say adds up to the records."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.control.conftest import Api
from tests.control.world import LONG_AGO, OCTOBER, FakeModel, FakePlatform, record
from tests.support.examples import examples
from tests.support.prices import token_price
from tidemill.ledger.devices import DeviceMeter, DeviceTier
from tidemill.ledger.money import Nanos, format_amount, parse_amount
from tidemill.ledger.period import parse_period
from tidemill.ledger.usage import RequestStatus, TokenUsage
from tidemill.store.device_meters import MeterReading, MeterStart, begin_meters, read_meters
from tidemill.store.device_prices import current_device_prices, set_device_price

in_a_world = examples(0.3)
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
    st.tuples(
        st.sampled_from(["mock", "big"]), usages, finishes | st.just(OCTOBER), st.sampled_from(list(RequestStatus))
    ),
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
    platform.settled = [record(platform, "req_1", tenant["id"], currency="CNY", status=RequestStatus.CLIENT_CLOSED)]
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


def test_device_time_and_requests_add_up_on_one_invoice(api: Api, platform: FakePlatform) -> None:
    """To the nano: lines, subtotal, statement, its records, balance. A draft until all device time is charged."""
    tenant = api.post("/tenants", name="acme", currency="CNY")
    api.post("/credits", tenant="acme", amount="100")
    platform.settled = [record(platform, "req_1", tenant["id"], currency="CNY")]
    end = parse_period("2026-10", "Asia/Shanghai").end
    meters: list[DeviceMeter] = []
    with platform.store.write() as connection:
        for tier, hour in ((DeviceTier.STANDARD, "7.123456789"), (DeviceTier.PREEMPTIBLE, "0.000000001")):
            now, price = LONG_AGO, Nanos(parse_amount(hour))
            set_device_price(connection, kind="cpu", currency="CNY", tier=tier, hour=price, now=now)
            found = current_device_prices(connection, OCTOBER)[("cpu", "CNY", tier)]
            wish = MeterStart(price=found, tier=tier, devices=3, hold_s=30, job_id="job_1", attempt=1)
            meters += begin_meters(
                connection,
                tenant_id=tenant["id"],
                currency="CNY",
                starts=[wish],
                now=end - timedelta(seconds=1234, microseconds=567),
            )

    def read_to(instant: datetime) -> None:
        with platform.store.write() as connection:
            wishes = [MeterReading(meter_id=each.meter_id, until=instant, hold_s=30) for each in meters]
            read_meters(connection, tenant["id"], wishes, zone="Asia/Shanghai")

    for seconds in (1234, 777.7, 3.3):
        read_to(end - timedelta(seconds=seconds))
        assert api.get("/invoices", tenant="acme", month="2026-10")["status"] == "draft"
        text = api.client.get("/api/v1/invoices/text", params={"tenant": "acme", "month": "2026-10"}).text
        assert "still being counted" in text.replace("\n", " ")
    read_to(end + timedelta(seconds=99.9))
    for month in ("2026-10", "2026-11"):
        invoice = api.get("/invoices", tenant="acme", month=month)
        statement = api.get("/usage", tenant="acme", month=month, records="true")
        lines = money(invoice["lines"], "amount") + money(invoice["device_lines"], "amount")
        assert parse_amount(invoice["subtotal"]) == lines == parse_amount(statement["charge"])
        assert money(statement["devices"], "charge") == money(statement["device_records"], "charge")
        assert money(statement["devices"], "charge") == money(invoice["device_lines"], "amount") > 0
        assert money(statement["records"], "charge") == money(invoice["lines"], "amount")
        books = {name: parse_amount(value) for name, value in invoice["balance"].items()}
        assert books["opening"] + books["granted"] - books["used"] == books["closing"]
        if month == "2026-10":
            assert invoice["status"] == "final"
            assert [line["device_seconds"] for line in invoice["device_lines"]] == ["3702.001701"] * 2
            closing = books["closing"]
        else:
            assert books["opening"] == closing


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


def test_what_an_upstream_bills_is_in_the_margin(api: Api, platform: FakePlatform) -> None:
    bought = token_price(*map(parse_amount, ("2", "0.5", "8")))
    platform.running = [FakeModel("mock", token_cost=bought), FakeModel("big", token_cost=bought)]
    acme, other = (api.post("/tenants", name=name)["id"] for name in ("acme", "other"))
    platform.settled = [
        record(platform, "req_1", acme, usage=TokenUsage(3_000_000, 1_000_000, 500_000)),
        record(platform, "req_2", other, usage=TokenUsage(1_000_000, 0, 0)),
        # asked for the one model, answered by the other
        msgspec.structs.replace(record(platform, "req_3", acme, usage=TokenUsage(1, 0, 0)), replica="big/0#x"),
    ]
    found = api.get("/margin", month="2026-10")
    big, mock = found["models"]
    assert {line["tenant"]: line["upstream_cost"] for line in mock["tenants"]} == {"acme": "8.50", "other": "2.00"}
    assert (mock["upstream_cost"], mock["cost"]) == ("10.50", "10.50")
    assert (big["upstream_cost"], big["revenue"], found["upstream_cost"]) == ("0.000002", "0.00", "10.500002")
    for part in (found, big, mock, *mock["tenants"]):
        costs = money([part], "busy_cost") + money([part], "idle_cost") + money([part], "upstream_cost")
        assert money([part], "gross_margin") == money([part], "revenue") - costs
        assert money([part], "cost") == costs
    [contribution] = [line["contribution"] for line in mock["tenants"] if line["tenant"] == "other"]
    assert contribution == "2.00"


def test_the_margin_of_now_counts_from_the_first_price(api: Api, platform: FakePlatform) -> None:
    platform.running = [FakeModel("mock", cost_per_hour=Nanos(3_600_000_000_000))]
    found = api.get("/margin")
    assert parse_amount(found["cost"]) > 0 and found["revenue"] == "0.00" and found["ratio"] is None
    assert api.refused(400, "GET", "/margin", params={"month": "2999-01"})["param"] == "month"
