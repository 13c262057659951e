"""/api/v1/credits"""

from datetime import UTC, datetime
from typing import Annotated

from litestar import post
from litestar.params import JSONBody
from msgspec import Meta, convert

from tidemill.control import changes
from tidemill.control.api.access import Running, change
from tidemill.control.api.schemas import CONFLICT, Amount, Answer, Body, Currency, Instant, TenantRef


class CreditRequest(Body):
    """A credit to be granted."""

    tenant: TenantRef
    amount: Annotated[str, Meta(description="A decimal as a string, more than zero.", examples=["100"])]
    memo: Annotated[str, Meta(description="Text for the invoice; at most 512 characters.")] = ""
    idempotency_key: Annotated[
        str | None,
        Meta(
            description="Of the caller's choice, at most 255 characters. For a tenant and a key the grant is made once,"
            " however often it is asked for."
        ),
    ] = None


class Credit(Answer):
    """A credit that was granted."""

    tenant: Annotated[str, Meta(description="The tenant's name.")]
    transaction_id: str
    amount: Amount
    currency: Currency
    memo: str
    at: Instant
    balance: Annotated[str, Meta(description="The tenant's balance now, a decimal amount.")]
    replayed: Annotated[bool, Meta(description="True if an earlier request with this idempotency key made the grant.")]


@post("/credits", responses=CONFLICT)
async def grant_credit(platform: Running, data: JSONBody[CreditRequest]) -> Credit:
    """Grant a tenant credit to spend, in its currency. It can be spent once this is answered."""
    await platform.drain_usage()  # for the balance in the answer
    now = datetime.now(UTC)
    granted = await change(
        platform,
        lambda connection: changes.grant_credit(
            connection,
            tenant=data.tenant,
            amount=data.amount,
            memo=data.memo,
            idempotency_key=data.idempotency_key,
            now=now,
        ),
    )
    return convert(granted, Credit)
