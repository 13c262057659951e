import re
from datetime import timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ledger.values import NOVEMBER, PRICES, months, record, version
from tests.support.prices import token_price
from tidemill.ledger.components import INPUT, MAX_PRICE, Component
from tidemill.ledger.invoice import Invoice, make_invoice, sum_month
from tidemill.ledger.invoice_text import WIDTH, display_width, printable, to_text, wrap
from tidemill.ledger.money import MAX_NANOS, Nanos, format_amount, parse_amount
from tidemill.ledger.posting import credit_grant
from tidemill.ledger.usage import TokenUsage, UsageRecord

names = st.text(max_size=120)


def bill(month: list[UsageRecord], *, name: str = "Acme", memo: str = "", final: bool = True) -> Invoice:
    return make_invoice(
        sum_month(month, tenant_id="acme", currency="CNY", period=NOVEMBER),
        tenant_name=name,
        prices=PRICES,
        opening_balance=parse_amount("1000"),
        credits=[
            credit_grant(
                "txn_1",
                tenant_id="acme",
                currency="CNY",
                amount=parse_amount("12345.5"),
                at=NOVEMBER.start + timedelta(days=4),
                memo=memo,
            )
        ],
        as_of=NOVEMBER.end if final else NOVEMBER.end - timedelta(days=7),
        issuer="Riverside Computing Centre",
    )


def test_the_page() -> None:
    month = [record(f"req_{n}") for n in range(1200)] + [record("req_new", price=PRICES["prc_new"])]
    text = to_text(bill(month, name="上海潮汐科技有限公司", memo="bank transfer 8841"))
    assert text == (
        """\
INVOICE  TM-2026-11-acme                                                 FINAL
==============================================================================

From          Riverside Computing Centre
To            上海潮汐科技有限公司
Account       acme
For           model usage in November 2026
Period        2026-11-01 00:00 to 2026-12-01 00:00, Asia/Shanghai
Drawn up      2026-12-01 00:00
Currency      CNY
Requests      1,201

                        tokens    requests   per million                amount
------------------------------------------------------------------------------
smollm2, at the price of 2026-01-01 (prc_old)
  input                960,000       1,200          4.00           3.840000000
  cached input         240,000       1,200          1.00           0.240000000
  output               360,000       1,200         16.00           5.760000000

smollm2, at the price of 2026-01-09 (prc_new)
  input                    800           1   3.333333333           0.002666667
  cached input             200           1          0.70           0.000140000
  output                   300           1         13.10           0.003930000
------------------------------------------------------------------------------

Subtotal, the exact sum of the lines                               9.846736667
Rounding to 0.01                                                   0.003263333
Total CNY                                                          9.85
Paid from the prepaid balance                                     -9.85
------------------------------------------------------------------------------
AMOUNT DUE CNY                                                     0.00

Prepaid balance, CNY
------------------------------------------------------------------------------
Balance at 2026-11-01 00:00                                    1,000.000000000
Credit granted 2026-11-05: bank transfer 8841                 12,345.500000000
Used for the lines above                                          -9.846736667
Balance at 2026-12-01 00:00                                   13,335.653263333

Each request is priced on its own, to 0.000000001 CNY, and each line is the
exact sum of its requests, so that tokens times price may differ in the last
decimals. The requests behind the lines:
  tidemill usage --tenant '上海潮汐科技有限公司' --month 2026-11 --records
"""
    )


@given(months, names, names)
def test_no_line_is_wider_than_the_page_and_no_name_forges_one(month: list[UsageRecord], name: str, memo: str) -> None:
    text = to_text(bill(month, name=name, memo=memo))
    for line in text.removesuffix("\n").split("\n"):
        assert display_width(line) <= WIDTH
        assert line == line.rstrip()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x85\u2028\u202e]", text)
    assert text.count("AMOUNT DUE CNY ") == 1 or "AMOUNT DUE" in name + memo


def test_control_and_format_characters_are_left_out() -> None:
    assert printable("a\u202eb\x1b[2Jc\u200bd\ne\u2028f\tg") == "ab[2Jcd e f g"


