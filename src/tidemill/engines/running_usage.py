"""Streams that carry running counts in each chunk: vLLM's and SGLang's `continuous_usage_stats`.

So a client that leaves, and a balance that ends, are billed for exactly what was produced. Each chunk has the usage
of its own choice; the last one, without choices, that of all together (vllm/entrypoints/openai/chat_completion,
sglang/srt/entrypoints/openai/serving_chat.py).
"""

import re
from collections.abc import Collection

import msgspec

from tidemill.engines.capabilities import UNSUPPORTED_BY_OWN
from tidemill.engines.openai import OpenAIEngine, encode, stream_options
from tidemill.engines.protocol import Ask, TokenCounts
from tidemill.engines.sse import SseTap, Usage, data_of

FILLER_PRIORITY = 100
"""Of requests that can wait; people's have 0, and lower is earlier. Far enough apart for SGLang to interrupt one
(`--priority-scheduling-preemption-threshold`, 10)."""

_USAGE = b',"usage":{'
_INDEX = re.compile(rb'"index":(\d+)')
_decode_usage = msgspec.json.Decoder(Usage).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class RunningUsageEngine(OpenAIEngine):
    """An own OpenAI-compatible engine with running counts. See `engines.protocol.Engine`."""

    unsupported = UNSUPPORTED_BY_OWN
    not_for_tenants: tuple[str, ...] = ()
    """Fields of the engine's own API that reach past one request: other tenants' turns, the engine's insides."""

    def __init__(self, *, priority_scheduling: bool = False) -> None:
        super().__init__(owned=True)
        self.collects = True
        self._priority_scheduling = priority_scheduling

    def body(self, ask: Ask, *, model: str, output_cap: int) -> bytes:
        fields = _decode_object(super().body(ask, model=model, output_cap=output_cap))
        for name in self.not_for_tenants:
            fields.pop(name, None)
        if self._priority_scheduling and ask.generates and ask.filler:
            fields["priority"] = msgspec.Raw(b"%d" % FILLER_PRIORITY)
        if ask.generates:
            options = _decode_object(stream_options(ask))
            options["continuous_usage_stats"] = msgspec.Raw(b"true")
            fields["stream"] = msgspec.Raw(b"true")
            fields["stream_options"] = msgspec.Raw(encode(options))
        return encode(fields)

    def tap(self, ask: Ask) -> "RunningUsageTap":
        return RunningUsageTap(
            wants_usage=ask.wants_usage, wants_running=_wants_running(ask), choices=ask.choices, prompts=ask.prompts
        )


def _wants_running(ask: Ask) -> bool:
    given = ask.fields.get("stream_options")
    if given is None or bytes(given) == b"null":
        return False
    return bytes(_decode_object(given).get("continuous_usage_stats", b"false")) == b"true"


class RunningUsageTap(SseTap):
    """Reads the usage out of each chunk, and takes it out again unless the client asked for it there."""

    def __init__(self, *, wants_usage: bool, wants_running: bool, choices: int, prompts: int) -> None:
        super().__init__(wants_usage=wants_usage)
        self._wants_running = wants_running and wants_usage
        self._choices = choices
        self._prompts = prompts
        self._by_choice: dict[bytes, TokenCounts] = {}

    def on_event(self, event: bytes) -> bytes | None:
        at = event.rfind(_USAGE)
        if at < 0 or b'"choices":[]' in event:
            return super().on_event(event)
        found = _INDEX.search(event)
        if found is None:
            return super().on_event(event)
        try:
            usage = _decode_usage(event[at + len(_USAGE) - 1 : -1])
            kept = event[:at] + b"}"
        except msgspec.DecodeError:  # something comes after the usage
            chunk = _decode_object(data_of(event))
            usage = _decode_usage(chunk.pop("usage"))
            kept = b"data: " + encode(chunk)
        self._by_choice[found[1]] = usage.counts()
        self.counts = sum_of_choices(self._by_choice.values(), choices=self._choices, prompts=self._prompts)
        self.exact = True
        return event if self._wants_running else kept


def sum_of_choices(counts: Collection[TokenCounts], *, choices: int, prompts: int) -> TokenCounts:
    """What several choices used together: a prompt that several of them share counts once."""
    prompt, cached = max((each.prompt, each.cached) for each in counts)
    if prompts > 1:
        share = choices // prompts
        prompt = sum(each.prompt for each in counts) // share
        cached = sum(each.cached for each in counts) // share
    completion = sum(each.completion for each in counts)
    return TokenCounts(prompt, cached, completion, sum(each.reasoning for each in counts))
