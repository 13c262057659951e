"""The objects of Anthropic's Messages API, as far as reading an answer needs them; texts stay undecoded.

Sources: Anthropic API reference, "Messages", "Streaming messages".
"""

import msgspec

from tidemill.engines.anthropic.usage import MessageUsage

NULL = msgspec.Raw(b"null")


class StreamDelta(msgspec.Struct):
    """A piece of a block, or of the message itself."""

    text: msgspec.Raw = NULL
    partial_json: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    stop_reason: str | None = None


class AnswerBlock(msgspec.Struct):
    """A content block of an answer, of any type."""

    type: str = ""
    text: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    id: msgspec.Raw = NULL
    name: msgspec.Raw = NULL
    input: msgspec.Raw = NULL


class WholeMessage(msgspec.Struct):
    """A message: whole, or as `message_start` has it."""

    id: msgspec.Raw = NULL
    usage: MessageUsage | None = None
    content: list[AnswerBlock] = []
    stop_reason: str | None = None


class StreamError(msgspec.Struct):
    """The error object of an `error` event."""

    type: str = "api_error"
    message: str = "The engine has failed."


class MessagesEvent(msgspec.Struct):
    """An event of a stream, of any type."""

    type: str = ""
    message: WholeMessage | None = None
    content_block: AnswerBlock | None = None
    delta: StreamDelta | None = None
    usage: MessageUsage | None = None
    error: StreamError | None = None
