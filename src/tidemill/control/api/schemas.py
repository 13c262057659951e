"""What the requests and answers of the admin API have in common.

Amounts are decimal strings, never JSON numbers.
"""

from typing import Annotated, Any

from litestar.openapi.datastructures import ResponseSpec
from msgspec import Meta, Struct

Amount = Annotated[str, Meta(description="A decimal amount, exact to 0.000000001.", examples=["12.50", "0.000123"])]
Instant = Annotated[str, Meta(description="ISO 8601, UTC.", examples=["2026-11-24T15:04:05.678901+00:00"])]
Currency = Annotated[str, Meta(description="ISO 4217 code.", examples=["USD", "CNY"])]
TenantRef = Annotated[str, Meta(description="A tenant's name, or its id.", examples=["acme"])]


class NamedStruct(Struct):
    """A struct of the admin API. The OpenAPI document calls a `TenantSchema` plainly `Tenant`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Litestar takes the key of a component from the one, its title from the other.
        cls.__qualname__ = cls.__schema_name__ = cls.__name__.removesuffix("Schema")  # type: ignore[attr-defined]


class Body(NamedStruct, forbid_unknown_fields=True, kw_only=True):
    """A request's body. Unknown fields are refused, so that a typing error is not ignored."""


class Answer(NamedStruct):
    """A part of an answer."""


class ErrorBody(Answer):
    """What went wrong."""

    code: Annotated[str, Meta(description="For programs.", examples=["not_found"])]
    message: Annotated[str, Meta(description="For people: what is wrong.")]
    hint: Annotated[str, Meta(description="What to do; may be empty.")]
    param: Annotated[str | None, Meta(description="The field that is wrong, if it is one.")]


class ErrorAnswer(Answer):
    """The answer to a request that failed."""

    error: ErrorBody


def _failure(description: str) -> ResponseSpec:
    return ResponseSpec(ErrorAnswer, description=description, generate_examples=False)


FAILURES = {
    400: _failure("The request is not valid."),
    401: _failure("No admin token, or a wrong one."),
    404: _failure("The named resource does not exist."),
    503: _failure("A part of the platform does not answer."),
}
CONFLICT = {**FAILURES, 409: _failure("It already exists, or its idempotency key was used for a different request.")}
