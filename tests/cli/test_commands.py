"""The commands, on a running platform: what they print for programs and for people."""

from typing import Any

import pytest

from tests.cli.conftest import Run, Up
from tests.control.world import OCTOBER, FakeModel, record
from tests.support.prices import token_price
from tidemill.cli import client
from tidemill.ledger.money import parse_amount
from tidemill.ledger.usage import TokenUsage


def test_the_main_road(run: Run, up: Up) -> None:
    at = ("--data", up.data)
    tenant = run("tenant", "create", "acme", "--currency", "CNY", "--json", *at).json
    key = run("key", "create", "--tenant", "acme", "--json", *at).json
    granted = run("credit", "grant", "--tenant", "acme", "--amount", "100", "--json", *at).json
    assert tenant["currency"] == "CNY" and key["key"].startswith("sk-") and granted["balance"] == "100.00"
    up.platform.settled = [record(up.platform, "req_1", tenant["id"], currency="CNY")]
    usage = run("usage", "--tenant", "acme", "--json", *at).json
    expected = {
        "requests": 1,
        "prompt_tokens": 1000,
        "cached_tokens": 200,
        "completion_tokens": 300,
        "charge": "0.059997037",
        "balance": "99.940002963",
        "currency": "CNY",
    }
    assert expected.items() <= usage.items() and "records" not in usage
    [row] = run("usage", "--tenant", "acme", "--month", "2026-10", "--records", "--json", *at).json["records"]
    assert row["request_id"] == "req_1" and row["charge"] == expected["charge"] and row["finished_at"]
    invoice = run("invoice", "--tenant", "acme", "--month", "2026-10", "--json", *at).json
    assert sum(parse_amount(line["amount"]) for line in invoice["lines"]) == parse_amount("0.059997037")
    assert run("invoice", "--tenant", "acme", "--month", "2026-10", *at).out.startswith("INVOICE  TM-2026-10-")
    assert run("tenant", "list", "--json", *at).json["tenants"][0]["balance"] == "99.940002963"
    assert run("key", "revoke", key["key"], "--json", *at).json["revoked_at"]
    assert run("key", "list", "--tenant", "acme", "--json", *at).json["keys"][0]["revoked_at"]
    assert [model["name"] for model in run("model", "list", "--json", *at).json["models"]] == ["big", "mock"]
    assert run("meter", "reconcile", "--json", *at).json["unchecked"] == ["mock/0"]


def test_what_people_see(run: Run, up: Up) -> None:
    at = ("--data", up.data)
    up.platform.running = [FakeModel("mock"), FakeModel("free", state="starting", replicas_ready=0)]
    made = run("tenant", "create", "[red]华东[/red]", *at)
    assert made.out.startswith("Created tenant [red]华东[/red] (ten_") and made.err == ""
    assert "no model has a price in eur" in run("tenant", "create", "b", "--currency", "EUR", *at).err.lower()
    key = run("key", "create", "--tenant", "b", *at)
    assert key.out.startswith("sk-") and key.out.count("\n") == 1, "so that $(tidemill key create ...) is the key"
    assert "will not be shown again" in key.err
    said = run("credit", "grant", "--tenant", "[red]华东[/red]", "--amount", "1234567.5", *at).out
    assert said.startswith("1,234,567.50 USD is granted to [red]华东[/red]") and "1,234,567.50 USD." in said
    tenants = run("tenant", "list", *at).out
    assert "[red]华东[/red]" in tenants and "1,234,567.50" in tenants
    found = run("tenant", "list", "--json", *at).json["tenants"]
    up.platform.settled = [
        record(up.platform, f"req_{n}", found[0]["id"], usage=TokenUsage(1_000_000, 0, 1)) for n in range(3)
    ]
    page = run("usage", "--tenant", "[red]华东[/red]", "--records", *at).out.splitlines()
    assert page[0] == "Usage of [red]华东[/red], all time"
    [total] = [line for line in page if line.startswith("Total")]
    assert total.split() == ["Total", "3", "3,000,000", "0", "3", "12.000048"]
    assert "Balance: 1,234,555.499952 USD" in page
    assert [line.split()[:3] for line in page if line.startswith("req_")] == [
        [f"req_{n}", "mock", "ok"] for n in range(3)
    ]
    assert "2026-10, Asia/Shanghai" in run("usage", "--tenant", "b", "--month", "2026-10", *at).out
    models = run("model", "list", *at).out
    assert "no price" in models and "starting" in models and "115.123456789" in models
    assert run("meter", "reconcile", *at).out == "mock/0: has no token counters to compare\n"
    assert "sk-tm-..." in run("key", "list", *at).out
    assert run("key", "revoke", run("key", "list", "--json", *at).json["keys"][0]["id"], *at).out.startswith("Key sk-")


