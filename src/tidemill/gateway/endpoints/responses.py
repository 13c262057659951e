"""/v1/responses/{id}: retrieve and delete stored responses. Neither is billed.

Source: OpenAI API reference, "Responses", "Get a model response", "Delete a model response".
"""

import msgspec

from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.auth.snapshot import Principal
from tidemill.gateway.errors import ResponseNotFound, UnsupportedParameter
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.protocols.responses.request import ResponsesRequest
from tidemill.gateway.protocols.responses.store import ResponseStore
from tidemill.http.head_lines import JSON
from tidemill.http.server import Exchange, Handler
from tidemill.ledger.pricing import PriceTier

_encode = msgspec.json.Encoder().encode


class ResponseEndpoints:
    """Retrieval and deletion of stored responses."""

    def __init__(self, authenticator: Authenticator, response_store: ResponseStore | None) -> None:
        self._authenticator = authenticator
        self._response_store = response_store

    @property
    def routes(self) -> dict[tuple[bytes, bytes], Handler]:
        return {
            (b"GET", b"/v1/responses/{id}"): self._retrieve,
            (b"DELETE", b"/v1/responses/{id}"): self._delete,
        }

    async def prepare(self, request: ModelRequest, principal: Principal) -> None:
        """Attach the response store and the history to a request. Raises BadRequest, Unavailable."""
        assert isinstance(request, ResponsesRequest)
        # Lines of batches have their output file; thousands of them would push all others out of the store.
        request.response_store = self._response_store if principal.tier is PriceTier.STANDARD else None
        request.tenant_id = principal.tenant_id
        if request.previous_id is not None:
            if self._response_store is None:
                raise UnsupportedParameter(
                    "This server stores no responses, so 'previous_response_id' is not supported.",
                    hint="Send the conversation as 'input'.",
                    param="previous_response_id",
                )
            request.follow(await self._response_store.history(principal.tenant_id, request.previous_id))

    async def _retrieve(self, exchange: Exchange) -> None:
        principal = await self._authenticator.authenticate(exchange)
        if b"stream=true" in exchange.query:
            raise UnsupportedParameter(
                "A stored response cannot be streamed.", hint="Leave out 'stream'.", param="stream"
            )
        response_id = _id_of(exchange)
        found = (
            await self._response_store.find(principal.tenant_id, response_id)
            if self._response_store is not None
            else None
        )
        if found is None:
            raise _not_found(response_id)
        exchange.respond(200, found.response, JSON)

    async def _delete(self, exchange: Exchange) -> None:
        principal = await self._authenticator.authenticate(exchange)
        response_id = _id_of(exchange)
        if self._response_store is None or not await self._response_store.delete(principal.tenant_id, response_id):
            raise _not_found(response_id)
        exchange.respond(200, _encode({"id": response_id, "object": "response", "deleted": True}), JSON)


def _id_of(exchange: Exchange) -> str:
    return exchange.path.removeprefix(b"/v1/responses/").decode(errors="replace")[:64]


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(
        f"There is no response {response_id!r}: it was not stored, was deleted, or has expired.",
        hint='Only a response with "store": true is stored.',
    )
