"""Request parsing: one pass over the JSON, which leaves undecoded what only the engine needs.

A prompt of 128k tokens is half a megabyte of JSON. It is checked for being JSON and cut into its top-level members;
the messages themselves are never decoded here.
"""

from collections.abc import Mapping

import msgspec

from tidemill.engines.protocol import Ask, Engine
from tidemill.gateway.errors import BadRequest
from tidemill.gateway.protocols.json_fields import (
    Fields,
    boolean,
    given,
    integer,
    is_filled_list,
    kind,
    parse_object,
    string,
)

MAX_CHOICES = 128
"""OpenAI's limit for `n`."""
MAX_PROMPTS = 2048
"""OpenAI's limit for the inputs of one embeddings request."""
MAX_TOKENS_LIMIT = 2**31 - 1

_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_options = msgspec.json.Decoder(Fields).decode


class ModelRequest(msgspec.Struct):
    """A request for a model's work, as far as the gateway needs to understand it."""

    model: str
    ask: Ask
    body_bytes: int
    """The size of what the engine is asked, which bounds the prompt's tokens."""

    def prepare_for(self, engine: Engine, headers: Mapping[bytes, bytes]) -> None:
        """Make `ask` what the engine of the model that was asked for takes. `headers` are the request's.

        Raises BadRequest where that cannot be.
        """

    def ask_for(self, engine: Engine) -> Ask:
        """The request as another engine takes it. Raises BadRequest where that cannot be."""
        return self.ask

    def session(self) -> msgspec.Raw | None:
        """What the client says that belongs together, undecoded. Raises BadRequest."""
        fields = self.ask.fields
        return fields.get("prompt_cache_key") or fields.get("user")

    def own_name(self, parameter: str) -> str:
        """The name of a chat parameter in the client's API."""
        return parameter


def read_chat(body: bytes) -> ModelRequest:
    """Parse the body of POST /v1/chat/completions. Raises BadRequest, which names the parameter."""
    fields = parse_object(body)
    messages = fields.get("messages")
    if messages is None:
        raise BadRequest("'messages' is missing.", hint="Send a list of messages.", param="messages")
    if not is_filled_list(messages):
        raise BadRequest("'messages' must be a list with at least one message.", param="messages")
    field = "max_completion_tokens" if given(fields, "max_completion_tokens") else "max_tokens"
    return read_generation(b"/chat/completions", fields, len(body), max_tokens_field=field, prompts=1)


def read_completion(body: bytes) -> ModelRequest:
    """Parse the body of POST /v1/completions. Raises BadRequest."""
    fields = parse_object(body)
    if not given(fields, "prompt"):
        raise BadRequest("'prompt' is missing.", hint="Send a string, or a list of strings.", param="prompt")
    if integer(fields, "best_of", low=1, high=MAX_CHOICES) not in (None, 1):
        raise BadRequest(
            "'best_of' is not supported.", hint="Use 'n', and choose among the answers yourself.", param="best_of"
        )
    prompts = _prompt_count(fields["prompt"], "prompt")
    return read_generation(b"/completions", fields, len(body), max_tokens_field="max_tokens", prompts=prompts)


def read_embeddings(body: bytes) -> ModelRequest:
    """Parse the body of POST /v1/embeddings. Raises BadRequest."""
    fields = parse_object(body)
    model = string(fields, "model")
    if not given(fields, "input"):
        raise BadRequest("'input' is missing.", hint="Send a string, or a list of strings.", param="input")
    ask = Ask(
        path=b"/embeddings",
        fields=fields,
        stream=False,
        wants_usage=False,
        choices=1,
        max_tokens_field="",
        max_tokens=None,
        prompts=_prompt_count(fields["input"], "input"),
        generates=False,
    )
    return ModelRequest(model, ask, len(body))


def read_generation(
    path: bytes, fields: Fields, body_bytes: int, *, max_tokens_field: str, prompts: int
) -> ModelRequest:
    """Read what the gateway needs of a request in OpenAI's form. Raises BadRequest."""
    model = string(fields, "model")
    stream = boolean(fields, "stream")
    max_tokens = integer(fields, max_tokens_field, low=1, high=MAX_TOKENS_LIMIT)
    choices = integer(fields, "n", low=1, high=MAX_CHOICES)
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


def size_of(fields: Fields) -> int:
    """The size in bytes of an object of these members as JSON."""
    return 1 + sum(len(name) + memoryview(value).nbytes + 4 for name, value in fields.items())


def _prompt_count(value: msgspec.Raw, name: str) -> int:
    """The number of prompts in a `prompt` or `input`; a string or a list of token ids is one.

    Raises BadRequest.
    """
    first = memoryview(value)[0]
    if first == ord('"'):
        return 1
    if first != ord("[") or not is_filled_list(value):
        raise BadRequest(f"'{name}' must be a string or a non-empty list.", param=name)
    parts = _decode_list(value)
    if all(kind(part) in b'"[' for part in parts):
        if len(parts) > MAX_PROMPTS:
            raise BadRequest(f"'{name}' has {len(parts)} entries; at most {MAX_PROMPTS} are allowed.", param=name)
        return len(parts)
    return 1


def _wants_usage(fields: Fields, stream: bool) -> bool:
    if not given(fields, "stream_options"):
        return False
    if not stream:
        raise BadRequest(
            "'stream_options' is only allowed with 'stream'.", hint='Set "stream": true.', param="stream_options"
        )
    try:
        options = _decode_options(fields["stream_options"])
    except msgspec.DecodeError as error:
        raise BadRequest("'stream_options' must be an object.", param="stream_options") from error
    return boolean(options, "include_usage")
