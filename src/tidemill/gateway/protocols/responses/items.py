"""Translates items of OpenAI's Responses API to the messages of an OpenAI chat.

What an assistant said and which tools it called are items of their own there, and one message in a chat. Reasoning is
sent on only while the calls that followed it are being answered; that of earlier turns is left out, as OpenAI does.

Source: OpenAI API reference, "Responses", the input item types.
"""

import msgspec

from tidemill.gateway.errors import BadRequest, UnsupportedParameter
from tidemill.gateway.protocols.json_strings import EMPTY, NULL, is_null, is_string, joined

_encode = msgspec.json.Encoder().encode

BETWEEN_SYSTEM_TEXTS = b"\\n\\n"
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


class InputItem(msgspec.Struct):
    """An input item of any type, its texts undecoded."""

    type: str = "message"
    role: str = ""
    content: msgspec.Raw = NULL
    call_id: msgspec.Raw = NULL
    name: msgspec.Raw = NULL
    arguments: msgspec.Raw = NULL
    output: msgspec.Raw = NULL
    summary: msgspec.Raw = NULL


class ContentPart(msgspec.Struct):
    """A part of a message's content, or of what a tool gave."""

    type: str
    text: msgspec.Raw = NULL
    refusal: msgspec.Raw = NULL
    image_url: msgspec.Raw = NULL
    detail: msgspec.Raw = NULL
    file_data: msgspec.Raw = NULL
    filename: msgspec.Raw = NULL
    input_audio: msgspec.Raw = NULL


class ResponsesMessage(msgspec.Struct, omit_defaults=True):
    """A message of the translated chat."""

    role: str
    content: msgspec.Raw | list[dict[str, object]]
    reasoning_content: msgspec.Raw | None = None
    tool_calls: list[dict[str, object]] | None = None
    tool_call_id: msgspec.Raw | None = None


_decode_item = msgspec.json.Decoder(InputItem).decode
_decode_parts = msgspec.json.Decoder(list[ContentPart]).decode


def translate_items(items: list[msgspec.Raw], instructions: msgspec.Raw | None, *, own_from: int = 0) -> msgspec.Raw:
    """The messages of the chat. Raises BadRequest.

    `own_from`: where the request's own input begins, so that errors name its items and not those of its history.
    """
    read = [
        _read(raw, f"input[{at - own_from}]" if at >= own_from else "previous_response_id")
        for at, raw in enumerate(items)
    ]
    asked = max((at for at, (_, item) in enumerate(read) if item.type == "message" and item.role == "user"), default=-1)
    chat: list[ResponsesMessage] = []
    reasoning: list[msgspec.Raw] = []
    if instructions is not None:
        chat.append(ResponsesMessage("system", instructions))
    for at, (path, item) in enumerate(read):
        match item.type:
            case "message":
                _add_message(chat, item, path, reasoning)
            case "function_call":
                _add_call(_assistant(chat, reasoning), item, path)
            case "function_call_output":
                _add_output(chat, item, path)
            case "reasoning":
                reasoning = _reasoning(item, path) if at > asked else []
            case _:
                raise UnsupportedParameter(
                    f"'{path}.type' is {item.type!r}, which is not supported.",
                    hint="Send messages, function calls and their outputs.",
                    param=f"{path}.type",
                )
    return msgspec.Raw(_encode(chat))


def _read(raw: msgspec.Raw, path: str) -> tuple[str, InputItem]:
    try:
        return path, _decode_item(raw)
    except msgspec.DecodeError as error:
        raise BadRequest(f"'{path}' is not valid: {error}.", param=path) from error


def _add_message(chat: list[ResponsesMessage], item: InputItem, path: str, reasoning: list[msgspec.Raw]) -> None:
    role = _ROLES.get(item.role)
    if role is None:
        raise BadRequest(f"'{path}.role' is {item.role!r}.", hint="Send 'user' or 'assistant'.", param=f"{path}.role")
    content = _content(item.content, f"{path}.content")
    if role == "assistant":
        message = _assistant(chat, reasoning)
        if not isinstance(content, msgspec.Raw) or not isinstance(message.content, msgspec.Raw):
            raise BadRequest(f"'{path}.content' of an assistant message must be text.", param=f"{path}.content")
        said = bytes(message.content) != bytes(EMPTY)
        message.content = joined([message.content, content]) if said else content
        return
    first = chat[0] if len(chat) == 1 else None
    if role == "system" and first is not None and first.role == "system" and isinstance(content, msgspec.Raw):
        assert isinstance(first.content, msgspec.Raw)
        first.content = joined([first.content, content], BETWEEN_SYSTEM_TEXTS)  # templates want one, at the beginning
    else:
        chat.append(ResponsesMessage(role, content))


