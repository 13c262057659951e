"""Usage records, prices and amounts to test with."""

from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from tests.support.prices import token_price
from tidemill.ledger.components import BASE, BY_KEY, CATALOGUE
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.period import parse_period
from tidemill.ledger.pricing import Price, PriceVersion, rate_capped
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord

NOVEMBER = parse_period("2026-11", "Asia/Shanghai")
UNCAPPED = Nanos(2**63 - 1)
USAGE = TokenUsage(1000, 200, 300)


def version(
    price_id: str, model: str, prices: str, *, currency: str = "CNY", day: int = 1, **more: str
) -> PriceVersion:
    """`prices`: input, cached input and output per million tokens, e.g. "4 1 16"; `more`: further components."""
    base = token_price(*map(parse_amount, prices.split())).rates
    return PriceVersion(
        price_id=price_id,
        model=model,
        currency=currency,
        price=Price(base | {BY_KEY[key]: parse_amount(amount) for key, amount in more.items()}),
        valid_from=datetime(2026, 1, day, tzinfo=UTC),
    )


PRICES = {
    price.price_id: price
    for price in (
        version("prc_old", "smollm2", "4 1 16", day=1),
        version("prc_new", "smollm2", "3.333333333 0.7 13.1", day=9),
        version("prc_big", "deepseek-r1", "0.000000001 0 0.3", day=3),
        version("prc_free", "tiny", "0 0 0", day=4),
        version("prc_cache", "claude", "3 0.3 15", day=5, cache_write="3.75", request="0.000001"),
        version("prc_rank", "reranker", "0 0 0", day=6, search="2.00", document="0.333333333", reasoning_output="7"),
    )
}


def record(
    request_id: str = "req_1",
    *,
    tenant_id: str = "acme",
    price: PriceVersion = PRICES["prc_old"],
    usage: TokenUsage = USAGE,
    cap: Nanos = UNCAPPED,
    at: datetime = NOVEMBER.start + timedelta(days=3),
    device_ns: int = 1_000_000,
    status: RequestStatus = RequestStatus.OK,
) -> UsageRecord:
    charge = rate_capped(usage, price.price, cap)
    return UsageRecord(
        request_id=request_id,
        tenant_id=tenant_id,
        key_id="key_1",
        model=price.model,
        replica=f"{price.model}/0",
        usage=usage,
        estimated=False,
        status=status,
        streamed=True,
        price_id=price.price_id,
        currency=price.currency,
        charges=charge.amounts,
        uncollected=charge.uncollected,
        hold=cap,
        started_at=at - timedelta(seconds=1),
        first_token_at=None,
        finished_at=at,
        device_ns=device_ns,
    )


tokens = st.integers(0, 300_000)
further = st.dictionaries(
    st.sampled_from([component for component in CATALOGUE if component not in BASE]), st.integers(0, 4096), max_size=3
)
"""Quantities of components beyond the tokens of prompts and answers."""
usages = st.builds(
    lambda prompt, cached, completion, more: TokenUsage(prompt, min(prompt, cached), completion, more),
    tokens,
    st.one_of(st.just(0), tokens),
    tokens,
    st.one_of(st.just({}), further),
)
in_november = st.datetimes(
    NOVEMBER.start.replace(tzinfo=None), NOVEMBER.end.replace(tzinfo=None) - timedelta(microseconds=1)
).map(lambda naive: naive.replace(tzinfo=UTC))
records = st.builds(
    record,
    request_id=st.uuids().map(str),
    price=st.sampled_from(list(PRICES.values())),
    usage=usages,
    cap=st.one_of(st.just(UNCAPPED), st.integers(0, 10**9).map(Nanos)),
    at=in_november,
    device_ns=st.integers(0, 10**12),
)
months = st.lists(records, max_size=25)
"""The records of one tenant in November."""
