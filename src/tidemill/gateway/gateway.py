"""The data plane's routes, and what every answer has in common."""

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec
import structlog

from tidemill.errors import TidemillError
from tidemill.gateway.admission import Admission
from tidemill.gateway.anthropic_reply import AnthropicReply
from tidemill.gateway.anthropic_request import read_count, read_messages
from tidemill.gateway.counting import CountTokens
from tidemill.gateway.dialects import ANTHROPIC, dialect_of
from tidemill.gateway.door import Door
from tidemill.gateway.errors import BodyTooLarge, HttpRefusal, ModerationNotConfigured, error_headers
from tidemill.gateway.flight import Meter
from tidemill.gateway.http import Exchange, Handler
from tidemill.gateway.replies import OpenAIReply
from tidemill.gateway.requests import read_chat, read_completion, read_embeddings
from tidemill.gateway.responses_api import Responses
from tidemill.gateway.responses_reply import ResponsesReply
from tidemill.gateway.responses_request import read_responses
from tidemill.gateway.responses_shelf import Shelf
from tidemill.gateway.routing import Routes
from tidemill.gateway.serve import JSON, Operation, Serve

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode


OPERATIONS = {
    b"/v1/chat/completions": Operation("chat", read_chat, OpenAIReply),
    b"/v1/completions": Operation("completions", read_completion, OpenAIReply),
    b"/v1/embeddings": Operation("embeddings", read_embeddings, OpenAIReply),
    b"/v1/messages": Operation("messages", read_messages, AnthropicReply),
    b"/v1/responses": Operation("responses", read_responses, ResponsesReply),
}
"""The endpoints that have a model work."""


class Gateway:
    """Answers exchanges: finds the route by method and path, renders every error in one place."""

    def __init__(
        self,
        door: Door,
        routes: Routes,
        meter: Meter,
        *,
        started_at: int,
        admission: Admission | None = None,
        shelf: Shelf | None = None,
        more: Mapping[tuple[bytes, bytes], Handler] | None = None,
    ) -> None:
        """`admission`: by default without limits and queues. `shelf`: where responses are kept; without one, none is.
        `more`: further routes, which go before these.
        """
        self._door = door
        self._routes = routes
        self._started_at = started_at
        admission = admission or Admission(meter.leasing)
        responses = Responses(door, shelf)
        prepare = {b"/v1/responses": responses.prepare}
        self._table: dict[tuple[bytes, bytes], Handler] = {
            **{
                (b"POST", path): Serve(operation, door, routes, admission, meter, prepare=prepare.get(path))
                for path, operation in OPERATIONS.items()
            },
            (b"POST", b"/v1/messages/count_tokens"): CountTokens(read_count, door, routes),
            **responses.routes,
            (b"POST", b"/v1/moderations"): self._moderations,
            (b"GET", b"/v1/models"): self._models,
            (b"GET", b"/healthz"): self._healthz,
            (b"GET", b"/readyz"): self._readyz,
            (b"GET", b"/"): self._welcome,
            **(more or {}),
        }
        self._paths = {path for _, path in self._table}

    async def __call__(self, exchange: Exchange) -> None:
        """Answer an exchange. Never raises."""
        dialect = dialect_of(exchange)
        if dialect is ANTHROPIC:
            exchange.extra = b"request-id: %b\r\n" % exchange.request_id.encode()
        try:
            if exchange.refusal is not None:
                raise _refusal(*exchange.refusal)
            handler = self._table.get((exchange.method, exchange.path)) or self._table.get(
                (exchange.method, shape_of(exchange.path))
            )
            if handler is not None:
                await handler(exchange)
            elif exchange.path.startswith(b"/v1/models/") and exchange.method == b"GET":
                await self._model(exchange)
            else:
                self._no_route(exchange)
        except TidemillError as error:
            body = dialect.error_body(error, exchange.request_id)
            exchange.respond(error.status, body, error_headers(error), close=exchange.refusal is not None)
        except Exception:
            log.exception("request failed", request_id=exchange.request_id)
            body = dialect.error_body(TidemillError("The gateway has failed; its log says why."), exchange.request_id)
            exchange.respond(500, body, JSON)

    def _no_route(self, exchange: Exchange) -> None:
        path = exchange.path if exchange.path in self._paths else shape_of(exchange.path)
        known = path in self._paths
        status = 405 if known else 404
        what = f"{exchange.method.decode()} {exchange.path.decode(errors='replace')[:200]}"
        allowed = b", ".join(sorted(method for method, known_path in self._table if known_path == path))
        if known:
            exchange.extra += b"allow: %b\r\n" % allowed
        raise HttpRefusal(f"There is no {what} here. See GET / for what there is.", status=status, code="not_found")

    async def _welcome(self, exchange: Exchange) -> None:
        routes = sorted(f"{method.decode()} {path.decode()}" for method, path in self._table)
        exchange.respond(200, _encode({"service": "tidemill", "routes": routes}), JSON)

    async def _healthz(self, exchange: Exchange) -> None:
        exchange.respond(200, b'{"status":"ok"}', JSON)

    async def _readyz(self, exchange: Exchange) -> None:
        states = {name: "ready" if route.ready else "starting" for name, route in self._routes.by_name.items()}
        ready = "ready" in states.values() and self._door.snapshot.revision >= 0
        body = {"status": "ready" if ready else "starting", "models": states}
        exchange.respond(200 if ready else 503, _encode(body), JSON)

    async def _moderations(self, exchange: Exchange) -> None:
        self._door.admit(exchange) or await self._door.ask_store(exchange)
        raise ModerationNotConfigured(
            "No model that judges the safety of content is set up here.", hint="Ask your operator for one."
        )

    async def _models(self, exchange: Exchange) -> None:
        principal = self._door.admit(exchange) or await self._door.ask_store(exchange)
        names = sorted(self._routes.names)
        if principal.rules is not None and principal.rules.models:
            names = [name for name in names if self._routes.find(name).spec.name in principal.rules.models]
        models = [self._describe(exchange, name) for name in names]
        page: dict[str, object] = {"object": "list", "data": models}
        if dialect_of(exchange) is ANTHROPIC:
            page = {"data": models, "has_more": False, **_ends(names)}
        exchange.respond(200, _encode(page), JSON)

    async def _model(self, exchange: Exchange) -> None:
        self._door.admit(exchange) or await self._door.ask_store(exchange)
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


def _ends(names: list[str]) -> dict[str, str | None]:
    return {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}


def _refusal(status: int, message: str) -> HttpRefusal:
    return HttpRefusal(message, status=status, code=BodyTooLarge.code if status == 413 else "invalid_http")


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
