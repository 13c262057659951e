"""Errors in the form of OpenAI's API, rendered in one place.

Source: OpenAI API reference, "Error codes": `{"error": {"message", "type", "param", "code"}}`.
"""

import msgspec

from tidemill.errors import TidemillError
from tidemill.http.head_lines import JSON

_encode = msgspec.json.Encoder().encode

RETRY_AFTER_S = 1

_TYPES = {401: "authentication_error", 402: "insufficient_quota", 403: "permission_error", 429: "rate_limit_error"}


def error_object(message: str, *, status: int, code: str | None, param: str | None = None) -> dict[str, object]:
    """The error object: `type` follows from the status, as OpenAI's do."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_body(error: TidemillError) -> bytes:
    """The JSON body of an error answer."""
    return _encode(error_object(str(error), status=error.status, code=error.code, param=error.param))


def error_headers(error: TidemillError) -> bytes:
    """The header lines of an error answer; a passing one says when to try again."""
    seconds = error.retry_after_s or RETRY_AFTER_S
    retry = b"retry-after: %d\r\n" % seconds if error.status in (429, 503) else b""
    return JSON + retry


def error_event(error: TidemillError) -> bytes:
    """An error in mid-stream: the last event before `[DONE]`, which OpenAI's clients raise as an APIError."""
    return b"data: " + error_body(error) + b"\n\n"
