import json
from datetime import datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ledger.values import NOVEMBER, PRICES, in_november, months, record, version
from tidemill.ledger.components import CACHED_INPUT, CATALOGUE, INPUT, OUTPUT, Component
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.invoice import (
    Invoice,
    InvoiceStatus,
    LineSum,
    MonthUsage,
    make_invoice,
    records_of,
    sum_month,
    to_json,
)
from tidemill.ledger.money import Nanos, minor_digits, parse_amount
from tidemill.ledger.posting import Transaction, credit_grant, usage_charge
from tidemill.ledger.statement import usage_statement
from tidemill.ledger.usage import TokenUsage, UsageRecord

CACHE_WRITE, REASONING = Component.CACHE_WRITE, Component.REASONING_OUTPUT


def grant(amount: str, at: datetime = NOVEMBER.start, name: str = "txn_1", tenant: str = "acme") -> Transaction:
    return credit_grant(name, tenant_id=tenant, currency="CNY", amount=parse_amount(amount), at=at, memo="top-up")


def bill(
    month: list[UsageRecord],
    *,
    credits: tuple[Transaction, ...] = (),
    as_of: datetime = NOVEMBER.end,
    used: Nanos | None = None,
    opening: str = "1000",
) -> Invoice:
    return make_invoice(
        sum_month(month, tenant_id="acme", currency="CNY", period=NOVEMBER),
        tenant_name="Acme",
        prices=PRICES,
        opening_balance=parse_amount(opening),
        credits=credits,
        as_of=as_of,
        used_from_balance=used,
    )


def test_an_invoice_by_hand() -> None:
    month = [record(f"req_{n}") for n in range(3)] + [record("req_new", price=PRICES["prc_new"])]
    invoice = bill(month, credits=(grant("50"),))
    assert [(line.price_id, line.component.key, line.quantity, line.requests) for line in invoice.lines] == [
        ("prc_old", "input", 2400, 3),
        ("prc_old", "cached_input", 600, 3),
        ("prc_old", "output", 900, 3),
        ("prc_new", "input", 800, 1),
        ("prc_new", "cached_input", 200, 1),
        ("prc_new", "output", 300, 1),
    ]
    assert [line.amount for line in invoice.lines] == [
        9_600_000,
        600_000,
        14_400_000,
        2_666_667,
        140_000,
        3_930_000,
    ]
    assert invoice.number == "TM-2026-11-acme"
    assert invoice.subtotal == 31_336_667
    assert (invoice.total, invoice.rounding) == (30_000_000, -1_336_667)
    assert (invoice.paid_from_balance, invoice.amount_due) == (30_000_000, 0)
    assert invoice.closing_balance == parse_amount("1050") - 31_336_667


@given(months)
def test_lines_add_up_exactly_to_the_records_and_to_the_statement(month: list[UsageRecord]) -> None:
    invoice = bill(month)
    statement = usage_statement(month, tenant_id="acme", currency="CNY", period=NOVEMBER)
    assert sum(line.amount for line in invoice.lines) == invoice.subtotal == statement.totals.charge
    billed = {each: sum(line.quantity for line in invoice.lines if line.component is each) for each in CATALOGUE}
    assert billed[INPUT] + billed[CACHED_INPUT] + billed[CACHE_WRITE] == statement.totals.prompt_tokens
    assert billed[CACHED_INPUT] == statement.totals.cached_tokens
    assert billed[OUTPUT] + billed[REASONING] == statement.totals.completion_tokens
    assert invoice.requests == statement.totals.requests
    assert invoice.uncollected == sum(one.uncollected for one in month)


@given(months)
def test_every_line_opens_down_to_its_records(month: list[UsageRecord]) -> None:
    invoice = bill(month)
    opened: dict[str, int] = {}
    for line in invoice.lines:
        behind = records_of(line, month)
        assert len(behind) == line.requests
        for one in behind:
            opened[one.request_id] = opened.get(one.request_id, 0) + one.charges[line.component]
        # without a cap, quantity times price differs by half a nano a request at most
        if not invoice.uncollected:
            per = CATALOGUE[line.component].per
            assert abs(line.quantity * line.rate - line.amount * per) * 2 <= per * line.requests
    assert opened == {one.request_id: one.charge for one in month if one.lines()}