@given(months)
def test_amounts_are_not_cut_and_their_points_stand_under_each_other(month: list[UsageRecord]) -> None:
    invoice = bill(month)
    text = to_text(invoice)
    for amount in (*(line.amount for line in invoice.lines), invoice.subtotal, invoice.closing_balance):
        assert format_amount(amount, grouped=True).rstrip("0").rstrip(".") in text
    points = {
        WIDTH - match.start()
        for line in text.split("\n")
        if (match := re.search(r"\.\d+$", line)) and line.startswith(("Total", "Subtotal", "AMOUNT", "Balance", "Paid"))
    }
    assert len(points) == 1


def test_the_largest_figures_take_a_second_line() -> None:
    huge = msgspec.structs.replace(version("prc_huge", "m" * 128, "0 0 0"), price=token_price(MAX_PRICE - 1, 0, 0))
    month = [record(f"req_{n}", price=huge, usage=TokenUsage(2**28, 0, 0), cap=Nanos(10**9)) for n in range(3)]
    big = [msgspec.structs.replace(one, charges={INPUT: Nanos(MAX_NANOS // 3)}, uncollected=Nanos(1)) for one in month]
    invoice = make_invoice(
        sum_month(big, tenant_id="acme", currency="CNY", period=NOVEMBER),
        tenant_name="Acme",
        prices={"prc_huge": huge},
        opening_balance=Nanos(MAX_NANOS),
        credits=(),
        as_of=NOVEMBER.end,
    )
    text = to_text(invoice)
    assert max(map(display_width, text.split("\n"))) == WIDTH
    assert "9,999,999.999999999" in text
    assert text.replace("\n", "").count("m" * 78) == 1
    assert "is not charged" in text.replace("\n", " ")


def test_what_is_not_counted_in_tokens_says_what_its_price_is_for() -> None:
    """Searches and requests per thousand, images each, sound per minute; characters as tokens, per million."""
    more = {Component.SEARCH: 12, Component.REQUEST: 1, Component.IMAGE: 3, Component.AUDIO_SECOND: 90}
    price = version(
        "prc_all", "any", "3 0.3 15", search="2", request="0.001", image="0.04", audio_second="0.006", character="15"
    )
    one = record(price=price, usage=TokenUsage(1000, 0, 0, {**more, Component.CHARACTER: 4000}))
    invoice = make_invoice(
        sum_month([one], tenant_id="acme", currency="CNY", period=NOVEMBER),
        tenant_name="Acme",
        prices={"prc_all": price},
        opening_balance=Nanos(0),
        credits=(),
        as_of=NOVEMBER.end,
    )
    text = to_text(invoice)
    assert (
        """
any, at the price of 2026-01-01 (prc_all)
  input                  1,000           1          3.00              0.003000
  requests                   1           1   0.001/1,000              0.000001
  searches                  12           1    2.00/1,000              0.024000
  images                     3           1        0.04/1              0.120000
  audio (s)                 90           1      0.006/60              0.009000
  characters             4,000           1         15.00              0.060000
"""
        in text
    )
    assert max(map(display_width, text.split("\n"))) == WIDTH


def test_a_draft_says_so_and_an_empty_month_too() -> None:
    text = to_text(bill([], final=False))
    assert text.split("\n")[0].endswith("DRAFT")
    assert "This is a draft" in text
    assert "No usage in this period." in text
    assert "Balance at 2026-11-24 00:00" in text
    assert "No billable usage." in to_text(bill([record(usage=TokenUsage())]))


def test_yen_have_no_decimals() -> None:
    price = version("prc_jpy", "smollm2", "1000000 1 1", currency="JPY")
    invoice = make_invoice(
        sum_month(
            [record(price=price, usage=TokenUsage(1234, 0, 0))],
            tenant_id="acme",
            currency="JPY",
            period=NOVEMBER,
        ),
        tenant_name="Acme",
        prices={"prc_jpy": price},
        opening_balance=parse_amount("5000"),
        credits=(),
        as_of=NOVEMBER.end,
    )
    text = to_text(invoice)
    assert re.search(r"^Total JPY {2,}1,234$", text, re.MULTILINE)
    assert "Rounding to 1 " in text
    assert "1,000,000 " in text


@pytest.mark.parametrize(("text", "width"), [("abc", 3), ("上海", 4), ("é", 1), ("e\u0301", 1), ("ｆ", 2), ("🌊", 2)])
def test_display_width(text: str, width: int) -> None:
    assert display_width(text) == width


@given(names, st.integers(2, 40))
def test_wrapping_loses_nothing_but_spaces(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert lines
    assert all(display_width(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == printable(text).replace(" ", "")
