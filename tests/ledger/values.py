"""Usage records, prices and amounts to test with."""

from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.period import parse_period
from tidemill.ledger.pricing import Price, PriceVersion, rate_capped
from tidemill.ledger.usage import RequestStatus, TokenUsage, UsageRecord

NOVEMBER = parse_period("2026-11", "Asia/Shanghai")
UNCAPPED = Nanos(2**63 - 1)
USAGE = TokenUsage(1000, 200, 300)


def version(price_id: str, model: str, prices: str, *, currency: str = "CNY", day: int = 1) -> PriceVersion:
    """`prices`: input, cached input and output per million tokens, e.g. "4 1 16"."""
    return PriceVersion(
        price_id=price_id,
        model=model,
        currency=currency,
        price=Price(*map(parse_amount, prices.split())),
        valid_from=datetime(2026, 1, day, tzinfo=UTC),
    )


PRICES = {
    price.price_id: price
    for price in (
        version("prc_old", "smollm2", "4 1 16", day=1),
        version("prc_new", "smollm2", "3.333333333 0.7 13.1", day=9),
        version("prc_big", "deepseek-r1", "0.000000001 0 0.3", day=3),
        version("prc_free", "tiny", "0 0 0", day=4),
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
        charge_input=charge.input,
        charge_cached=charge.cached,
        charge_output=charge.output,
        uncollected=charge.uncollected,
        hold=cap,
        started_at=at - timedelta(seconds=1),
        first_token_at=None,
        finished_at=at,
        device_ns=device_ns,
    )


tokens = st.integers(0, 300_000)
usages = st.builds(
    lambda prompt, cached, completion: TokenUsage(prompt, min(prompt, cached), completion),
    tokens,
    st.one_of(st.just(0), tokens),
    tokens,
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
