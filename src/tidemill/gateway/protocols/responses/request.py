"""Parses requests of OpenAI's Responses API.

Translated to an OpenAI chat, so that every engine understands them.

Parameters that have a counterpart are translated, those that only OpenAI's own service can honour are refused by
name, and those that are not known pass through. The input items are in `responses_items`.

Source: OpenAI API reference, "Responses", "Create a model response".
"""

from typing import Any

import msgspec

from tidemill.gateway.errors import BadRequest, UnsupportedParameter
from tidemill.gateway.protocols.json_fields import Fields, given, integer, object_of, read_object, refuse_all_but, word
from tidemill.gateway.protocols.json_strings import NULL, is_null, is_string
from tidemill.gateway.protocols.request import MAX_TOKENS_LIMIT, ModelRequest, read_generation, size_of
from tidemill.gateway.protocols.responses.items import translate_items
from tidemill.gateway.protocols.responses.store import FinishedResponse, ResponseStore

_encode = msgspec.json.Encoder().encode
_decode_any = msgspec.json.Decoder().decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_objects = msgspec.json.Decoder(list[Fields]).decode

ONLY_AT_OPENAI: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "background_options": (),
    "conversation": (),
    "prompt": (),
    "moderation": (),
    "access_programs": (),
    "image": (),
    "context_management": ([],),
    "truncation": ("disabled",),
    "prompt_cache_options": (),
    "n": (1,),
    "logprobs": (False,),
}
"""Parameters that cannot be honoured, with the values that ask for nothing (null always does)."""

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content", "message.input_image.image_url")
"""What `include` may name. Reasoning is given in the open, so its encrypted form is never needed."""

_TRANSLATED = frozenset(
    "input instructions tools tool_choice text reasoning max_output_tokens max_tool_calls metadata include store"
    " previous_response_id top_logprobs stream_options".split()
) | frozenset(ONLY_AT_OPENAI)

OWN_NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
}
"""What the chat parameters are called here, for the errors that name them."""

_ECHOED: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "model": None,
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "auto",
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}
"""What a response says again of its request, and what it says where the request did not."""


class ResponsesRequest(ModelRequest, kw_only=True):
    """A translated request, and what its answer depends on."""

    items: list[msgspec.Raw]
    """Its own input."""
    echo: dict[str, Any]
    store: bool | None
    """None: the client does not say."""
    previous_id: str | None
    response_store: ResponseStore | None = None
    tenant_id: str = ""

    def own_name(self, parameter: str) -> str:
        return OWN_NAMES.get(parameter, parameter)

    def follow(self, history: list[msgspec.Raw]) -> None:
        """Prepend the items of earlier responses to the input. Raises BadRequest."""
        fields = self.ask.fields
        instructions = self.echo["instructions"]
        fields["messages"] = translate_items(
            [*history, *self.items],
            instructions if isinstance(instructions, msgspec.Raw) else None,
            own_from=len(history),
        )
        self.body_bytes = size_of(fields)

    @property
    def keeps(self) -> bool:
        """True if the response is to be stored, by the request or the operator's default."""
        return self.response_store is not None and self.response_store.keeps(self.store)

    def keep(self, response_id: str, response: bytes) -> bool:
        """Put the finished response into the store; False when it has no room."""
        if self.response_store is None:
            return False
        kept = FinishedResponse(response_id, self.tenant_id, self.previous_id, self.items, response)
        return self.response_store.keep(kept)


def read_responses(body: bytes) -> ResponsesRequest:
    """Parse the body of POST /v1/responses. Raises BadRequest, which names the parameter."""
    return read_object(body, _read)


def _read(fields: Fields) -> ResponsesRequest:
    refuse_all_but(ONLY_AT_OPENAI, fields)
    items = _items(fields)
    chat = {name: value for name, value in fields.items() if name not in _TRANSLATED}
    if given(fields, "max_output_tokens"):
        integer(fields, "max_output_tokens", low=1, high=MAX_TOKENS_LIMIT)
        chat["max_tokens"] = fields["max_output_tokens"]
    _include(fields, chat)
    _tools(fields, chat)
    _text(fields, chat)
    _reasoning(fields, chat)
    instructions = fields.get("instructions", NULL)
    if not is_null(instructions) and not is_string(instructions):
        raise BadRequest("'instructions' must be a string.", param="instructions")
    previous_id = word(fields, "previous_response_id", "previous_response_id") or None
    # With a history, the items are translated once that is known.
    own = [] if previous_id else items
    chat["messages"] = translate_items(own, instructions if is_string(instructions) else None)
    base = read_generation(b"/chat/completions", chat, size_of(chat), max_tokens_field="max_tokens", prompts=1)
    store = fields.get("store", NULL)
    if bytes(store) not in (b"null", b"true", b"false"):
        raise BadRequest("'store' must be true or false.", param="store")
    return ResponsesRequest(
        **msgspec.structs.asdict(base),
        items=items,
        echo={name: fields[name] if given(fields, name) else default for name, default in _ECHOED.items()},
        store=None if bytes(store) == b"null" else bytes(store) == b"true",
        previous_id=previous_id,
    )