def test_further_components_have_lines_of_their_own_and_the_others_are_as_ever() -> None:
    usage = TokenUsage(1000, 200, 300, {CACHE_WRITE: 100, REASONING: 50, Component.REQUEST: 1})
    invoice = bill([record("req_1", price=PRICES["prc_cache"], usage=usage), record("req_2")])
    assert [(line.model, line.component.key, line.quantity, line.amount, line.requests) for line in invoice.lines] == [
        ("claude", "input", 700, 2_100_000, 1),
        ("claude", "cached_input", 200, 60_000, 1),
        ("claude", "cache_write", 100, 375_000, 1),
        ("claude", "output", 300, 4_500_000, 1),  # its reasoning has no price of its own
        ("claude", "request", 1, 1, 1),
        ("smollm2", "input", 800, 3_200_000, 1),
        ("smollm2", "cached_input", 200, 200_000, 1),
        ("smollm2", "output", 300, 4_800_000, 1),
    ]
    plain = to_json(invoice)["lines"]
    assert isinstance(plain, list)
    assert list(plain[0]) == [
        *("model", "price_id", "price_from", "tier", "kind", "tokens", "price_per_million", "requests", "amount")
    ]
    assert {key: plain[4][key] for key in list(plain[4])[4:]} == {
        "kind": "request",
        "quantity": 1,
        "unit": "requests",
        "price": "0.000001",
        "price_per": 1000,
        "requests": 1,
        "amount": "0.000000001",
    }


def test_a_charge_that_the_price_has_no_rate_for_is_no_line() -> None:
    odd = msgspec.structs.replace(record(), charges={Component.IMAGE: Nanos(5)})
    with pytest.raises(LedgerError, match=r"the price prc_old of smollm2 has no rate for image"):
        bill([msgspec.structs.replace(odd, usage=TokenUsage(0, 0, 0, {Component.IMAGE: 1}))])


