from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.ledger.money import (
    MAX_NANOS,
    MoneyError,
    Nanos,
    apportion,
    check_currency,
    format_amount,
    minor_digits,
    parse_amount,
    round_ratio,
    round_to_minor,
)

amounts = st.integers(-MAX_NANOS, MAX_NANOS)


@given(st.integers(), st.integers(min_value=1))
def test_round_ratio_is_the_nearest_integer_halves_away_from_zero(numerator: int, denominator: int) -> None:
    exact, rounded = Fraction(numerator, denominator), round_ratio(numerator, denominator)
    assert abs(rounded - exact) <= Fraction(1, 2)
    if abs(rounded - exact) == Fraction(1, 2):
        assert abs(rounded) > abs(exact)
    assert round_ratio(-numerator, denominator) == -rounded


@pytest.mark.parametrize("denominator", [0, -1])
def test_round_ratio_refuses_a_denominator_that_is_not_positive(denominator: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        round_ratio(1, denominator)


@given(amounts, st.integers(0, 9))
def test_what_is_written_is_read_back(nanos: int, places: int) -> None:
    text = format_amount(nanos, places=places)
    assert parse_amount(text) == nanos
    assert Decimal(text) == Decimal(nanos) / 10**9
    assert len(text.partition(".")[2]) >= places
    assert format_amount(nanos, places=places, grouped=True).replace(",", "") == text


@pytest.mark.parametrize(
    ("text", "nanos"),
    [
        ("100", 100 * 10**9),
        (" 0.000123 ", 123_000),
        ("-3.50", -3_500_000_000),
        ("+1", 10**9),
        ("-0", 0),
        ("007.10", 7_100_000_000),
        ("1.0000000000000000000000000000000000000000", 10**9),
        ("9223372036.854775807", MAX_NANOS),
    ],
)
def test_amounts(text: str, nanos: int) -> None:
    assert parse_amount(text) == nanos


@pytest.mark.parametrize(
    "text",
    ["", "1e3", "1,000", "1.", ".5", "1_000", "NaN", "inf", "0x10", "١", "1 000", "--1", "$1", "½", "1\n2"],
)
def test_what_is_not_a_plain_decimal_is_refused(text: str) -> None:
    with pytest.raises(MoneyError, match="is not an amount"):
        parse_amount(text)


@pytest.mark.parametrize("text", ["0.0000000001", "1.0000000001", "1.00000000000000000000000000001", "1." + "9" * 999])
def test_more_than_nine_decimals_are_refused_however_many(text: str) -> None:
    with pytest.raises(MoneyError, match="nine decimals"):
        parse_amount(text)


@pytest.mark.parametrize("text", ["9223372036.854775808", "-9223372037", "99999999999", "1" * 5000])
def test_too_large_is_refused_in_few_words(text: str) -> None:
    with pytest.raises(MoneyError, match="larger than Tidemill can hold") as caught:
        parse_amount(text)
    assert len(str(caught.value)) < 120


def test_the_callers_decimal_precision_does_not_matter() -> None:
    with localcontext() as context:
        context.prec = 4
        assert parse_amount("123.456789") == 123_456_789_000


def test_format_amount() -> None:
    assert format_amount(0) == "0.00"
    assert format_amount(1500) == "0.0000015"
    assert format_amount(-250_000_000) == "-0.25"
    assert format_amount(12 * 10**9, places=0) == "12"
    assert format_amount(-1_234_567_500_000_000, grouped=True) == "-1,234,567.50"


@pytest.mark.parametrize("code", ["", "usd", "US", "USDT", "U$D", "ＵＳＤ", "USD\n"])
def test_currency_codes(code: str) -> None:
    assert check_currency("CNY") == "CNY"
    with pytest.raises(MoneyError, match="three capital letters"):
        check_currency(code)


def test_minor_units() -> None:
    assert [minor_digits(code) for code in ("CNY", "USD", "JPY", "KRW", "XPF", "KWD", "CLF")] == [
        2,
        2,
        0,
        0,
        0,
        3,
        4,
    ]
    assert round_to_minor(5_000_000, "USD") == 10_000_000
    assert round_to_minor(4_999_999, "USD") == 0
    assert round_to_minor(-5_000_000, "USD") == -10_000_000
    assert round_to_minor(1_499_999_999, "JPY") == 10**9
    assert round_to_minor(1_500_000_000, "KRW") == 2 * 10**9


@given(amounts, st.sampled_from(["CNY", "JPY", "KWD", "CLF"]))
def test_rounding_to_the_minor_unit_moves_by_half_a_unit_at_most(nanos: int, currency: str) -> None:
    unit = 10 ** (9 - minor_digits(currency))
    rounded = round_to_minor(nanos, currency)
    assert rounded % unit == 0
    assert 2 * abs(rounded - nanos) <= unit
    assert round_to_minor(rounded, currency) == rounded


@given(amounts, st.lists(st.integers(0, 10**18), min_size=1, max_size=20).filter(any))
def test_shares_add_up_and_none_is_off_by_one(total: int, weights: list[int]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - Fraction(total * weight, sum(weights))) < 1
        assert weight or not share
    assert apportion(-total, weights) == [-share for share in shares]


def test_apportion_gives_the_odd_unit_to_the_largest_remainder_then_the_first() -> None:
    assert apportion(100, [1, 1, 1]) == [34, 33, 33]
    assert apportion(10, [1, 5, 3]) == [1, 6, 3]
    assert apportion(0, [0, 3]) == [0, 0]


@pytest.mark.parametrize("weights", [[], [0, 0], [2, -1]])
def test_apportion_refuses_weights_that_give_no_proportion(weights: list[int]) -> None:
    with pytest.raises(ValueError, match="weights"):
        apportion(Nanos(1), weights)
