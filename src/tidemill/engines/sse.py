"""Server-sent events of a chat stream: cutting them apart only where it must be, and reading usage in passing.

Sources: WHATWG HTML, 9.2 (event stream format); OpenAI API reference, "Streaming" (chunk object, `[DONE]`,
`stream_options.include_usage`).
"""

import msgspec

from tidemill.engines.protocol import TokenCounts

MAX_EVENT_BYTES = 8 * 1024 * 1024
"""An event that does not end within this many bytes is a broken stream."""
BYTES_PER_TOKEN = 4
"""The usual ratio for English text, used only where an engine reports nothing."""

MAX_COUNT = 2**28
"""Tokens; far beyond any context, and small enough that no price makes an absurd count overflow."""

DONE_EVENT = b"data: [DONE]\n\n"


def bounded(count: int) -> int:
    """An engine's figure as a count that can be: not negative, and not beyond any context there is."""
    return min(max(count, 0), MAX_COUNT)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


_NOTHING = msgspec.Raw(b"null")


class Usage(msgspec.Struct):
    """OpenAI's usage object, as far as metering needs it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: msgspec.Raw = _NOTHING

    def counts(self) -> TokenCounts:
        details, more = self.prompt_tokens_details, self.completion_tokens_details
        cached = (details.cached_tokens or 0) if details is not None else 0
        reasoning = _reasoning_tokens(more) if more is not _NOTHING else 0
        prompt, completion = self.prompt_tokens, self.completion_tokens
        if 0 <= cached <= prompt <= MAX_COUNT and 0 <= reasoning <= completion <= MAX_COUNT:
            return TokenCounts(prompt, cached, completion, reasoning)
        prompt, completion = bounded(prompt), bounded(completion)
        return TokenCounts(prompt, min(bounded(cached), prompt), completion, min(bounded(reasoning), completion))


def _reasoning_tokens(details: msgspec.Raw) -> int:
    """Told for information only: a form that is not known must not cost the counts that are billed."""
    try:
        said = _decode_details(details)
    except msgspec.DecodeError:
        return 0
    return (said.reasoning_tokens or 0) if said is not None else 0


def usage_object(counts: TokenCounts) -> dict[str, object]:
    """OpenAI's usage object for `counts`."""
    details = {"cached_tokens": counts.cached}
    if counts.cache_write:
        details["cache_write_tokens"] = counts.cache_write
    usage: dict[str, object] = {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
        "prompt_tokens_details": details,
    }
    if counts.reasoning:
        usage["completion_tokens_details"] = {"reasoning_tokens": counts.reasoning}
    return usage


class Chunk(msgspec.Struct):
    """The parts of a chunk that decide what happens to it."""

    choices: list[msgspec.Raw] | None = None
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


class _WholeUsage(Usage):
    total_tokens: int = 0
    """All that some rerankers tell."""


class _BilledUnits(msgspec.Struct):
    search_units: float | None = None
    input_tokens: float | None = None


class _Meta(msgspec.Struct):
    """Cohere's, in place of a usage."""

    billed_units: _BilledUnits | None = None


class _Whole(msgspec.Struct):
    """What a whole answer says of its usage."""

    usage: _WholeUsage | None = None
    meta: msgspec.Raw = _NOTHING

    def counts(self) -> TokenCounts | None:
        counts = None if self.usage is None else self.usage.counts()
        if self.usage is not None and counts == NO_COUNTS:
            counts = TokenCounts(prompt=bounded(self.usage.total_tokens))
        units = _billed_units(self.meta) if self.meta is not _NOTHING else None
        if units is not None and (units.search_units or units.input_tokens):
            counts = counts or NO_COUNTS
            counts = msgspec.structs.replace(
                counts,
                prompt=counts.prompt or bounded(int(units.input_tokens or 0)),
                searches=bounded(int(units.search_units or 0)),
            )
        return counts


def _billed_units(meta: msgspec.Raw) -> _BilledUnits | None:
    """Another's `meta` is not Cohere's, and must not cost the counts."""
    try:
        said = _decode_meta(meta)
    except msgspec.DecodeError:
        return None
    return said.billed_units if said is not None else None


NO_COUNTS = TokenCounts()

_decode_meta = msgspec.json.Decoder(_Meta | None).decode
_decode_chunk = msgspec.json.Decoder(Chunk).decode
_decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_details = msgspec.json.Decoder(_CompletionDetails | None).decode


class BrokenStream(ValueError):
    """The engine's event stream does not follow the format."""

    before = b""
    """What the events before the broken one are in the client's API."""


def usage_of(body: bytes) -> TokenCounts | None:
    """The usage that a whole (non-streamed) answer reports, or None. Raises BrokenStream when it is not JSON."""
    try:
        return _decode_whole(body).counts()
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BrokenStream(f"the answer is not JSON: {error}") from error


