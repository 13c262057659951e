"""The data plane's application: its routes, and the rendering of errors."""

import secrets
from collections.abc import Awaitable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from tidemill.errors import TidemillError, Unavailable
from tidemill.gateway.admission.admission import Admission
from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.endpoints.count_tokens import CountTokens
from tidemill.gateway.endpoints.model_endpoint import ModelEndpoint, ModelOperation
from tidemill.gateway.endpoints.responses import ResponseEndpoints
from tidemill.gateway.errors import BodyTooLarge, HttpRefusal, ModerationNotConfigured
from tidemill.gateway.protocols.anthropic.reply import AnthropicReply
from tidemill.gateway.protocols.anthropic.request import read_count, read_messages
from tidemill.gateway.protocols.dialect import ANTHROPIC, dialect_of
from tidemill.gateway.protocols.openai_errors import error_headers
from tidemill.gateway.protocols.reply import OpenAIReply
from tidemill.gateway.protocols.request import read_chat, read_completion, read_embeddings
from tidemill.gateway.protocols.rerank import RerankReply, read_rerank, read_rerank_v2
from tidemill.gateway.protocols.responses.reply import ResponsesReply
from tidemill.gateway.protocols.responses.request import read_responses
from tidemill.gateway.protocols.responses.store import ResponseStore
from tidemill.gateway.proxy.inflight import GatewayMeter
from tidemill.gateway.routing.models import ModelRoutes
from tidemill.http.head_lines import JSON
from tidemill.http.request_body import BrokenBody, RequestBodyTooLong
from tidemill.http.server import Exchange, Handler
from tidemill.store.engine import StoreUnavailable

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode


OPERATIONS = {
    b"/v1/chat/completions": ModelOperation("chat", read_chat, OpenAIReply),
    b"/v1/completions": ModelOperation("completions", read_completion, OpenAIReply),
    b"/v1/embeddings": ModelOperation("embeddings", read_embeddings, OpenAIReply),
    b"/v1/rerank": ModelOperation("rerank", read_rerank, RerankReply),
    b"/v2/rerank": ModelOperation("rerank", read_rerank_v2, RerankReply),
    b"/v1/messages": ModelOperation("messages", read_messages, AnthropicReply),
    b"/v1/responses": ModelOperation("responses", read_responses, ResponsesReply),
}
"""The endpoints that have a model work."""

MODEL = (b"GET", b"/v1/models/{id}")
_KEYLESS = {(b"GET", b"/healthz"), (b"GET", b"/readyz"), (b"GET", b"/")}
"""Who asks for these need not have a key."""

STORE_IS_AWAY = Unavailable("The platform's database does not answer.", hint="Try again in a moment.")
"""What a tenant reads of it. Why it does not answer, with the names of machines, is in the gateway's log."""


