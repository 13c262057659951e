"""Reading Anthropic's Messages requests, and translating them to a chat for an engine that needs one.

Parameters that have a counterpart are translated, those that mean something only at Anthropic are refused by name,
and those that are not known pass through. The messages themselves are in `content`.

Source: Anthropic API reference, "Messages" and "Count tokens".
"""

from collections.abc import Mapping

import msgspec

from tidemill.engines.anthropic.terms import BILLED_APART, MESSAGES, TOOL_CHOICES
from tidemill.engines.protocol import Ask, Engine
from tidemill.gateway.errors import BadRequest, UnsupportedParameter
from tidemill.gateway.protocols.anthropic.content import read_system, translate_messages
from tidemill.gateway.protocols.json_fields import (
    Fields,
    boolean,
    given,
    integer,
    is_filled_list,
    object_of,
    read_fields,
    read_object,
    refuse_all_but,
    string,
    word,
)
from tidemill.gateway.protocols.json_strings import is_null, is_string, quoted
from tidemill.gateway.protocols.request import MAX_TOKENS_LIMIT, ModelRequest, read_generation, size_of

_encode = msgspec.json.Encoder().encode
_decode_any = msgspec.json.Decoder().decode
_decode_objects = msgspec.json.Decoder(list[Fields]).decode
_decode_strings = msgspec.json.Decoder(list[str]).decode

ONLY_AT_ANTHROPIC: dict[str, tuple[object, ...]] = {
    **{name: harmless for name, (harmless, _) in BILLED_APART.items()},
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stream_options": (),
}
"""Parameters that cannot be honoured, with the values that ask for nothing (null always does)."""

_TRANSLATED = frozenset(
    "messages system tools tool_choice stop_sequences metadata thinking output_config output_format service_tier"
    " context_management cache_control diagnostics".split()
) | frozenset(ONLY_AT_ANTHROPIC)

OWN_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "chat_template_kwargs": "thinking",
    "thinking_budget_tokens": "thinking.budget_tokens",
    "thinking_token_budget": "thinking.budget_tokens",
}
"""What the chat parameters are called here, for the errors that name them."""

_TIERS = {"auto": "auto", "standard_only": "default"}


class MessagesRequest(ModelRequest, kw_only=True):
    """A request in Messages form, and as a chat once an engine needs that; and what its answer depends on."""

    native: Ask
    """As the client has sent it."""
    chat: Ask | None = None
    hides_thinking: bool = False
    """The client wants thinking blocks without their text."""
    stop_sequences: tuple[str, ...] = ()

    def prepare_for(self, engine: Engine, headers: Mapping[bytes, bytes]) -> None:
        self.native.betas = headers.get(b"anthropic-beta", b"")
        self.ask = self.ask_for(engine)
        if self.ask is not self.native:
            self.body_bytes = size_of(self.ask.fields)

    def ask_for(self, engine: Engine) -> Ask:
        ask = self.native if MESSAGES in engine.native else self.chat or self._translated()
        ask.filler = self.ask.filler
        return ask

    def _translated(self) -> Ask:
        chat = read_fields(self.native.fields, self._read_chat)
        self.chat = read_generation(b"/chat/completions", chat, 0, max_tokens_field="max_tokens", prompts=1).ask
        return self.chat

    def _read_chat(self, fields: Fields) -> Fields:
        refuse_all_but(ONLY_AT_ANTHROPIC, fields)
        chat = {name: value for name, value in fields.items() if name not in _TRANSLATED}
        self.hides_thinking = _thinking(fields, chat)
        system = read_system(fields["system"]) if given(fields, "system") else None
        chat["messages"], unfinished = translate_messages(fields["messages"], system)
        if unfinished:
            chat["continue_final_message"] = msgspec.Raw(b"true")
            chat["add_generation_prompt"] = msgspec.Raw(b"false")
        self.stop_sequences = _stop_sequences(fields, chat)
        _tools(fields, chat)
        _output(fields, chat)
        _manners(fields, chat)
        return chat

    def session(self) -> msgspec.Raw | None:
        if self.ask is self.native:
            return object_of(self.native.fields, "metadata").get("user_id")
        return super().session()

    def own_name(self, parameter: str) -> str:
        return OWN_NAMES.get(parameter, parameter)


def read_messages(body: bytes) -> MessagesRequest:
    """Take the body of POST /v1/messages apart. Raises BadRequest, which names the parameter."""
    return read_object(body, lambda fields: _read(fields, body))


def read_count(body: bytes) -> MessagesRequest:
    """Take the body of POST /v1/messages/count_tokens apart. Raises BadRequest."""
    one_token = {"max_tokens": msgspec.Raw(b"1"), "stream": msgspec.Raw(b"false")}
    return read_object(body, lambda fields: _read({**fields, **one_token}, body))


def _read(fields: Fields, body: bytes) -> MessagesRequest:
    if not given(fields, "max_tokens"):
        raise BadRequest("'max_tokens' is missing.", hint="Send the most tokens that you want.", param="max_tokens")
    messages = fields.get("messages")
    if messages is None or not is_filled_list(messages):
        raise BadRequest("'messages' is not a list with at least one message.", param="messages")
    ask = Ask(
        path=MESSAGES,
        fields=fields,
        stream=boolean(fields, "stream"),
        wants_usage=False,
        choices=1,
        max_tokens_field="max_tokens",
        max_tokens=integer(fields, "max_tokens", low=1, high=MAX_TOKENS_LIMIT),
        body=body,
    )
    return MessagesRequest(model=string(fields, "model"), ask=ask, body_bytes=len(body), native=ask)


