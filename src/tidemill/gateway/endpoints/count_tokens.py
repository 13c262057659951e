"""POST /v1/messages/count_tokens: the number of tokens of a prompt. Nothing is billed.

Exact where the engine can count a chat (`Engine.count`), else an estimate; a header says which.
"""

from collections.abc import Callable

import msgspec

from tidemill.engines.sse import BYTES_PER_TOKEN
from tidemill.gateway.admission.admission import Admission
from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.endpoints.model_endpoint import count_prompt, refuse_what_is_ignored
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.routing.models import ModelRoutes
from tidemill.http.head_lines import JSON
from tidemill.http.server import Exchange

_encode = msgspec.json.Encoder().encode

EXACT = JSON + b"x-token-count: exact\r\n"
ESTIMATED = JSON + b"x-token-count: estimate\r\n"
"""A token for four bytes of the request."""


class CountTokens:
    """The token counting endpoint of one gateway process."""

    def __init__(
        self,
        read: Callable[[bytes], ModelRequest],
        authenticator: Authenticator,
        routes: ModelRoutes,
        admission: Admission,
    ) -> None:
        self._read = read
        self._authenticator = authenticator
        self._routes = routes
        self._admission = admission

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request. Raises TidemillError."""
        principal = await self._authenticator.authenticate(exchange)
        request = self._read(exchange.body)
        route = self._routes.find(request.model)
        self._authenticator.price(route.spec.name, principal)  # a model that may not be asked is not counted for either
        request.prepare_for(route.engine, exchange.headers)
        refuse_what_is_ignored(request, route)
        request.model = route.spec.name  # whichever of its names was used
        await self._admission.admit_count(exchange, request, principal)
        counted = None if route.asleep else await count_prompt(request, route, route.pick())
        tokens = counted if counted is not None else max(1, request.body_bytes // BYTES_PER_TOKEN)
        exchange.respond(200, _encode({"input_tokens": tokens}), EXACT if counted is not None else ESTIMATED)