class GatewayApp:
    """Answers exchanges: finds the route by method and path, renders every error in one place."""

    def __init__(
        self,
        authenticator: Authenticator,
        routes: ModelRoutes,
        meter: GatewayMeter,
        *,
        started_at: int,
        admission: Admission | None = None,
        response_store: ResponseStore | None = None,
        more: Mapping[tuple[bytes, bytes], Handler] | None = None,
    ) -> None:
        """Build the application's routes.

        `admission`: by default without limits and queues. `response_store`: None stores no responses. `more`: further
        routes, which go before these.
        """
        self._authenticator = authenticator
        self._routes = routes
        self._started_at = started_at
        self._log = meter.log
        self._metrics = meter.metrics
        admission = admission or Admission(meter.leasing)
        responses = ResponseEndpoints(authenticator, response_store)
        prepare = {b"/v1/responses": responses.prepare}
        self._table: dict[tuple[bytes, bytes], Handler] = {
            **{
                (b"POST", path): ModelEndpoint(
                    operation, authenticator, routes, admission, meter, prepare=prepare.get(path)
                )
                for path, operation in OPERATIONS.items()
            },
            (b"POST", b"/v1/messages/count_tokens"): CountTokens(read_count, authenticator, routes, admission),
            **responses.routes,
            (b"POST", b"/v1/moderations"): self._moderations,
            (b"GET", b"/v1/models"): self._models,
            MODEL: self._model,
            (b"GET", b"/healthz"): self._healthz,
            (b"GET", b"/readyz"): self._readyz,
            (b"GET", b"/"): self._welcome,
            **(more or {}),
        }
        self._paths = {path for _, path in self._table}

    def __call__(self, exchange: Exchange) -> Coroutine[Any, Any, None] | None:
        """Answer an exchange; what has to be waited for is given back. Neither ever raises."""
        try:
            if dialect_of(exchange) is ANTHROPIC:
                exchange.extra = b"request-id: %b\r\n" % exchange.request_id.encode()
            if exchange.refusal is not None:
                raise _refusal(*exchange.refusal)
            route = self._route_of(exchange)
            if exchange.incoming is not None and exchange.incoming.limit is not None:
                rest: Awaitable[None] | None = self._take(exchange, route)
            else:
                rest = self._begin(exchange, route)
        except Exception as error:
            self._tell(exchange, error)
            return None
        return None if rest is None else self._guard(exchange, rest)

    def lets_in(self, exchange: Exchange) -> bool:
        """True if the headers alone justify reading the body."""
        try:
            return self._route_of(exchange) in _KEYLESS or self._authenticator.admit(exchange) is not None
        except TidemillError:
            return False

    def _route_of(self, exchange: Exchange) -> tuple[bytes, bytes]:
        """The entry of the table for this exchange. Raises HttpRefusal."""
        route = (exchange.method, exchange.path)
        if route in self._table:
            return route
        route = (exchange.method, shape_of(exchange.path))
        if route in self._table:
            return route
        if exchange.method == b"GET" and exchange.path.startswith(b"/v1/models/"):
            return MODEL  # a model's name may have slashes in it
        raise self._no_route(exchange)

    def _begin(self, exchange: Exchange, route: tuple[bytes, bytes]) -> Awaitable[None] | None:
        handler = self._table[route]
        return handler.begin(exchange, self._guard) if isinstance(handler, ModelEndpoint) else handler(exchange)

    async def _take(self, exchange: Exchange, route: tuple[bytes, bytes]) -> None:
        """Authenticate an exchange whose headers did not justify reading the body, then read it."""
        assert exchange.incoming is not None
        if route not in _KEYLESS:
            await self._authenticator.authenticate(exchange)
        try:
            exchange.body = await exchange.incoming.whole()
        except RequestBodyTooLong:
            raise BodyTooLarge("The request body is too large.", hint="Send a smaller one.") from None
        except BrokenBody as error:
            if exchange.gone:
                return
            raise HttpRefusal(f"The request body is malformed: {error}", status=400, code="invalid_http") from error
        await self._table[route](exchange)

    async def _guard(self, exchange: Exchange, rest: Awaitable[None]) -> None:
        """Wait for the rest of an answer; an exception is sent to the client as an error."""
        try:
            await rest
        except Exception as error:
            self._tell(exchange, error)

    def _tell(self, exchange: Exchange, error: Exception) -> None:
        """Answer with an error."""
        dialect = dialect_of(exchange)
        if isinstance(error, TidemillError):
            self._metrics.refuse(error.code)
            told = STORE_IS_AWAY if isinstance(error, StoreUnavailable) else error
            body = dialect.error_body(told, exchange.request_id)
            exchange.respond(told.status, body, error_headers(told), close=exchange.refusal is not None)
        else:
            self._metrics.refuse("gateway_failed")
            log.error("request failed", request_id=exchange.request_id, exc_info=error)
            body = dialect.error_body(
                TidemillError("Internal error in the gateway; its log has the cause."), exchange.request_id
            )
            exchange.respond(500, body, JSON)

    def _no_route(self, exchange: Exchange) -> HttpRefusal:
        path = exchange.path if exchange.path in self._paths else shape_of(exchange.path)
        known = path in self._paths
        status = 405 if known else 404
        what = f"{exchange.method.decode()} {exchange.path.decode(errors='replace')[:200]}"
        allowed = b", ".join(sorted(method for method, known_path in self._table if known_path == path))
        if known:
            exchange.extra += b"allow: %b\r\n" % allowed
        return HttpRefusal(
            f"There is no {what} on this server. GET / lists the endpoints.", status=status, code="not_found"
        )

    async def _welcome(self, exchange: Exchange) -> None:
        routes = sorted(f"{method.decode()} {path.decode()}" for method, path in self._table)
        exchange.respond(200, _encode({"service": "tidemill", "routes": routes}), JSON)

    async def _healthz(self, exchange: Exchange) -> None:
        exchange.respond(200, b'{"status":"ok"}', JSON)

    async def _readyz(self, exchange: Exchange) -> None:
        states = {name: route.state for name, route in self._routes.by_name.items()}
        ready = not {"ready", "asleep"}.isdisjoint(states.values()) and self._authenticator.snapshot.revision >= 0
        full = self._log.refusal()
        status = full.code if full is not None else "ready" if ready else "starting"
        body = {"status": status, "models": states} | ({"message": str(full)} if full is not None else {})
        exchange.respond(200 if status == "ready" else 503, _encode(body), JSON)

    async def _moderations(self, exchange: Exchange) -> None:
        await self._authenticator.authenticate(exchange)
        raise ModerationNotConfigured(
            "No moderation model is configured on this server.", hint="Ask your operator for one."
        )

    async def _models(self, exchange: Exchange) -> None:
        principal = await self._authenticator.authenticate(exchange)
        names = sorted(self._routes.names)
        if principal.rules is not None and principal.rules.models:
            names = [name for name in names if self._routes.find(name).spec.name in principal.rules.models]
        models = [self._describe(exchange, name) for name in names]
        page: dict[str, object] = {"object": "list", "data": models}
        if dialect_of(exchange) is ANTHROPIC:
            page = {"data": models, "has_more": False, **_ends(names)}
        exchange.respond(200, _encode(page), JSON)

    async def _model(self, exchange: Exchange) -> None:
        await self._authenticator.authenticate(exchange)
        name = exchange.path.removeprefix(b"/v1/models/").decode(errors="replace")
        self._routes.find(name)
        exchange.respond(200, _encode(self._describe(exchange, name)), JSON)

    def _describe(self, exchange: Exchange, name: str) -> dict[str, object]:
        if dialect_of(exchange) is ANTHROPIC:
            created_at = datetime.fromtimestamp(self._started_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": created_at,
                "lifecycle": "active",
            }
        return {"id": name, "object": "model", "created": self._started_at, "owned_by": "tidemill"}


_REFUSAL_CODES = {413: BodyTooLarge.code, 503: "too_many_connections"}


def _ends(names: list[str]) -> dict[str, str | None]:
    return {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}


def _refusal(status: int, message: str) -> HttpRefusal:
    return HttpRefusal(message, status=status, code=_REFUSAL_CODES.get(status, "invalid_http"))


def shape_of(path: bytes) -> bytes:
    """The route of a path that names a thing: `/v1/files/file_1/content` -> `/v1/files/{id}/content`."""
    parts = path.split(b"/")
    if len(parts) < 4 or not parts[3]:
        return path
    parts[3] = b"{id}"
    return b"/".join(parts)


class RequestIds:
    """Request ids: unique over processes and restarts by 64 random bits, in order within one."""

    def __init__(self) -> None:
        self._prefix = f"req_{secrets.token_hex(8)}"
        self._count = 0

    def __call__(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count:08x}"