def data_of(event: bytes) -> bytes:
    """The payload of an event's data lines; b"" for a comment or another field."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def _until_done(data: bytes) -> bytes:
    """Whole events up to `[DONE]`, and it."""
    kept: list[bytes] = []
    for event in data[:-2].split(b"\n\n"):
        kept.append(event)
        if data_of(event.lstrip(b"\n")).strip() == b"[DONE]":
            break
    return b"\n\n".join(kept) + b"\n\n"


class SseTap:
    """Passes a chat stream through: counts events, notes usage, holds `[DONE]` back. The `Tap` of `openai`."""

    done = False
    failed = False
    counts = NO_COUNTS
    exact = False
    _rest = b""
    _events = 0
    _bytes = 0
    _smallest = MAX_EVENT_BYTES

    def __init__(self, *, wants_usage: bool) -> None:
        self._wants_usage = wants_usage

    def feed(self, data: bytes) -> bytes:
        """See `Tap.feed`. Raises BrokenStream."""
        if self.done:
            return b""  # what comes behind the end is nobody's, in whichever packet it comes
        plain = data[:7] == b"data: {" and data[-2:] == b"\n\n" and data.count(b"\n") == 2 and not self._rest
        if plain and b'"usage"' not in data and b'"error"' not in data and b"\r" not in data:
            # One event of one line that says nothing of usage, as most of all chunks are.
            size = len(data)
            if size < self._smallest:
                self._smallest = size
            self._events += 1
            self._bytes += size
            return data
        data = self._whole_events(data)
        if data.startswith(b"\n") or b"\n\n\n" in data:  # blank lines between events are nothing
            data = b"".join(event.lstrip(b"\n") + b"\n\n" for event in data.split(b"\n\n") if event.strip(b"\n"))
        if not data:
            return b""
        if b"[DONE]" in data:
            data = _until_done(data)
        events = data.count(b"\n\n")
        if events == 1:
            size = len(data)
            self._smallest = min(self._smallest, size)
        if b":" == data[:1] or b"\n:" in data:
            events -= sum(event.lstrip(b"\n").startswith(b":") for event in data.split(b"\n\n"))  # "I am still here"
        self._events += events
        self._bytes += len(data)
        if b'"usage"' in data or b"[DONE]" in data or b'"error"' in data:
            return self._each_event(data)
        return data

    def end(self) -> bytes:
        """See `Tap.end`. Raises BrokenStream."""
        rest = self._rest.replace(b"\r", b"\n").strip(b"\n")
        self._rest = b""
        if not rest or rest.startswith(b":"):
            return b""
        payload = data_of(rest)
        if payload.strip() != b"[DONE]":
            try:
                _decode_chunk(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BrokenStream("it ends within an event") from error
        return self.feed(rest + b"\n\n")

    def _whole_events(self, data: bytes) -> bytes:
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if b"\r" in data:
            # Raw carriage returns are line ends only: JSON escapes them. One at the very end may be half of CRLF.
            tail = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(tail)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + tail
        if not data.endswith(b"\n\n"):
            cut = data.rfind(b"\n\n") + 2
            if cut == 1:
                cut = 0
            self._rest = data[cut:]
            if len(self._rest) > MAX_EVENT_BYTES:
                raise BrokenStream(f"an event is longer than {MAX_EVENT_BYTES} bytes")
            data = data[:cut]
        return data

    def _each_event(self, data: bytes) -> bytes:
        out = []
        for event in data.split(b"\n\n"):
            if event:
                kept = self.on_event(event.lstrip(b"\n"))
                if kept is not None:
                    out.append(kept + b"\n\n")
        return b"".join(out)

    def on_event(self, event: bytes) -> bytes | None:
        """Look at one event; return it as the client shall get it, or None to leave it out."""
        payload = data_of(event)
        if payload.strip() == b"[DONE]":
            self.done = True
            return None
        if self.done:
            return None
        if not payload:
            return event
        if b'"usage"' not in payload and b'"error"' not in payload:
            return event
        try:
            chunk = _decode_chunk(payload)
        except msgspec.DecodeError:
            return event
        if bytes(chunk.error) != b"null":
            self.failed = True
        if chunk.usage is not None:
            self.counts = chunk.usage.counts()
            self.exact = True
            if chunk.choices is not None and not chunk.choices and not self._wants_usage:
                return None
        return event

    @property
    def begun(self) -> bool:
        """See `Tap.begun`."""
        return self.exact or self._events > 0

    @property
    def produced(self) -> int:
        """Completion tokens so far: the engine's count, else a token per chunk (the first chunk names the role)."""
        return self.counts.completion if self.exact else max(self._events - 1, 0)

    @property
    def estimated_completion(self) -> int:
        """See `Tap.estimated_completion`."""
        events = self._events
        text = (self._bytes - events * self._smallest) // BYTES_PER_TOKEN
        return text if text >= events else max(events - 1, 0)

    def estimate(self, prompt_bytes: int) -> TokenCounts:
        """Count a stream that reported nothing: a token per chunk, or per four bytes of text if that is more.

        The text is what the events have beyond the smallest of them, which is mostly envelope. The prompt counts a
        token per four bytes of its JSON.
        """
        if self._events == 0:
            return TokenCounts(prompt=prompt_bytes // BYTES_PER_TOKEN)
        return TokenCounts(prompt=prompt_bytes // BYTES_PER_TOKEN, completion=self.estimated_completion)
