"""An OpenAI chat as a request of Anthropic's Messages API.

What has no place there is refused by its name.

Sources: OpenAI API reference, "Create chat completion"; Anthropic API reference, "Messages", and its page on the
OpenAI SDK, whose choices are followed: system messages are hoisted, a `user` becomes `metadata.user_id`.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from tidemill.engines.anthropic.terms import TOOL_CHOICES
from tidemill.engines.capabilities import UNSUPPORTED_BY_OWN, asks_for_something
from tidemill.engines.protocol import Ask, Refusal, Unsupported

UNSUPPORTED: Unsupported = {
    **UNSUPPORTED_BY_OWN,
    "n": ((1,), "Ask several times."),
    "logprobs": ((False,), "It tells no probabilities."),
    "top_logprobs": ((0,), "It tells no probabilities."),
    "logit_bias": (({},), "Say in the prompt what you want."),
    "frequency_penalty": ((0,), "Say in the prompt what you want."),
    "presence_penalty": ((0,), "Say in the prompt what you want."),
    "seed": ((), "Its answers can't be repeated."),
    "prediction": ((), "Leave it out."),
}
"""Parameters of a chat that Messages has nothing for."""

_NOT_SENT = frozenset(
    "model messages stream stream_options max_tokens max_completion_tokens service_tier metadata prompt_cache_key"
    " prompt_cache_retention safety_identifier user stop tools tool_choice parallel_tool_calls response_format"
    " reasoning_effort temperature".split()
) | frozenset(UNSUPPORTED)
"""Parameters that are translated, read by the gateway, or ask for nothing that an answer would show."""
_AS_THEY_ARE = ("top_p", "top_k", "thinking")
_EFFORTS = {"minimal": "low"}
_NO_EFFORT = "none"
_ARGUMENTS_AS_TEXT = "INVALID_JSON"
"""Where arguments that are no object go, as Anthropic's documentation says."""
_EMPTY_SCHEMA = {"type": "object", "properties": {}}

_decode = msgspec.json.Decoder().decode

Block = dict[str, Any]


class Untranslatable(Exception):
    """A part of a chat has no place in a Messages request."""

    def __init__(self, parameter: str, hint: str) -> None:
        super().__init__(parameter)
        self.refusal = Refusal(parameter, hint)


def messages_request(ask: Ask) -> dict[str, Any]:
    """The members of the Messages request, but for `model`, `max_tokens` and `stream`.

    Raises Untranslatable.
    """
    chat = _members(ask.fields)
    request: dict[str, Any] = {name: chat[name] for name in _AS_THEY_ARE if name in chat}
    system, messages = _conversation(chat.get("messages"))
    request["messages"] = messages
    if system:
        request["system"] = [{"type": "text", "text": text} for text in system]
    if "stop" in chat:
        request["stop_sequences"] = [chat["stop"]] if isinstance(chat["stop"], str) else chat["stop"]
    if "temperature" in chat:
        request["temperature"] = _temperature(chat["temperature"])
    user = chat.get("user", chat.get("safety_identifier"))
    if user is not None:
        request["metadata"] = {"user_id": user}
    _tools(chat, request)
    output = _output(chat)
    if output:
        request["output_config"] = output
    return request