def _assistant(chat: list[ResponsesMessage], reasoning: list[msgspec.Raw]) -> ResponsesMessage:
    """The assistant's message that is being put together; takes the reasoning that came before it."""
    if not chat or chat[-1].role != "assistant":
        chat.append(ResponsesMessage("assistant", EMPTY))
    if reasoning:
        chat[-1].reasoning_content = joined(reasoning)
        reasoning.clear()
    return chat[-1]


def _add_call(message: ResponsesMessage, item: InputItem, path: str) -> None:
    for name, value in (("call_id", item.call_id), ("name", item.name), ("arguments", item.arguments)):
        if not is_string(value):
            raise BadRequest(f"'{path}.{name}' is missing.", param=f"{path}.{name}")
    function = {"name": item.name, "arguments": item.arguments}
    call: dict[str, object] = {"id": item.call_id, "type": "function", "function": function}
    message.tool_calls = [*(message.tool_calls or []), call]


def _add_output(chat: list[ResponsesMessage], item: InputItem, path: str) -> None:
    """What a tool gave. Only text fits into a tool message; images go into a user's message after it."""
    if not is_string(item.call_id):
        raise BadRequest(f"'{path}.call_id' is missing.", param=f"{path}.call_id")
    content = _content(item.output, f"{path}.output")
    rest: list[dict[str, object]] = []
    if not isinstance(content, msgspec.Raw):
        rest = [part for part in content if part["type"] != "text"]
        texts = [part["text"] for part in content if part["type"] == "text"]
        content = joined(text for text in texts if isinstance(text, msgspec.Raw))
    chat.append(ResponsesMessage("tool", content, tool_call_id=item.call_id))
    if rest:
        chat.append(ResponsesMessage("user", rest))


def _reasoning(item: InputItem, path: str) -> list[msgspec.Raw]:
    """The text of a reasoning item: in full, or what there is of a summary."""
    for value in (item.content, item.summary):
        if not is_null(value):
            texts = [part.text for part in _parts(value, path) if is_string(part.text)]
            if texts:
                return texts
    return []


def _parts(value: msgspec.Raw, path: str) -> list[ContentPart]:
    try:
        return _decode_parts(value)
    except msgspec.DecodeError as error:
        raise BadRequest(f"'{path}' must be a string or a list of parts: {error}.", param=path) from error


def _content(value: msgspec.Raw, path: str) -> msgspec.Raw | list[dict[str, object]]:
    """A text if it can be one, as not every engine and template takes a list of parts."""
    if is_string(value):
        return value
    parts = [_part(part, f"{path}[{at}]") for at, part in enumerate(_parts(value, path))]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if len(texts) == len(parts):
        return joined(text for text in texts if isinstance(text, msgspec.Raw))
    return parts


def _part(part: ContentPart, path: str) -> dict[str, object]:
    match part.type:
        case "input_text" | "output_text" | "text" if is_string(part.text):
            return {"type": "text", "text": part.text}
        case "refusal" if is_string(part.refusal):
            return {"type": "text", "text": part.refusal}
        case "input_image" if is_string(part.image_url):
            detail = {} if is_null(part.detail) else {"detail": part.detail}
            return {"type": "image_url", "image_url": {"url": part.image_url, **detail}}
        case "input_file" if is_string(part.file_data):
            name = {"filename": part.filename} if is_string(part.filename) else {}
            return {"type": "file", "file": {"file_data": part.file_data, **name}}
        case "input_audio" if not is_null(part.input_audio):
            return {"type": "input_audio", "input_audio": part.input_audio}
        case _:
            raise UnsupportedParameter(
                f"'{path}' is of type {part.type!r}, but has no supported content.",
                hint="Send input_text, input_image with an image_url, or input_file with file_data.",
                param=path,
            )
