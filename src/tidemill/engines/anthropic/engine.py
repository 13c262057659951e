"""A vendor's API, or any server, that speaks Anthropic's Messages. See `engines.protocol.Engine`.

A client that speaks Messages gets what the upstream says, byte for byte; for one that speaks chat it is translated.

Source: Anthropic API reference, "Messages", "Count tokens", "List models", "Versions", "Beta headers".
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from tidemill.clock import now_us
from tidemill.engines.anthropic.chat_answer import ChatTap, completion_of
from tidemill.engines.anthropic.chat_request import UNSUPPORTED, Untranslatable, messages_request
from tidemill.engines.anthropic.stream import MessagesTap
from tidemill.engines.anthropic.terms import (
    BETAS,
    BILLED_APART,
    CLIENT_TOOLS,
    COUNT_TOKENS,
    COUNTED,
    DOCUMENT_TOKENS,
    IMAGE_TOKENS,
    MESSAGES,
    VERSION,
)
from tidemill.engines.anthropic.usage import usage_of
from tidemill.engines.json_members import with_members
from tidemill.engines.kind import EngineKind
from tidemill.engines.protocol import Ask, Counters, Probe, Refusal, TokenCounts, Unsupported

CHAT = b"/chat/completions"
_UNSUPPORTED: Unsupported = {**UNSUPPORTED, **BILLED_APART}


class _Tool(msgspec.Struct):
    type: str | None = ""


_decode_tools = msgspec.json.Decoder(list[_Tool]).decode
_encode = msgspec.json.Encoder().encode


class AnthropicEngine:
    """See `engines.protocol.Engine`."""

    kind = "anthropic"
    collects = False
    unsupported: Unsupported = _UNSUPPORTED
    native: frozenset[bytes] = frozenset((MESSAGES,))
    probes: tuple[Probe, ...] = (Probe(b"/models?limit=1"),)

    def __init__(self, *, owned: bool = False) -> None:
        self.owned = owned

    def auth_headers(self, key: str | None) -> Mapping[str, str]:
        version = {"anthropic-version": VERSION}
        return {"x-api-key": key, **version} if key else version

    def path(self, ask: Ask) -> bytes:
        return MESSAGES

    def headers(self, ask: Ask) -> bytes:
        """The betas that the client asks for, as far as they may be."""
        asked = (each.strip() for each in ask.betas.decode("latin-1").split(","))
        betas = [each for each in asked if each.startswith(BETAS) and each.isascii() and each.isprintable()]
        return f"anthropic-beta: {','.join(betas)}\r\n".encode("ascii") if betas else b""

    def unseen_tokens(self, ask: Ask) -> int:
        """The most tokens of images and documents, which may be small as data, or be addresses.

        It is told by the names of their types: where a text has these words, the hold is higher, too.
        """
        text = bytes(ask.fields.get("messages", b""))
        documents = DOCUMENT_TOKENS if b'"document"' in text or b'"file"' in text else 0
        return documents + IMAGE_TOKENS * (text.count(b'"image"') + text.count(b'"image_url"'))

    def refuses(self, ask: Ask) -> Refusal | None:
        if ask.path == MESSAGES:
            return _refused_tool(ask)
        if ask.path != CHAT:
            parameter = "prompt" if "prompt" in ask.fields else "model"
            return Refusal(parameter, "Its API has chats only: POST /v1/chat/completions or /v1/messages.")
        try:
            _messages_of(ask)
        except Untranslatable as error:
            return error.refusal
        return None

    def body(self, ask: Ask, *, model: str, output_cap: int) -> bytes:
        """A Messages request passes byte for byte, but for the model's name and the limit."""
        if ask.path == MESSAGES:
            changes = {"model": _encode(model), "max_tokens": b"%d" % output_cap}
            return with_members(ask.body, ask.fields, changes)
        return _encode({"model": model, "max_tokens": output_cap, "stream": ask.stream, **_messages_of(ask)})

    def tap(self, ask: Ask) -> MessagesTap:
        if ask.path == MESSAGES:
            return MessagesTap()
        return ChatTap(model=bytes(ask.fields["model"]), created=_now(), wants_usage=ask.wants_usage)

    def usage(self, body: bytes) -> TokenCounts | None:
        return usage_of(body)

    def answer(self, ask: Ask, body: bytes) -> bytes:
        return body if ask.path == MESSAGES else completion_of(body, model=ask.fields["model"], created=_now())

    def count(self, ask: Ask, *, model: str) -> tuple[bytes, bytes] | None:
        members: Mapping[str, Any] = ask.fields if ask.path == MESSAGES else _messages_of(ask)
        return COUNT_TOKENS, _encode(
            {"model": model, **{name: value for name, value in members.items() if name in COUNTED}}
        )

    def counters(self, metrics: str) -> Counters | None:
        return None


def _messages_of(ask: Ask) -> dict[str, Any]:
    """A chat in Messages form, translated once. Raises Untranslatable."""
    made = ask.made
    if not isinstance(made, dict):
        made = ask.made = messages_request(ask)
    return made


def _refused_tool(ask: Ask) -> Refusal | None:
    """A tool that runs at the upstream, and is billed by its use."""
    tools = ask.fields.get("tools")
    if tools is None:
        return None
    try:
        types = [tool.type or "" for tool in _decode_tools(tools)]
    except msgspec.DecodeError:
        return None  # the upstream says what is wrong
    for at, kind in enumerate(types):
        if kind and not kind.startswith(CLIENT_TOOLS):
            return Refusal(f"tools.{at}.type", "It runs at the upstream, which bills it apart; give tools of your own.")
    return None


def _now() -> int:
    return now_us() // 1_000_000


KIND = EngineKind(
    name="anthropic", engine=lambda options: AnthropicEngine(owned=options.owned), embeds=False, ranks=False
)