def _members(fields: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    """The parameters that say something, decoded. Raises Untranslatable for one that nobody knows."""
    try:
        chat = {name: _decode(value) for name, value in fields.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Untranslatable("messages", "Send UTF-8.") from error
    for name in fields.keys() - _NOT_SENT:
        if name not in _AS_THEY_ARE and asks_for_something(fields[name], ()):
            raise Untranslatable(name, "Its API has no place for it; leave it out.")
    return {name: value for name, value in chat.items() if value is not None}


# The conversation


def _conversation(messages: Any) -> tuple[list[str], list[Block]]:
    """The system prompt's texts, and the turns: Messages wants all tool results of a turn in one message."""
    system: list[str] = []
    turns: list[Block] = []
    if not isinstance(messages, list):
        raise Untranslatable("messages", "Send a list of messages.")
    for at, message in enumerate(messages):
        path = f"messages.{at}"
        if not isinstance(message, dict):
            raise Untranslatable(path, "Send an object with 'role' and 'content'.")
        match message.get("role"):
            case "system" | "developer":
                system += [block["text"] for block in _content(message.get("content"), path) if _is_text(block, path)]
                continue
            case "user":
                role, blocks = "user", _content(message.get("content"), path)
            case "tool":
                role, blocks = "user", [_tool_result(message, path)]
            case "assistant":
                role, blocks = "assistant", _assistant(message, path)
            case _:
                raise Untranslatable(f"{path}.role", "Send 'system', 'user', 'assistant' or 'tool'.")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    return system, turns


def _is_text(block: Block, path: str) -> bool:
    if block["type"] != "text":
        raise Untranslatable(f"{path}.content", "A system message has text only.")
    return True


def _content(content: Any, path: str) -> list[Block]:
    """A message's content as blocks; an empty text is none, as Anthropic refuses it."""
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise Untranslatable(f"{path}.content", "Send a text, or a list of parts.")
    blocks = [_part(part, f"{path}.content.{at}") for at, part in enumerate(content)]
    return [block for block in blocks if block.get("text") != ""]


def _part(part: Any, path: str) -> Block:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
            return {"type": "image", "source": _image(url, path)}
        case {"type": "file", "file": {"file_data": str(data), **file}}:
            return _document(data, file.get("filename"), path)
    raise Untranslatable(path, "Send text, images, or a PDF as 'file_data'.")


def _image(url: str, path: str) -> Block:
    if url.startswith("data:"):
        media_type, data = _data_url(url, path)
        return {"type": "base64", "media_type": media_type, "data": data}
    return {"type": "url", "url": url}


def _document(data: str, name: Any, path: str) -> Block:
    media_type, data = _data_url(data, path)
    document: Block = {"type": "document", "source": {"type": "base64", "media_type": media_type, "data": data}}
    return {**document, "title": name} if isinstance(name, str) else document


def _data_url(url: str, path: str) -> tuple[str, str]:
    """The media type and the base64 text of a data URL."""
    head, comma, data = url.partition(",")
    media_type = head.removeprefix("data:")
    if not comma or not media_type.endswith(";base64"):
        raise Untranslatable(path, "Send it as data:TYPE;base64,DATA.")
    return media_type.removesuffix(";base64").partition(";")[0], data


def _tool_result(message: Block, path: str) -> Block:
    call = message.get("tool_call_id")
    if not isinstance(call, str):
        raise Untranslatable(f"{path}.tool_call_id", "Send the id of the call that it answers.")
    blocks = _content(message.get("content"), path)
    result: Block = {"type": "tool_result", "tool_use_id": call}
    return {**result, "content": blocks} if blocks else result


def _assistant(message: Block, path: str) -> list[Block]:
    """What the model has said, but its thinking: the signature that it needs has no place in a chat."""
    blocks = _content(message.get("content"), path)
    for at, call in enumerate(message.get("tool_calls") or ()):
        match call:
            case {"id": str(call_id), "function": {"name": str(name), **function}}:
                given = _arguments(function.get("arguments"))
                blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": given})
            case _:
                raise Untranslatable(f"{path}.tool_calls.{at}", "Send functions with 'id', 'name' and 'arguments'.")
    return blocks


def _arguments(text: Any) -> Any:
    if not text:
        return {}
    try:
        found = _decode(text)
    except (msgspec.DecodeError, TypeError, UnicodeEncodeError, RecursionError):
        found = text
    return found if isinstance(found, dict) else {_ARGUMENTS_AS_TEXT: text}


# Its parameters


def _temperature(value: Any) -> Any:
    if isinstance(value, int | float) and value > 1:
        raise Untranslatable("temperature", "Send at most 1.")
    return value


def _tools(chat: Mapping[str, Any], request: dict[str, Any]) -> None:
    tools = chat.get("tools")
    if not tools:
        return
    if not isinstance(tools, list):
        raise Untranslatable("tools", "Send a list of functions.")
    request["tools"] = [_tool(tool, f"tools.{at}") for at, tool in enumerate(tools)]
    choice = _choice(chat.get("tool_choice"))
    if chat.get("parallel_tool_calls") is False and (choice or {}).get("type") != "none":
        choice = {**(choice or {"type": "auto"}), "disable_parallel_tool_use": True}
    if choice is not None:
        request["tool_choice"] = choice


def _tool(tool: Any, path: str) -> Block:
    match tool:
        case {"type": "function", "function": {"name": str(name), **function}}:
            told = {each: function[each] for each in ("description", "strict") if function.get(each) is not None}
            return {"name": name, **told, "input_schema": function.get("parameters") or _EMPTY_SCHEMA}
    raise Untranslatable(path, "Send functions with a name.")


def _choice(choice: Any) -> Block | None:
    match choice:
        case None:
            return None
        case {"type": "function", "function": {"name": str(name)}}:
            return {"type": "tool", "name": name}
    kind = next((theirs for theirs, ours in TOOL_CHOICES.items() if ours == choice), None)
    if kind is None:
        raise Untranslatable("tool_choice", "Send 'auto', 'none', 'required', or a function.")
    return {"type": kind}


def _output(chat: Mapping[str, Any]) -> dict[str, Any]:
    output: dict[str, Any] = {}
    effort = chat.get("reasoning_effort")
    if effort is not None and effort != _NO_EFFORT:
        output["effort"] = _EFFORTS.get(effort, effort) if isinstance(effort, str) else effort
    match chat.get("response_format"):
        case None | {"type": "text"}:
            pass
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            output["format"] = {"type": "json_schema", "schema": schema}
        case _:
            raise Untranslatable("response_format", "Send a 'json_schema', or ask for JSON in the prompt.")
    return output
