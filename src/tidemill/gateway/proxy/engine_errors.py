"""What engines answer when they do not like a request, turned into the API's own errors."""

import msgspec

from tidemill.errors import TidemillError
from tidemill.gateway.errors import EngineError


class _Inner(msgspec.Struct):
    message: str = ""
    type: str | None = None
    code: str | int | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _Answer(msgspec.Struct):
    error: _Inner | str | None = None
    message: str | None = None
    detail: object = None


class _Counted(msgspec.Struct):
    input_tokens: int


_decode = msgspec.json.Decoder(_Answer).decode
_decode_counted = msgspec.json.Decoder(_Counted).decode

_CONTEXT_WORDS = (
    "context length",
    "context size",
    "context window",
    "maximum context",
    "maximum model length",
    "prompt is too long",
)

_TOO_LARGE = "is too large to process"
"""llama.cpp of an input whose embedding is asked for: `input (701 tokens) is too large to process. ...`."""

OPERATORS = (401, 402, 403)
"""What an upstream says of the operator's key and balance."""

_UNSUPPORTED_WORDS = ("is not supported", "not support", "failed to parse", "unknown reasoning format")


def engine_error(status: int, body: bytes, model: str) -> TidemillError:
    """The error for an engine's answer. An engine's own failure is a 502; a request it refuses keeps its status."""
    inner = _read(body)
    message, code = _sentence(inner.message), inner.code if isinstance(inner.code, str) else inner.type
    if _is_about_context(message, code):
        if inner.n_prompt_tokens and inner.n_ctx:
            message = f"The prompt has {inner.n_prompt_tokens} tokens; {model!r} takes {inner.n_ctx} with the answer."
        elif _TOO_LARGE in message:  # llama.cpp goes on with what its operator should set
            message = f"{message.partition(' is ')[0].capitalize()} is longer than {model!r} takes."
        return EngineError(f"{message} Shorten the prompt or ask for fewer tokens.", status=400, code=_CONTEXT_CODE)
    if status >= 500 and any(words in message.lower() for words in _UNSUPPORTED_WORDS):
        return EngineError(message, status=400, code="unsupported")  # some engines call a wrong wish their own failure
    if status in (429, 503, 529):
        status = min(status, 503)  # 529 is nobody's standard
        return EngineError(message or f"The engine of {model!r} is busy.", status=status, code=code)
    if 400 <= status < 500 and status not in OPERATORS:
        return EngineError(message or "The engine refuses this request.", status=status, code=code or "invalid_request")
    # What a broken engine says of itself is not for tenants, nor what an upstream says of the operator's key.
    reason = message if status < 400 else ""
    return EngineError(
        f"The engine of {model!r} has failed (status {status}). {reason}".strip(), status=502, code="engine_error"
    )


_CONTEXT_CODE = "context_length_exceeded"


def _read(body: bytes) -> _Inner:
    try:
        answer = _decode(body)
    except msgspec.DecodeError:
        return _Inner()
    if isinstance(answer.error, str):
        return _Inner(message=answer.error)
    return answer.error or _Inner(message=answer.message or "")


def _sentence(text: str) -> str:
    text = text.strip()[:2000]
    return text if not text or text[-1] in ".!?" else text + "."


def _is_about_context(message: str, code: str | None) -> bool:
    if code in (_CONTEXT_CODE, "exceed_context_size_error"):
        return True
    lowered = message.lower()
    return _TOO_LARGE in lowered or any(words in lowered for words in _CONTEXT_WORDS)


def counted_prompt(body: bytes) -> int | None:
    """The prompt's token count in an engine's answer to a counting request."""
    try:
        return _decode_counted(body).input_tokens
    except msgspec.DecodeError:
        return None
