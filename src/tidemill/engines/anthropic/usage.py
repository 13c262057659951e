"""What an answer of Anthropic's Messages API has used.

Sources: Anthropic API reference, "Messages" and "Streaming messages": the usage of a stream is cumulative. "Prompt
caching": `input_tokens` leave out what was read from the cache, and what was written to it.
"""

import msgspec

from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream, bounded

_NULL = msgspec.Raw(b"null")


class _Details(msgspec.Struct):
    thinking_tokens: int | None = None


class MessageUsage(msgspec.Struct):
    """The usage object of a message, or of an event."""

    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: msgspec.Raw = _NULL

    def with_later(self, later: "MessageUsage") -> "MessageUsage":
        """Usage is cumulative: what is not told again stays."""
        return MessageUsage(
            _larger(self.input_tokens, later.input_tokens),
            _larger(self.cache_creation_input_tokens, later.cache_creation_input_tokens),
            _larger(self.cache_read_input_tokens, later.cache_read_input_tokens),
            _larger(self.output_tokens, later.output_tokens),
            self.output_tokens_details if later.output_tokens_details is _NULL else later.output_tokens_details,
        )

    def counts(self) -> TokenCounts:
        written, read = bounded(self.cache_creation_input_tokens or 0), bounded(self.cache_read_input_tokens or 0)
        prompt = bounded(bounded(self.input_tokens or 0) + written + read)
        read = min(read, prompt)
        completion = bounded(self.output_tokens or 0)
        thinking = bounded(_thinking_tokens(self.output_tokens_details))
        return TokenCounts(prompt, read, completion, min(thinking, completion), min(written, prompt - read))


def _thinking_tokens(details: msgspec.Raw) -> int:
    """Told for information only: a form that is not known must not cost the counts that are billed."""
    try:
        said = _decode_details(details)
    except msgspec.DecodeError:
        return 0
    return (said.thinking_tokens or 0) if said is not None else 0


def _larger(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)


class _Used(msgspec.Struct):
    usage: MessageUsage | None = None


_decode_details = msgspec.json.Decoder(_Details | None).decode
_decode_used = msgspec.json.Decoder(_Used).decode


def usage_of(body: bytes) -> TokenCounts | None:
    """The usage that a whole message reports, or None. Raises BrokenStream when it is not JSON."""
    try:
        usage = _decode_used(body).usage
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BrokenStream(f"the answer is not JSON: {error}") from error
    return usage.counts() if usage is not None else None
