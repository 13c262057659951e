"""/api/v1/models and /api/v1/prices: what is served, and at what price."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from litestar import get
from litestar.params import QueryParameter
from msgspec import Meta, convert

from tidemill.control import queries
from tidemill.control.api.access import Running, read
from tidemill.control.api.schemas import FAILURES, Amount, Answer, Currency, Instant


class Rates(Answer, kw_only=True, omit_defaults=True):
    """Amounts by component. Those for tokens are per million; those that are missing are not priced apart."""

    input: Amount
    cached_input: Annotated[str, Meta(description="For prompt tokens that the engine found in its cache.")]
    cache_write: Annotated[str | None, Meta(description="For prompt tokens that were written to a cache.")] = None
    output: Amount
    reasoning_output: Annotated[str | None, Meta(description="For the tokens of a model's reasoning.")] = None
    request: Annotated[str | None, Meta(description="Per thousand requests.")] = None
    search: Annotated[str | None, Meta(description="Per thousand searches of rankings.")] = None
    document: Annotated[str | None, Meta(description="Per thousand documents.")] = None
    image: Annotated[str | None, Meta(description="Per image.")] = None
    audio_second: Annotated[str | None, Meta(description="Per minute: sixty of them.")] = None
    character: Annotated[str | None, Meta(description="Per million characters.")] = None


class Model(Answer):
    """A model that is served."""

    name: str
    engine: Annotated[str | None, Meta(description="The engine's kind.", examples=["llamacpp", "openai"])]
    state: Annotated[str, Meta(examples=["ready", "starting", "failed"])]
    replicas_ready: int
    replicas_total: int
    endpoint: Annotated[str | None, Meta(description="The address of its engine.")]
    prices: Annotated[dict[str, Rates], Meta(description="The prices in force, by currency.")]


class Models(Answer):
    """Models by name."""

    models: list[Model]


class PriceSchema(Rates, kw_only=True, omit_defaults=True):
    """A price version, which is never edited.

    It is in force from `valid_from` until the next of its model and currency.
    """

    id: str
    model: str
    currency: Currency
    tier: Annotated[Literal["standard", "batch"], Meta(description="`batch`: the lines of batches.")]
    valid_from: Instant


class Prices(Answer):
    """Price versions."""

    prices: list[PriceSchema]


@get("/models", responses=FAILURES)
async def list_models(platform: Running) -> Models:
    """List the models, how they do and what they cost."""
    now, running = datetime.now(UTC), platform.models()
    return convert(await read(platform, lambda connection: queries.models(connection, running, now=now)), Models)


@get("/prices", responses=FAILURES)
async def list_prices(
    platform: Running,
    history: Annotated[bool, QueryParameter(description="All versions that ever were, oldest first.")] = False,
) -> Prices:
    """List the prices in force. They are set in the configuration file."""
    now = datetime.now(UTC)
    return convert(
        await read(platform, lambda connection: queries.prices(connection, history=history, now=now)), Prices
    )
