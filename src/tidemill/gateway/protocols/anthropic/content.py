"""Translating Anthropic's messages and content blocks to those of an OpenAI chat.

Turns of the same role in a row are one turn, as Anthropic's reference says, so that templates which want the roles to
alternate are content. Tool results come before the rest of their turn. Thinking is sent on only while its tool calls
are being answered; that of earlier turns is left out, as Anthropic does.
"""

from typing import Any

import msgspec

from tidemill.gateway.errors import BadRequest, UnsupportedParameter
from tidemill.gateway.protocols.json_strings import (
    EMPTY,
    NULL,
    inside,
    is_null,
    is_string,
    joined,
    plain,
    prefixed,
    quoted,
)

_encode = msgspec.json.Encoder().encode

BILLING_HEADER = b"x-anthropic-billing-header"
"""Claude Code begins its system prompt with a block of this, which differs from request to request and would spoil
the prefix cache; it says nothing to a model."""


class MediaSource(msgspec.Struct):
    """Where an image or a document comes from."""

    type: str
    media_type: str = ""
    data: msgspec.Raw = NULL
    url: msgspec.Raw = NULL
    content: msgspec.Raw = NULL


class ContentBlock(msgspec.Struct):
    """A content block of any type, its texts undecoded."""

    type: str
    text: msgspec.Raw = NULL
    source: MediaSource | str | None = None
    id: msgspec.Raw = NULL
    name: msgspec.Raw = NULL
    input: msgspec.Raw = NULL
    tool_use_id: msgspec.Raw = NULL
    content: msgspec.Raw = NULL
    is_error: bool | None = None
    thinking: msgspec.Raw = NULL
    title: msgspec.Raw = NULL
    context: msgspec.Raw = NULL
    citations: dict[str, Any] | list[Any] | None = None


class AnthropicMessage(msgspec.Struct):
    """A message; its content is a string or a list of blocks."""

    role: str
    content: msgspec.Raw


