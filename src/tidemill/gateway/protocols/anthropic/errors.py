"""Errors as Anthropic's clients expect them, rendered in one place.

Source: Anthropic API reference, "Errors": `{"type": "error", "error": {"type", "message"}, "request_id"}`, in a
stream as an event named `error`.
"""

import msgspec

from tidemill.engines.anthropic.terms import ERROR_TYPES
from tidemill.errors import TidemillError

_encode = msgspec.json.Encoder().encode


def error_body(error: TidemillError, request_id: str) -> bytes:
    """The JSON body of an error answer.

    `code` and `param` are as in the OpenAI form, for whoever looks for them.
    """
    kind = ERROR_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")
    detail = {"type": kind, "message": str(error), "code": error.code}
    if error.param is not None:
        detail["param"] = error.param
    return _encode({"type": "error", "error": detail, "request_id": request_id})


def error_event(error: TidemillError, request_id: str) -> bytes:
    """An error in mid-stream; nothing follows it."""
    return b"event: error\ndata: " + error_body(error, request_id) + b"\n\n"


class StreamFailed(TidemillError):
    """The engine has said in mid-stream that it failed."""

    status = 502


def error_of(message: str, code: str) -> TidemillError:
    """What an engine said of its failure, as an error."""
    error = StreamFailed(message)
    error.code = code
    return error