def _items(fields: Fields) -> list[msgspec.Raw]:
    given_input = fields.get("input", NULL)
    if is_string(given_input):
        return [msgspec.Raw(_encode({"type": "message", "role": "user", "content": given_input}))]
    try:
        items = _decode_list(given_input)
    except msgspec.DecodeError:
        items = []
    if not items:
        raise BadRequest("'input' must be a string or a non-empty list.", param="input")
    return items


def _include(fields: Fields, chat: Fields) -> None:
    """Log probabilities; what else `include` names is given without being asked for, or refused."""
    included = _decode_any(fields["include"]) if "include" in fields else None
    for at, item in enumerate(included if isinstance(included, list) else []):
        if item not in INCLUDABLE:
            raise UnsupportedParameter(f"'include[{at}]' is {item!r}, which is not supported.", param="include")
    top = integer(fields, "top_logprobs", low=0, high=20)
    if top or (isinstance(included, list) and LOGPROBS in included):
        chat["logprobs"] = msgspec.Raw(b"true")
        if top:
            chat["top_logprobs"] = fields["top_logprobs"]


def _tools(fields: Fields, chat: Fields) -> None:
    tools: list[Fields] = []
    if given(fields, "tools"):
        try:
            tools = _decode_objects(fields["tools"])
        except msgspec.DecodeError as error:
            raise BadRequest("'tools' must be a list of objects.", param="tools") from error
    functions = [_function(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    if given(fields, "tool_choice"):
        functions = _tool_choice(fields["tool_choice"], functions, chat)
    if functions:
        chat["tools"] = msgspec.Raw(_encode([{"type": "function", "function": function} for function in functions]))


def _function(tool: Fields, path: str) -> Fields:
    kind = word(tool, "type", f"{path}.type")
    if kind != "function":
        raise UnsupportedParameter(
            f"'{path}.type' is {kind!r}: only tools of type 'function' are supported.",
            hint="Define your own functions.",
            param=f"{path}.type",
        )
    if not is_string(tool.get("name", NULL)):
        raise BadRequest(f"'{path}.name' is missing.", param=f"{path}.name")
    return {name: value for name, value in tool.items() if name != "type" and not is_null(value)}


def _tool_choice(value: msgspec.Raw, functions: list[Fields], chat: Fields) -> list[Fields]:
    """Translate the choice; gives the functions that it leaves."""
    if is_string(value):
        if functions:
            chat["tool_choice"] = value
        return functions
    choice = _decode_any(value)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        chat["tool_choice"] = msgspec.Raw(_encode({"type": "function", "function": {"name": choice.get("name")}}))
        return functions
    if kind == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = [tool.get("name") for tool in choice["tools"] if isinstance(tool, dict)]
        chat["tool_choice"] = msgspec.Raw(_encode(choice.get("mode", "auto")))
        return [function for function in functions if _decode_any(function["name"]) in allowed]
    raise UnsupportedParameter(
        "'tool_choice' is of a type that is not supported.",
        hint="Send 'auto', 'none', 'required', a function or allowed_tools.",
        param="tool_choice",
    )


def _text(fields: Fields, chat: Fields) -> None:
    text = object_of(fields, "text")
    if given(text, "verbosity"):
        chat["verbosity"] = text["verbosity"]
    form = object_of(text, "format")
    kind = word(form, "type", "text.format.type")
    if kind == "json_schema":
        schema = {name: value for name, value in form.items() if name != "type"}
        chat["response_format"] = msgspec.Raw(_encode({"type": "json_schema", "json_schema": schema}))
    elif kind == "json_object":
        chat["response_format"] = msgspec.Raw(b'{"type":"json_object"}')
    elif kind not in ("", "text"):
        raise UnsupportedParameter(
            f"'text.format.type' is {kind!r}.", hint="Send text, json_schema or json_object.", param="text.format.type"
        )


def _reasoning(fields: Fields, chat: Fields) -> None:
    """Effort.

    A summary is not written, as the whole reasoning is in the answer: 'auto' is content with that.
    """
    reasoning = object_of(fields, "reasoning")
    if given(reasoning, "effort"):
        chat["reasoning_effort"] = reasoning["effort"]
    for name in ("summary", "generate_summary"):
        if word(reasoning, name, f"reasoning.{name}") not in ("", "auto"):
            raise UnsupportedParameter(
                f"'reasoning.{name}' must be 'auto': the full reasoning is in the answer.",
                param=f"reasoning.{name}",
            )
