"""Errors as OpenAI's clients expect them, rendered in one place.

Source: OpenAI API reference, "Error codes": `{"error": {"message", "type", "param", "code"}}`.
"""

import msgspec

from tidemill.errors import TidemillError

_encode = msgspec.json.Encoder().encode

RETRY_AFTER_S = 1


class BadRequest(TidemillError):
    """The request cannot be taken as it is."""

    status = 400
    code = "invalid_request_error"


class UnsupportedParameter(BadRequest):
    """A parameter that cannot be honoured: better refused by its name than left out unseen."""

    code = "unsupported_parameter"


class NoEmbeddings(BadRequest):
    """The model answers, and gives no embeddings."""

    code = "model_gives_no_embeddings"


class InvalidKey(TidemillError):
    """No key, or one that does not exist or was revoked."""

    status = 401
    code = "invalid_api_key"


class ModelNotFound(TidemillError):
    """No model of that name."""

    status = 404
    code = "model_not_found"


class InsufficientQuota(TidemillError):
    """The tenant's balance does not cover what the request may cost."""

    status = 402
    code = "insufficient_quota"


class BodyTooLarge(TidemillError):
    """The body is larger than the gateway takes."""

    status = 413
    code = "request_too_large"


class HttpRefusal(TidemillError):
    """What was sent is not a request that anything here answers."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ModerationNotConfigured(TidemillError):
    """The route is there, and no model behind it. Not a 501: clients try those again."""

    status = 404
    code = "moderation_not_configured"


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
    return b"content-type: application/json\r\n" + retry


def error_event(error: TidemillError) -> bytes:
    """An error in mid-stream: the last event before `[DONE]`, which OpenAI's clients raise as an APIError."""
    return b"data: " + error_body(error) + b"\n\n"