@given(months, st.integers(0, 10**6))
def test_what_is_due_is_payable_and_all_of_it_explained(month: list[UsageRecord], part: int) -> None:
    whole = bill(month)
    used = Nanos(whole.subtotal * part // 10**6)
    for invoice in (whole, bill(month, used=used)):
        assert invoice.subtotal + invoice.rounding == invoice.total
        assert invoice.total - invoice.paid_from_balance == invoice.amount_due
        assert 2 * abs(invoice.rounding) <= 10**7
        assert invoice.amount_due % 10**7 == 0
        assert 0 <= invoice.amount_due
        assert invoice.opening_balance + invoice.granted - invoice.used_from_balance == invoice.closing_balance
    assert whole.amount_due == 0


@given(months, st.lists(st.tuples(st.integers(1, 10**12), in_november), max_size=4))
def test_the_balance_on_the_invoice_is_the_balance_in_the_books(
    month: list[UsageRecord], grants: list[tuple[int, datetime]]
) -> None:
    credits = tuple(
        credit_grant(f"txn_{n}", tenant_id="acme", currency="CNY", amount=Nanos(amount), at=at)
        for n, (amount, at) in enumerate(grants)
    )
    charge = usage_charge("txn_c", month)
    posted = [*credits, *([charge] if charge else [])]
    invoice = bill(month, credits=credits, opening="7")
    moved = sum(entry.amount for one in posted for entry in one.entries if entry.account == "tenant:acme")
    assert invoice.closing_balance == parse_amount("7") + moved
    assert [credit.at for credit in invoice.credits] == sorted(at for _, at in grants)


def test_final_when_the_month_is_over() -> None:
    assert bill([], as_of=NOVEMBER.end).status is InvoiceStatus.FINAL
    assert bill([], as_of=NOVEMBER.end - timedelta(microseconds=1)).status is InvoiceStatus.DRAFT
    assert bill([]).number == bill([record()]).number


@pytest.mark.parametrize("currency", ["JPY", "KRW", "KWD", "USD"])
def test_each_currency_is_rounded_to_what_can_be_paid(currency: str) -> None:
    price = version("prc", "smollm2", "1000 1000 1000", currency=currency)
    month = [record(price=price, usage=TokenUsage(1234, 0, 567))]
    invoice = make_invoice(
        sum_month(month, tenant_id="acme", currency=currency, period=NOVEMBER),
        tenant_name="Acme",
        prices={"prc": price},
        opening_balance=Nanos(0),
        credits=(),
        as_of=NOVEMBER.end,
        used_from_balance=Nanos(0),
    )
    assert invoice.subtotal == 1_801_000_000
    due = {"JPY": "2", "KRW": "2", "KWD": "1.801", "USD": "1.80"}[currency]
    assert to_json(invoice)["amount_due"] == due
    assert len(due.partition(".")[2]) == minor_digits(currency)


def test_free_usage_has_lines_and_a_failed_request_has_none() -> None:
    free = record(price=PRICES["prc_free"])
    failed = record("req_2", usage=TokenUsage())
    invoice = bill([free, failed])
    assert [(line.model, line.amount) for line in invoice.lines] == [("tiny", 0)] * 3
    assert invoice.requests == 2


def test_a_charge_without_tokens_is_on_a_line_all_the_same() -> None:
    odd = msgspec.structs.replace(record(usage=TokenUsage()), charges={OUTPUT: Nanos(5)})
    invoice = bill([odd])
    assert [(line.component, line.quantity, line.amount, line.requests) for line in invoice.lines] == [
        (OUTPUT, 0, 5, 1)
    ]
    assert records_of(invoice.lines[0], [odd]) == [odd]


def test_what_does_not_belong_is_refused() -> None:
    with pytest.raises(LedgerError, match="not in 2026-11"):
        bill([record(at=NOVEMBER.end)])
    with pytest.raises(LedgerError, match="not of acme"):
        bill([record(tenant_id="other")])
    with pytest.raises(LedgerError, match="price prc_x of smollm2 is missing"):
        bill([msgspec.structs.replace(record(), price_id="prc_x")])
    with pytest.raises(LedgerError, match="not in 2026-11"):
        bill([], credits=(grant("1", at=NOVEMBER.end),))
    with pytest.raises(LedgerError, match="not a credit to tenant acme"):
        bill([], credits=(grant("1", tenant="other"),))
    with pytest.raises(LedgerError, match="from the balance"):
        bill([], used=Nanos(1))
    with pytest.raises(LedgerError, match="no time zone"):
        bill([], as_of=datetime(2026, 12, 1))


def test_sums_from_a_database_make_the_same_invoice() -> None:
    usage = MonthUsage(
        tenant_id="acme",
        currency="CNY",
        period=NOVEMBER,
        requests=1,
        uncollected=Nanos(0),
        sums=(
            LineSum("smollm2", "prc_old", OUTPUT, 300, Nanos(4_800_000), 1),
            LineSum("smollm2", "prc_old", INPUT, 800, Nanos(3_200_000), 1),
            LineSum("smollm2", "prc_old", CACHED_INPUT, 200, Nanos(200_000), 1),
            LineSum("tiny", "prc_free", INPUT, 0, Nanos(0), 0),
        ),
    )
    invoice = make_invoice(
        usage,
        tenant_name="Acme",
        prices=PRICES,
        opening_balance=parse_amount("1000"),
        credits=(),
        as_of=NOVEMBER.end,
    )
    assert invoice == bill([record()])


@given(months)
def test_json_is_plain_and_its_decimal_strings_add_up(month: list[UsageRecord]) -> None:
    plain = json.loads(json.dumps(to_json(bill(month, credits=(grant("5"),)))))
    assert sum(parse_amount(line["amount"]) for line in plain["lines"]) == parse_amount(plain["subtotal"])
    subtotal, rounding, total = (parse_amount(plain[name]) for name in ("subtotal", "rounding", "total"))
    assert subtotal + rounding == total
    balance = {name: parse_amount(amount) for name, amount in plain["balance"].items()}
    assert balance["opening"] + balance["granted"] - balance["used"] == balance["closing"]
    assert plain["tenant"] == {"id": "acme", "name": "Acme"}
    assert plain["period"]["end"] == "2026-11-30T16:00:00+00:00"
    assert plain["credits"] == [
        {"transaction_id": "txn_1", "at": "2026-10-31T16:00:00+00:00", "amount": "5.00", "memo": "top-up"}
    ]