def test_the_margin_shows_what_upstreams_bill_where_they_do(run: Run, up: Up) -> None:
    at = ("--data", up.data)
    tenant = run("tenant", "create", "acme", "--json", *at).json["id"]
    up.platform.settled = [record(up.platform, "req_1", tenant, usage=TokenUsage(1_000_000, 0, 0))]
    assert "Cost, upstream" not in run("margin", "--month", "2026-10", *at).out
    up.platform.running = [FakeModel("mock", token_cost=token_price(*map(parse_amount, ("3", "1", "8"))))]
    page = run("margin", "--month", "2026-10", *at).out
    [line] = [line for line in page.splitlines() if line.startswith("all models")]
    assert "Cost, upstream" in page and line.split()[2:] == ["4.00", "0.00", "0.00", "3.00", "1.00", "25.0%"]


def test_an_invoice_is_of_the_current_month_when_none_is_named(run: Run, up: Up) -> None:
    at = ("--data", up.data)
    run("tenant", "create", "acme", *at)
    month = run("margin", "--json", *at).json["month"]
    found = run("invoice", "--tenant", "acme", "--json", *at).json
    assert found["status"] == "draft" and f"-{month}-" in found["number"]
    assert "DRAFT" in run("invoice", "--tenant", "acme", *at).out.upper()


def test_a_table_in_a_pipe_is_not_cut(run: Run, up: Up) -> None:
    name = "x" * 128
    run("tenant", "create", name, "--data", up.data)
    assert any(line.startswith(name + " ") for line in run("tenant", "list", "--data", up.data).out.splitlines())


def test_a_grant_with_a_key_is_made_once(run: Run, up: Up) -> None:
    at = ("--data", up.data, "--idempotency-key", "order 1")
    run("tenant", "create", "acme", "--data", up.data)
    assert " is granted " in run("credit", "grant", "--tenant", "acme", "--amount", "5", *at).out
    again = run("credit", "grant", "--tenant", "acme", "--amount", "5", *at).out
    assert " was granted before " in again and "Balance: 5.00 USD" in again


def test_records_of_many_pages(run: Run, up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAGE", 3)
    tenant = run("tenant", "create", "acme", "--json", "--data", up.data).json
    up.platform.settled = [record(up.platform, f"req_{n:02}", tenant["id"]) for n in range(10)]
    found = run("usage", "--tenant", "acme", "--records", "--json", "--data", up.data).json
    assert [row["request_id"] for row in found["records"]] == [f"req_{n:02}" for n in range(10)]
    assert found["requests"] == 10 and "next" not in found
    assert len([line for line in up.requests if "/usage" in line]) == 4


def test_records_that_come_late_are_not_missed(run: Run, up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that belongs on a page that was read already: the whole is read again."""
    monkeypatch.setattr(client, "PAGE", 2)
    tenant = run("tenant", "create", "acme", "--json", "--data", up.data).json
    up.platform.settled = [record(up.platform, f"req_{n}", tenant["id"]) for n in range(1, 4)]
    late = [record(up.platform, "req_0", tenant["id"])]
    pages: list[Any] = []
    original = client.AdminClient._json

    def between(self: client.AdminClient, method: str, path: str, *arguments: Any, **named: Any) -> Any:
        pages.append(path)
        if len(pages) == 2:
            up.platform.settled = late
        return original(self, method, path, *arguments, **named)

    monkeypatch.setattr(client.AdminClient, "_json", between)
    found = run("usage", "--tenant", "acme", "--records", "--json", "--data", up.data).json
    assert [row["request_id"] for row in found["records"]] == ["req_0", "req_1", "req_2", "req_3"]
    assert found["requests"] == 4 and len(pages) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["usage", "--tenant", "acmee"], "There is no tenant 'acmee'. Did you mean 'acme'?"),
        (["tenant", "create", "acme"], "There is already a tenant named 'acme'. Choose another name."),
        (["tenant", "create", ""], "'' is not a valid tenant name; use 1 to 128 printable characters."),
        (["credit", "grant", "--tenant", "acme", "--amount", "-5"], "amount must be more than zero."),
        (["credit", "grant", "--tenant", "acme", "--amount", "1e3"], "'1e3' is not an amount"),
        (["usage", "--tenant", "acme", "--month", "2026/10"], "write 2026-10."),
        (["key", "revoke", "sk-wrong"], "There is no such key."),
        (["invoice", "--tenant", "acme", "--month", "2998-01"], "month: January 2998 has not begun yet."),
    ],
)
def test_what_cannot_be_done_is_one_line(run: Run, up: Up, arguments: list[str], said: str) -> None:
    run("tenant", "create", "acme", "--data", up.data)
    for flags in ([], ["--json"]):
        outcome = run(*arguments, *flags, "--data", up.data)
        assert outcome.code == 1 and said in outcome.complaint


def test_the_month_is_the_operators(run: Run, up: Up) -> None:
    tenant = run("tenant", "create", "acme", "--json", "--data", up.data).json
    up.platform.settled = [record(up.platform, "req_1", tenant["id"], at=OCTOBER.replace(day=31, hour=17))]
    november = run("usage", "--tenant", "acme", "--month", "2026-11", "--json", "--data", up.data).json
    assert november["requests"] == 1, "17:00 UTC on 31 October is 1 November in Shanghai"
