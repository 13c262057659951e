"""The data plane's routes, and what every answer has in common."""

import secrets
from collections.abc import Mapping

import msgspec
import structlog

from tidemill.errors import TidemillError
from tidemill.gateway.door import Door
from tidemill.gateway.errors import BodyTooLarge, error_body, error_headers, error_object
from tidemill.gateway.flight import Meter
from tidemill.gateway.http import Exchange, Handler
from tidemill.gateway.replies import OpenAIReply
from tidemill.gateway.requests import read_chat, read_completion, read_embeddings
from tidemill.gateway.routing import Routes
from tidemill.gateway.serve import JSON, Operation, Serve

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode


OPERATIONS = {
    b"/v1/chat/completions": Operation("chat", read_chat, OpenAIReply),
    b"/v1/completions": Operation("completions", read_completion, OpenAIReply),
    b"/v1/embeddings": Operation("embeddings", read_embeddings, OpenAIReply),
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
        more: Mapping[tuple[bytes, bytes], Handler] | None = None,
    ) -> None:
        self._door = door
        self._routes = routes
        self._started_at = started_at
        self._table: dict[tuple[bytes, bytes], Handler] = {
            **{(b"POST", path): Serve(operation, door, routes, meter) for path, operation in OPERATIONS.items()},
            (b"GET", b"/v1/models"): self._models,
            (b"GET", b"/healthz"): self._healthz,
            (b"GET", b"/readyz"): self._readyz,
            (b"GET", b"/"): self._welcome,
            **(more or {}),
        }
        self._paths = {path for _, path in self._table}

    async def __call__(self, exchange: Exchange) -> None:
        """Answer an exchange. Never raises."""
        try:
            if exchange.refusal is not None:
                self._refuse(exchange, *exchange.refusal)
                return
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
            exchange.respond(error.status, error_body(error), error_headers(error))
        except Exception:
            log.exception("request failed", request_id=exchange.request_id)
            body = error_object("The gateway has failed; its log says why.", status=500, code="internal_error")
            exchange.respond(500, _encode(body), JSON)

    def _refuse(self, exchange: Exchange, status: int, message: str) -> None:
        code = BodyTooLarge.code if status == 413 else "invalid_http"
        exchange.respond(status, _encode(error_object(message, status=status, code=code)), JSON, close=True)

    def _no_route(self, exchange: Exchange) -> None:
        path = exchange.path if exchange.path in self._paths else shape_of(exchange.path)
        known = path in self._paths
        status = 405 if known else 404
        what = f"{exchange.method.decode()} {exchange.path.decode(errors='replace')[:200]}"
        allowed = b", ".join(sorted(method for method, known_path in self._table if known_path == path))
        headers = JSON + (b"allow: %b\r\n" % allowed if known else b"")
        message = f"There is no {what} here. See GET / for what there is."
        exchange.respond(status, _encode(error_object(message, status=status, code="not_found")), headers)

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

    async def _models(self, exchange: Exchange) -> None:
        self._door.admit(exchange) or await self._door.ask_store(exchange)
        models = [self._describe(name) for name in sorted(self._routes.by_name)]
        exchange.respond(200, _encode({"object": "list", "data": models}), JSON)

    async def _model(self, exchange: Exchange) -> None:
        self._door.admit(exchange) or await self._door.ask_store(exchange)
        name = exchange.path.removeprefix(b"/v1/models/").decode(errors="replace")
        exchange.respond(200, _encode(self._describe(self._routes.find(name).spec.name)), JSON)

    def _describe(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._started_at, "owned_by": "tidemill"}


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