class RoleTurn:
    """Messages of one role in a row."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.blocks: list[tuple[str, ContentBlock]] = []
        """Each with the path that an error names."""


_decode_messages = msgspec.json.Decoder(list[AnthropicMessage]).decode
_decode_blocks = msgspec.json.Decoder(list[ContentBlock]).decode


def read_system(value: msgspec.Raw) -> msgspec.Raw | None:
    """The system prompt as one JSON string; None when there is nothing in it. Raises BadRequest."""
    if is_string(value):
        return value
    texts = [
        _text(block, path)
        for path, block in _blocks(value, "system")
        if not inside(block.text).startswith(BILLING_HEADER)
    ]
    return joined(texts) if texts else None


def translate_messages(value: msgspec.Raw, system: msgspec.Raw | None) -> tuple[msgspec.Raw, bool]:
    """The messages of the chat, and whether the last of them is to be gone on with. Raises BadRequest."""
    turns = _turns(value)
    asked = max((at for at, turn in enumerate(turns) if _asks(turn)), default=-1)
    chat: list[dict[str, object]] = []
    if system is not None:
        chat.append({"role": "system", "content": system})
    for at, turn in enumerate(turns):
        match turn.role:
            case "user":
                chat += _user(turn)
            case "assistant":
                chat.append(_assistant(turn, with_thinking=at > asked))
            case _:
                chat.append({"role": "system", "content": joined(_text(block, path) for path, block in turn.blocks)})
    last = turns[-1]
    unfinished = last.role == "assistant"
    if unfinished and any(block.type == "tool_use" for _, block in last.blocks):
        raise BadRequest(
            "The last message calls a tool, and nothing answers it.", hint="Send its tool_result.", param="messages"
        )
    return msgspec.Raw(_encode(chat)), unfinished


def _turns(value: msgspec.Raw) -> list[RoleTurn]:
    try:
        messages = _decode_messages(value)
    except msgspec.DecodeError as error:
        raise BadRequest(f"'messages' cannot be taken: {error}.", param="messages") from error
    turns: list[RoleTurn] = []
    for at, message in enumerate(messages):
        if message.role not in ("user", "assistant", "system"):
            raise BadRequest(
                f"'messages.{at}.role' is {message.role!r}.",
                hint="Send 'user' or 'assistant', and the system prompt as 'system' beside the messages.",
                param=f"messages.{at}.role",
            )
        if not turns or turns[-1].role != message.role:
            turns.append(RoleTurn(message.role))
        path = f"messages.{at}.content"
        if is_string(message.content):
            turns[-1].blocks.append((path, ContentBlock("text", text=message.content)))
        else:
            turns[-1].blocks += _blocks(message.content, path)
    return turns


def _asks(turn: RoleTurn) -> bool:
    """A turn in which the user says something, rather than only a tool."""
    return turn.role == "user" and any(block.type != "tool_result" for _, block in turn.blocks)


def _blocks(value: msgspec.Raw, path: str) -> list[tuple[str, ContentBlock]]:
    try:
        return [(f"{path}.{at}", block) for at, block in enumerate(_decode_blocks(value))]
    except msgspec.DecodeError as error:
        raise BadRequest(f"'{path}' is neither a string nor a list of blocks: {error}.", param=path) from error


def _user(turn: RoleTurn) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    parts: list[msgspec.Raw | dict[str, object]] = []
    for path, block in turn.blocks:
        if block.type == "tool_result":
            results.append(_tool_result(block, path, parts))
        else:
            _add_content(block, path, parts)
    return [*results, {"role": "user", "content": _content(parts)}] if parts else results


def _content(parts: list[msgspec.Raw | dict[str, object]]) -> object:
    """A text if it can be one, as not every engine and template takes a list of parts."""
    texts = [part for part in parts if isinstance(part, msgspec.Raw)]
    if len(texts) == len(parts):
        return joined(texts)
    return [{"type": "text", "text": part} if isinstance(part, msgspec.Raw) else part for part in parts]


def _add_content(block: ContentBlock, path: str, parts: list[msgspec.Raw | dict[str, object]]) -> None:
    match block.type:
        case "text":
            parts.append(_text(block, path))
        case "image":
            parts.append({"type": "image_url", "image_url": {"url": _image_url(block, path)}})
        case "document":
            _add_document(block, path, parts)
        case "search_result":
            heads = [text for text in (block.title, _source_name(block)) if is_string(text)]
            texts = [_text(inner, at) for at, inner in _blocks(block.content, f"{path}.content")]
            parts.append(joined(heads + texts))
        case _:
            raise _unknown(block, path)


def _add_document(block: ContentBlock, path: str, parts: list[msgspec.Raw | dict[str, object]]) -> None:
    if isinstance(block.citations, dict) and block.citations.get("enabled"):
        raise UnsupportedParameter("Citations are not offered here.", hint="Leave them out.", param=f"{path}.citations")
    source = block.source
    parts += [text for text in (block.title, block.context) if is_string(text)]
    if isinstance(source, MediaSource) and source.type == "text" and is_string(source.data):
        parts.append(source.data)
    elif isinstance(source, MediaSource) and source.type == "content" and is_string(source.content):
        parts.append(source.content)
    elif isinstance(source, MediaSource) and source.type == "content":
        for at, inner in _blocks(source.content, f"{path}.source.content"):
            _add_content(inner, at, parts)
    elif isinstance(source, MediaSource) and source.type == "base64" and is_string(source.data):
        name = plain(block.title) if is_string(block.title) else "document.pdf"
        file = {"filename": name, "file_data": prefixed(f"data:{source.media_type};base64,", source.data)}
        parts.append({"type": "file", "file": file})
    else:
        raise _source_refused(path)


def _tool_result(block: ContentBlock, path: str, parts: list[msgspec.Raw | dict[str, object]]) -> dict[str, object]:
    """A tool's answer. Only text fits into a tool message; images go into the user's message after it."""
    if not is_string(block.tool_use_id):
        raise BadRequest(f"'{path}.tool_use_id' is missing.", param=f"{path}.tool_use_id")
    texts: list[msgspec.Raw] = []
    if is_string(block.content):
        texts.append(block.content)
    elif not is_null(block.content):
        for at, inner in _blocks(block.content, f"{path}.content"):
            found: list[msgspec.Raw | dict[str, object]] = []
            _add_content(inner, at, found)
            texts += [part for part in found if isinstance(part, msgspec.Raw)]
            parts += [part for part in found if not isinstance(part, msgspec.Raw)]
    text = joined(texts) if texts else EMPTY
    if block.is_error and inside(text)[:5].lower() != b"error":
        text = prefixed("Error: ", text)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _assistant(turn: RoleTurn, *, with_thinking: bool) -> dict[str, object]:
    texts: list[msgspec.Raw] = []
    thinking: list[msgspec.Raw] = []
    calls: list[dict[str, object]] = []
    for path, block in turn.blocks:
        match block.type:
            case "text":
                texts.append(_text(block, path))
            case "thinking":
                if is_string(block.thinking):
                    thinking.append(block.thinking)
            case "redacted_thinking":
                pass  # nobody here can read it
            case "tool_use":
                calls.append(_tool_call(block, path))
            case _:
                raise _unknown(block, path)
    message: dict[str, object] = {"role": "assistant", "content": joined(texts) if texts else EMPTY}
    if with_thinking and thinking:
        message["reasoning_content"] = joined(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_call(block: ContentBlock, path: str) -> dict[str, object]:
    for name, value in (("id", block.id), ("name", block.name)):
        if not is_string(value):
            raise BadRequest(f"'{path}.{name}' is missing.", param=f"{path}.{name}")
    arguments = b"{}" if is_null(block.input) else bytes(block.input)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": quoted(arguments)}}


def _text(block: ContentBlock, path: str) -> msgspec.Raw:
    if block.type != "text" or not is_string(block.text):
        raise BadRequest(f"'{path}' is not a text block with its 'text'.", param=path)
    return block.text


def _image_url(block: ContentBlock, path: str) -> msgspec.Raw:
    source = block.source
    if isinstance(source, MediaSource) and source.type == "base64" and is_string(source.data):
        return prefixed(f"data:{source.media_type};base64,", source.data)
    if isinstance(source, MediaSource) and source.type == "url" and is_string(source.url):
        return source.url
    raise _source_refused(path)


def _source_name(block: ContentBlock) -> msgspec.Raw:
    return quoted(block.source) if isinstance(block.source, str) else NULL


def _source_refused(path: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"'{path}.source' cannot be taken.",
        hint="Send the data itself as 'base64' or 'text', or an image's URL.",
        param=f"{path}.source",
    )


def _unknown(block: ContentBlock, path: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"'{path}.type' is {block.type!r}, which is not offered here.",
        hint="Send text, image, document, tool_use, tool_result or thinking blocks.",
        param=f"{path}.type",
    )
