"""Reading a chat request: one pass over the JSON, which leaves undecoded what only the engine needs.

A prompt of 128k tokens is half a megabyte of JSON. It is checked for being JSON and cut into its top-level members;
the messages themselves are never decoded here.
"""

import msgspec

from tidemill.engines.protocol import Ask
from tidemill.gateway.errors import BadRequest

MAX_CHOICES = 128
"""OpenAI's limit for `n`."""
MAX_TOKENS_LIMIT = 2**31 - 1

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_any = msgspec.json.Decoder().decode
_decode_options = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_NULL = b"null"
MAX_SCALAR_BYTES = 4096
"""A longer value is no number, flag or model's name, and is not decoded to find out."""


class ChatRequest(msgspec.Struct):
    """A chat completion request, as far as the gateway needs to understand it."""

    model: str
    ask: Ask
    body_bytes: int


def parse_chat(body: bytes) -> ChatRequest:
    """Take a request body apart. Raises BadRequest, which names the parameter and says what to do."""
    fields = parse_object(body)
    model = _string(fields, "model")
    messages = fields.get("messages")
    if messages is None:
        raise BadRequest("'messages' is missing.", hint="Send a list of messages.", param="messages")
    if not _is_filled_list(messages):
        raise BadRequest("'messages' is not a list with at least one message.", param="messages")
    stream = _boolean(fields, "stream")
    field = "max_completion_tokens" if _given(fields, "max_completion_tokens") else "max_tokens"
    max_tokens = _integer(fields, field, low=1, high=MAX_TOKENS_LIMIT)
    choices = _integer(fields, "n", low=1, high=MAX_CHOICES)
    ask = Ask(
        fields=fields,
        stream=stream,
        wants_usage=_wants_usage(fields, stream),
        choices=choices or 1,
        max_tokens_field=field,
        max_tokens=max_tokens,
    )
    return ChatRequest(model, ask, len(body))


def parse_object(body: bytes) -> dict[str, msgspec.Raw]:
    """The top-level members of a JSON object. Raises BadRequest."""
    if not body:
        raise BadRequest("The request has no body.", hint="Send a JSON object.")
    try:
        return _decode_object(body)
    except msgspec.ValidationError as error:
        raise BadRequest("The request body is JSON, but not an object.", hint="Send {...}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", hint="Check it with a linter.") from error


def _is_filled_list(value: msgspec.Raw) -> bool:
    """A JSON array with something in it, told by its first two letters without a copy."""
    view = memoryview(value)
    if view[0] != ord("["):
        return False
    at = 1
    while view[at] in b" \n\t\r":  # valid JSON, so the bracket that closes it is there
        at += 1
    return view[at] != ord("]")


def _given(fields: dict[str, msgspec.Raw], name: str) -> bool:
    value = fields.get(name)
    return value is not None and bytes(value) != _NULL


def _value(fields: dict[str, msgspec.Raw], name: str) -> object:
    value = fields.get(name)
    if value is None or memoryview(value).nbytes > MAX_SCALAR_BYTES:
        return value
    return _decode_any(value)


def _string(fields: dict[str, msgspec.Raw], name: str) -> str:
    value = _value(fields, name)
    if not isinstance(value, str) or not value:
        what = "is missing" if name not in fields else "is not a non-empty string"
        raise BadRequest(f"'{name}' {what}.", hint="GET /v1/models lists the models.", param=name)
    return value


def _boolean(fields: dict[str, msgspec.Raw], name: str) -> bool:
    value = _value(fields, name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise BadRequest(f"'{name}' is not true or false.", param=name)
    return value


def _integer(fields: dict[str, msgspec.Raw], name: str, *, low: int, high: int) -> int | None:
    value = _value(fields, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"'{name}' is not an integer.", hint=f"Send a number from {low} up.", param=name)
    if not low <= value <= high:
        raise BadRequest(f"'{name}' is {value}, but must be from {low} to {high}.", param=name)
    return value


def _wants_usage(fields: dict[str, msgspec.Raw], stream: bool) -> bool:
    if not _given(fields, "stream_options"):
        return False
    if not stream:
        raise BadRequest("'stream_options' is only for streams.", hint='Set "stream": true.', param="stream_options")
    try:
        options = _decode_options(fields["stream_options"])
    except msgspec.DecodeError as error:
        raise BadRequest("'stream_options' is not an object.", param="stream_options") from error
    return _boolean(options, "include_usage")
