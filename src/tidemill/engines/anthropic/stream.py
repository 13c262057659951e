"""Reading a stream of Anthropic's Messages API: usage in passing.

Source: Anthropic API reference, "Streaming messages": `message_start` with the prompt's usage, for each content block
`content_block_start`, deltas and `content_block_stop`, then `message_delta` with the stop reason and the usage, and
`message_stop`; `ping` and `error` anywhere.
"""

import re

import msgspec

from tidemill.engines.anthropic.answer_forms import MessagesEvent
from tidemill.engines.anthropic.usage import MessageUsage
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BYTES_PER_TOKEN, MAX_EVENT_BYTES, NO_COUNTS, BrokenStream, data_of

_DELTA = b"event: content_block_delta"
_PING = b"event: ping"
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")

_decode_event = msgspec.json.Decoder(MessagesEvent).decode


def event_of(event: bytes) -> MessagesEvent | None:
    """What an event says; None for one without data. Raises BrokenStream."""
    payload = data_of(event.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    if not payload:
        return None
    try:
        return _decode_event(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BrokenStream(f"an event is not a JSON object of the right form: {error}") from error


class MessagesTap:
    """Passes a Messages stream on, byte for byte. See `engines.protocol.Tap`.

    What comes before `message_start` is held back until then: a ping is no beginning. The last event, `message_stop`,
    is passed on like the others; the reply keeps it until the record is written.
    """

    done = False
    failed = False
    exact = False
    counts = NO_COUNTS
    begun = False
    _rest = b""
    _early = b""
    _stopped = False
    _deltas = 0
    _delta_bytes = 0
    _smallest = MAX_EVENT_BYTES

    def __init__(self) -> None:
        self._usage = MessageUsage()

    def feed(self, data: bytes) -> bytes:
        """See `Tap.feed`. Raises BrokenStream."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        out: list[bytes] = []
        at = 0
        for end in _EVENT_END.finditer(data):
            if self.done:
                return b"".join(out)
            event = data[at : end.end()]
            try:
                passed = self._event(event)
            except BrokenStream:
                if not out:
                    raise
                break  # the client gets what came before, wherever the network cuts; the next call raises again
            at = end.end()
            if not self.begun:
                self._early += passed
            elif passed:
                if self._early:
                    out.append(self._early)
                    self._early = b""
                out.append(passed)
        if not self.done:
            self._rest = data[at:]
            if len(self._rest) + len(self._early) > MAX_EVENT_BYTES:
                raise BrokenStream(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return out[0] if len(out) == 1 else b"".join(out)

    def end(self) -> bytes:
        """See `Tap.end`. Raises BrokenStream, too, when the message has not ended."""
        rest = self._rest
        events = self.feed(b"\n\n") if rest.strip() else b""
        if self.begun and not (self.done or self._stopped):
            raise BrokenStream("it ends before its message does")
        return events

    @property
    def produced(self) -> int:
        """Completion tokens so far: the engine's count at the end, until then a token for each delta."""
        return self.counts.completion if self.exact else self._deltas

    @property
    def estimated_completion(self) -> int:
        """See `Tap.estimated_completion`. A delta may have more than one token: then its text counts."""
        text = (self._delta_bytes - self._deltas * self._smallest) // BYTES_PER_TOKEN if self._deltas else 0
        return max(self._deltas, text, self.counts.completion)

    def estimate(self, prompt_bytes: int) -> TokenCounts:
        """The prompt is exact from `message_start` on; of the answer, only what has come is known."""
        told = self.counts
        return TokenCounts(
            prompt=told.prompt or prompt_bytes // BYTES_PER_TOKEN,
            cached=told.cached,
            completion=self.estimated_completion,
            cache_write=told.cache_write,
        )

    def _event(self, event: bytes) -> bytes:
        """Look at an event; gives what the client gets of it."""
        if event.startswith(_DELTA):
            self._count_delta(event)
            return self.on_delta(event)
        if event.startswith(_PING):
            return self.on_ping(event)
        found = event_of(event)
        if found is None:
            return self.on_ping(event)
        match found.type:
            case "content_block_delta":  # of a server that does not name its events
                self._count_delta(event)
                return self.on_delta(event)
            case "ping":
                return self.on_ping(event)
            case "message_start":
                if found.message is not None and found.message.usage is not None:
                    self._use(found.message.usage)
            case "message_delta":
                if found.usage is not None:
                    self._use(found.usage)
                    self.exact = found.usage.output_tokens is not None
                self._stopped = True
            case "message_stop":
                self.done = True
            case "error":
                self.done = self.failed = True
        self.begun = True
        return self.on_event(found, event)

    def _count_delta(self, event: bytes) -> None:
        size = len(event)
        self._deltas += 1
        self._delta_bytes += size
        self._smallest = min(self._smallest, size)
        self.begun = True

    def _use(self, usage: MessageUsage) -> None:
        self._usage = self._usage.with_later(usage)
        self.counts = self._usage.counts()

    # What the client gets

    def on_delta(self, event: bytes) -> bytes:
        return event

    def on_ping(self, event: bytes) -> bytes:
        return event

    def on_event(self, found: MessagesEvent, event: bytes) -> bytes:
        return event
