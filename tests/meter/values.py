"""Requests to meter in tests."""

from tests.meter.conftest import OCTOBER
from tests.support.prices import token_price
from tidemill.clock import to_micros
from tidemill.ledger.pricing import Price
from tidemill.ledger.usage import RequestStatus, TokenUsage
from tidemill.meter.records import Opened, Settled, settle

PRICE = token_price(4_000_000_000, 1_000_000_000, 16_000_000_000)
"""4, 1 and 16 units per million tokens."""
START_US = to_micros(OCTOBER)


def opened(
    request_id: str = "req_1",
    tenant_id: str = "ten_1",
    *,
    price: Price = PRICE,
    currency: str = "CNY",
    started_us: int = START_US,
) -> Opened:
    return Opened(
        request_id=request_id,
        tenant_id=tenant_id,
        key_id="key_1",
        model="m",
        replica="m/0#life",
        price_id="prc_1",
        currency=currency,
        price=price,
        streamed=True,
        started_us=started_us,
    )


def settled(
    request: Opened,
    usage: TokenUsage = TokenUsage(100, 20, 50),  # noqa: B008
    *,
    hold: int = 10**12,
    status: RequestStatus = RequestStatus.OK,
    finished_us: int | None = None,
) -> Settled:
    return settle(
        request,
        usage,
        status=status,
        estimated=False,
        hold=hold,
        first_token_us=request.started_us + 1,
        finished_us=request.started_us + 1000 if finished_us is None else finished_us,
        device_ns=7,
    )
