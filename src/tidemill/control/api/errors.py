"""The one place where the admin API renders errors: `{"error": {"code", "message", "hint", "param"}}`."""

import re
from typing import Any

import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import ExceptionHandlersMap

from tidemill.control.api.schemas import ErrorAnswer, ErrorBody
from tidemill.errors import TidemillError
from tidemill.ledger.errors import LedgerError

log = structlog.get_logger()

_QUOTED = re.compile(r"`([^`]+)`|'([^']+)'")
_CODES = {400: "invalid_request", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_AS_STRING = 'Write it as a string, "amount": "100"; a JSON number may lose digits.'
AnyRequest = Request[Any, Any, Any]


def _answer(
    status: int,
    code: str,
    message: str,
    *,
    hint: str = "",
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response[ErrorAnswer]:
    body = ErrorAnswer(ErrorBody(code=code, message=message, hint=hint, param=param))
    return Response(body, status_code=status, headers=headers, media_type="application/json")


def tidemill_error(_: AnyRequest, error: TidemillError) -> Response[ErrorAnswer]:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return _answer(error.status, error.code, error.message, hint=error.hint, param=error.param, headers=headers)


def ledger_error(_: AnyRequest, error: LedgerError) -> Response[ErrorAnswer]:
    return _answer(400, "invalid_request", f"{error}.")


def validation_error(_: AnyRequest, error: ValidationException) -> Response[ErrorAnswer]:
    """Name the first field that is wrong; the framework's list of them is not for people."""
    problem = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    said, field, hint = str(problem.get("message", error.detail)), str(problem.get("key", "")), ""
    quoted = _QUOTED.search(said)
    if field in ("", "data"):
        field = (quoted[1] or quoted[2]) if quoted and ("field" in said or "parameter" in said) else ""
    if not field:
        said, hint = "The request body must be a JSON object.", "See /api/openapi.json."
    elif "issing required" in said:
        said = f"{field} is missing."
    elif "unknown field" in said:
        said = f"{field} is not a known field."
    else:
        said = f"{field}: {said[:1].lower()}{said[1:]}."
        hint = _AS_STRING if field == "amount" else ""
    return _answer(400, "invalid_request", said, hint=hint, param=field or None)


def http_error(request: AnyRequest, error: HTTPException) -> Response[ErrorAnswer]:
    if error.status_code >= 500:
        return unexpected_error(request, error)
    message = f"{error.detail}."
    hint = ""
    if error.status_code in (404, 405):
        message = f"There is no {request.method} {request.url.path}."
        hint = "See /api/openapi.json."
    elif error.status_code == 413:
        message = "The request body is larger than 1 MiB."
    headers = {key: value for key, value in (error.headers or {}).items() if key.lower() == "allow"}
    code = _CODES.get(error.status_code, "invalid_request")
    return _answer(error.status_code, code, message, hint=hint, headers=headers)


def unexpected_error(request: AnyRequest, error: Exception) -> Response[ErrorAnswer]:
    log.error("control_request_failed", method=request.method, path=request.url.path, exc_info=error)
    message = "Internal error in Tidemill; its log has the cause."
    return _answer(500, "internal_error", message)


def too_deep(_: AnyRequest, error: RecursionError) -> Response[ErrorAnswer]:
    return _answer(400, "invalid_request", "The request body is nested too deeply.")


ERROR_HANDLERS: ExceptionHandlersMap = {
    TidemillError: tidemill_error,
    LedgerError: ledger_error,
    ValidationException: validation_error,
    HTTPException: http_error,
    RecursionError: too_deep,
    Exception: unexpected_error,
}
