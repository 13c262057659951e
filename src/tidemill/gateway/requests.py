"""Reading requests: one pass over the JSON, which leaves undecoded what only the engine needs.

A prompt of 128k tokens is half a megabyte of JSON. It is checked for being JSON and cut into its top-level members;
the messages themselves are never decoded here.
"""

import msgspec

from tidemill.engines.protocol import Ask
from tidemill.gateway.errors import BadRequest

MAX_CHOICES = 128
"""OpenAI's limit for `n`."""
MAX_PROMPTS = 2048
"""OpenAI's limit for the inputs of one embeddings request."""
MAX_TOKENS_LIMIT = 2**31 - 1

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_any = msgspec.json.Decoder().decode
_decode_options = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_NULL = b"null"
MAX_SCALAR_BYTES = 4096
"""A longer value is no number, flag or model's name, and is not decoded to find out."""


class ModelRequest(msgspec.Struct):
    """A request for a model's work, as far as the gateway needs to understand it."""

    model: str
    ask: Ask
    body_bytes: int


def read_chat(body: bytes) -> ModelRequest:
    """Take the body of POST /v1/chat/completions apart. Raises BadRequest, which names the parameter."""
    fields = parse_object(body)
    messages = fields.get("messages")
    if messages is None:
        raise BadRequest("'messages' is missing.", hint="Send a list of messages.", param="messages")
    if not _is_filled_list(messages):
        raise BadRequest("'messages' is not a list with at least one message.", param="messages")
    field = "max_completion_tokens" if _given(fields, "max_completion_tokens") else "max_tokens"
    return _generation(b"/chat/completions", fields, len(body), max_tokens_field=field, prompts=1)


def read_completion(body: bytes) -> ModelRequest:
    """Take the body of POST /v1/completions apart. Raises BadRequest."""
    fields = parse_object(body)
    if not _given(fields, "prompt"):
        raise BadRequest("'prompt' is missing.", hint="Send a string, or a list of strings.", param="prompt")
    if _integer(fields, "best_of", low=1, high=MAX_CHOICES) not in (None, 1):
        raise BadRequest("'best_of' is not offered.", hint="Use 'n' and choose yourself.", param="best_of")
    prompts = _prompt_count(fields["prompt"], "prompt")
    return _generation(b"/completions", fields, len(body), max_tokens_field="max_tokens", prompts=prompts)


def read_embeddings(body: bytes) -> ModelRequest:
    """Take the body of POST /v1/embeddings apart. Raises BadRequest."""
    fields = parse_object(body)
    model = _string(fields, "model")
    if not _given(fields, "input"):
        raise BadRequest("'input' is missing.", hint="Send a string, or a list of strings.", param="input")
    _prompt_count(fields["input"], "input")
    ask = Ask(
        path=b"/embeddings",
        fields=fields,
        stream=False,
        wants_usage=False,
        choices=1,
        max_tokens_field="",
        max_tokens=None,
        generates=False,
    )
    return ModelRequest(model, ask, len(body))


def _generation(
    path: bytes, fields: dict[str, msgspec.Raw], body_bytes: int, *, max_tokens_field: str, prompts: int
) -> ModelRequest:
    model = _string(fields, "model")
    stream = _boolean(fields, "stream")
    max_tokens = _integer(fields, max_tokens_field, low=1, high=MAX_TOKENS_LIMIT)
    choices = _integer(fields, "n", low=1, high=MAX_CHOICES)
    ask = Ask(
        path=path,
        fields=fields,
        stream=stream,
        wants_usage=_wants_usage(fields, stream),
        choices=(choices or 1) * prompts,
        prompts=prompts,
        max_tokens_field=max_tokens_field,
        max_tokens=max_tokens,
    )
    return ModelRequest(model, ask, body_bytes)


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


def _prompt_count(value: msgspec.Raw, name: str) -> int:
    """How many prompts a `prompt` or `input` holds: a string or a list of token ids is one. Raises BadRequest."""
    first = memoryview(value)[0]
    if first == ord('"'):
        return 1
    if first != ord("[") or not _is_filled_list(value):
        raise BadRequest(f"'{name}' is neither a string nor a list with something in it.", param=name)
    parts = _decode_list(value)
    if all(_kind(part) in b'"[' for part in parts):
        if len(parts) > MAX_PROMPTS:
            raise BadRequest(f"'{name}' has {len(parts)} entries; send at most {MAX_PROMPTS}.", param=name)
        return len(parts)
    return 1


def _kind(value: msgspec.Raw) -> int:
    return memoryview(value)[0]


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
