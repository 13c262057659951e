"""What limits bind, and the days and months of budgets."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.ledger.limits import Limit, LimitKind, Per, scope_of, span_of, title_of

ZONES = ["UTC", "Asia/Shanghai", "America/New_York", "America/St_Johns", "Asia/Beirut", "Pacific/Apia", "Africa/Cairo"]


def limit(**fields: object) -> Limit:
    values = {"limit_id": "lim_1", "tenant_id": "ten_1", "kind": LimitKind.RPM, "amount": 100, **fields}
    return Limit(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("narrowed", "binds"),
    [
        ({}, {"k1 big", "k1 small", "k2 big", "k2 small"}),
        ({"key_id": "k1"}, {"k1 big", "k1 small"}),
        ({"model": "big"}, {"k1 big", "k2 big"}),
        ({"key_id": "k1", "model": "big"}, {"k1 big"}),
    ],
)
def test_a_limit_binds_what_it_is_narrowed_to(narrowed: dict[str, str], binds: set[str]) -> None:
    found = {
        f"{key} {model}" for key in ("k1", "k2") for model in ("big", "small") if limit(**narrowed).binds(key, model)
    }
    assert found == binds


def test_limits_in_words() -> None:
    assert title_of(limit(amount=1), "USD") == "1 request per minute"
    assert title_of(limit(kind=LimitKind.TPM, amount=20_000), "USD") == "20,000 tokens per minute"
    assert title_of(limit(kind=LimitKind.CONCURRENCY, amount=4), "USD") == "4 concurrent requests"
    budget = limit(kind=LimitKind.BUDGET, amount=1_500_000_000_000, per=Per.DAY)
    assert title_of(budget, "CNY") == "a budget of 1,500.00 CNY per day"
    assert scope_of(limit()) == "your account"
    assert scope_of(limit(key_id="k1", model="big")) == "this key, for the model 'big'"


def test_a_soft_limit_is_rounded_up() -> None:
    assert limit(kind=LimitKind.BUDGET, amount=101, per=Per.DAY, soft_percent=50).soft_amount == 51
    assert limit(kind=LimitKind.BUDGET, amount=101, per=Per.DAY).soft_amount is None


def test_a_day_is_the_operators() -> None:
    instant = datetime(2026, 11, 24, 17, tzinfo=UTC)  # one in the morning of the 25th in Shanghai
    span = span_of(instant, Per.DAY, "Asia/Shanghai")
    assert (span.label, span.start, span.end) == (
        "2026-11-25",
        datetime(2026, 11, 24, 16, tzinfo=UTC),
        datetime(2026, 11, 25, 16, tzinfo=UTC),
    )
    assert span_of(instant, Per.MONTH, "Asia/Shanghai").label == "2026-11"


@given(
    instant=st.datetimes(datetime(2000, 1, 1), datetime(2030, 1, 1)),
    zone=st.sampled_from(ZONES),
    per=st.sampled_from(Per),
)
def test_periods_follow_each_other_without_a_gap(instant: datetime, zone: str, per: Per) -> None:
    span = span_of(instant.replace(tzinfo=UTC), per, zone)
    assert span.start <= instant.replace(tzinfo=UTC) < span.end
    following = span_of(span.end, per, zone)
    assert following.start == span.end and following.label > span.label
    assert span_of(span.end - timedelta(microseconds=1), per, zone) == span