def _thinking(fields: Fields, chat: Fields) -> bool:
    """Switch the chat template's thinking on or off, as Qwen's, GLM's and DeepSeek's templates call it.

    Says whether the client wants the text of the thinking left out. Without the parameter the model does as it does.
    """
    thinking = object_of(fields, "thinking")
    if not thinking:
        return False
    kind = word(thinking, "type", "thinking.type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise UnsupportedParameter(
            f"'thinking.type' is {kind!r}.", hint="Send 'enabled', 'disabled' or 'adaptive'.", param="thinking.type"
        )
    if kind != "adaptive":
        switch = msgspec.Raw(b"true" if kind == "enabled" else b"false")
        kwargs = {**object_of(chat, "chat_template_kwargs"), "enable_thinking": switch, "thinking": switch}
        chat["chat_template_kwargs"] = msgspec.Raw(_encode(kwargs))
    budget = integer(thinking, "budget_tokens", low=1, high=MAX_TOKENS_LIMIT)
    if kind == "enabled" and budget is not None:
        chat["thinking_budget_tokens"] = thinking["budget_tokens"]  # llama.cpp's name
        chat["thinking_token_budget"] = thinking["budget_tokens"]  # vLLM's
    display = word(thinking, "display", "thinking.display")
    if display not in ("", "summarized", "omitted"):
        raise BadRequest(f"'thinking.display' is {display!r}.", param="thinking.display")
    return display == "omitted"


def _stop_sequences(fields: Fields, chat: Fields) -> tuple[str, ...]:
    if not given(fields, "stop_sequences"):
        return ()
    try:
        stops = _decode_strings(fields["stop_sequences"])
    except msgspec.DecodeError as error:
        raise BadRequest("'stop_sequences' is not a list of strings.", param="stop_sequences") from error
    if stops:
        chat["stop"] = fields["stop_sequences"]
    return tuple(stops)


def _tools(fields: Fields, chat: Fields) -> None:
    if given(fields, "tools"):
        try:
            tools = _decode_objects(fields["tools"])
        except msgspec.DecodeError as error:
            raise BadRequest("'tools' is not a list of objects.", param="tools") from error
        if tools:
            chat["tools"] = msgspec.Raw(_encode([_tool(tool, f"tools.{at}") for at, tool in enumerate(tools)]))
    choice = object_of(fields, "tool_choice")
    if not choice:
        return
    kind = word(choice, "type", "tool_choice.type")
    if "tools" not in chat:
        if kind in ("any", "tool"):
            raise BadRequest("'tool_choice' asks for a tool, and there are no 'tools'.", param="tool_choice")
        return
    if kind == "tool":
        name = choice.get("name", msgspec.Raw(b"null"))
        if not is_string(name):
            raise BadRequest("'tool_choice.name' is missing.", param="tool_choice.name")
        chat["tool_choice"] = msgspec.Raw(_encode({"type": "function", "function": {"name": name}}))
    elif kind in TOOL_CHOICES:
        chat["tool_choice"] = quoted(TOOL_CHOICES[kind])
    else:
        raise BadRequest(
            f"'tool_choice.type' is {kind!r}.", hint="Send 'auto', 'any', 'tool' or 'none'.", param="tool_choice.type"
        )
    if boolean(choice, "disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = msgspec.Raw(b"false")


def _tool(tool: Fields, path: str) -> dict[str, object]:
    """One tool of the client's own as a function; what else it says of the tool goes along."""
    kind = word(tool, "type", f"{path}.type")
    if kind not in ("", "custom"):
        raise UnsupportedParameter(
            f"'{path}.type' is {kind!r}: a tool of Anthropic's own, which is not offered here.",
            hint="Give tools of your own with a name and an 'input_schema'.",
            param=f"{path}.type",
        )
    for name in ("name", "input_schema"):
        if not given(tool, name):
            raise BadRequest(f"'{path}.{name}' is missing.", param=f"{path}.{name}")
    ours = ("type", "input_schema", "cache_control", "eager_input_streaming", "defer_loading", "allowed_callers")
    function = {name: value for name, value in tool.items() if name not in ours and not is_null(value)}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _output(fields: Fields, chat: Fields) -> None:
    """Structured output and effort."""
    config = object_of(fields, "output_config")
    if given(config, "effort"):
        chat["reasoning_effort"] = config["effort"]
    path = "output_config.format" if given(config, "format") else "output_format"
    form = object_of(config, "format") or object_of(fields, "output_format")
    if not form:
        return
    kind = word(form, "type", f"{path}.type")
    if kind != "json_schema" or not given(form, "schema"):
        raise BadRequest(f"'{path}' is not a JSON schema with its 'type' and 'schema'.", param=path)
    schema = {"name": "output", "strict": True, "schema": form["schema"]}
    chat["response_format"] = msgspec.Raw(_encode({"type": "json_schema", "json_schema": schema}))


def _manners(fields: Fields, chat: Fields) -> None:
    """What says how to treat the request rather than what to answer."""
    metadata = object_of(fields, "metadata")
    if given(metadata, "user_id"):
        chat["user"] = quoted(word(metadata, "user_id", "metadata.user_id"))
    if given(fields, "service_tier"):
        tier = word(fields, "service_tier", "service_tier")
        chat["service_tier"] = quoted(_TIERS.get(tier, tier))
    context = object_of(fields, "context_management")
    edits = _decode_any(context["edits"]) if given(context, "edits") else []
    # Thinking of earlier turns is never sent on (see `content`), which is all that this edit asks for.
    if not all(isinstance(edit, dict) and edit.get("type") == "clear_thinking_20251015" for edit in edits or ()):
        raise UnsupportedParameter(
            "'context_management' is not offered here.", hint="Leave it out.", param="context_management"
        )
