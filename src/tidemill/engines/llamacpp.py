"""llama.cpp: the embedded engine. Its stream carries exact running counts (`timings_per_token`), taken out again.

Source: llama.cpp tools/server/README.md: `timings_per_token`, `/v1/chat/completions/input_tokens`, `/metrics`.
"""

import re

import msgspec

from tidemill.engines.openai import encode, stream_options
from tidemill.engines.prometheus import counter_sum
from tidemill.engines.protocol import Ask, Counters, Counts
from tidemill.engines.sse import SseTap, data_of, usage_of

_TIMINGS = b',"timings":{'
_COUNT = re.compile(rb'"(cache_n|prompt_n|predicted_n)":(\d+)')
_INDEX = re.compile(rb'"index":(\d+)')
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class LlamaCppEngine:
    """See `engines.protocol.Engine`."""

    kind = "llamacpp"
    owned = True
    collects = True
    chat_path = b"/chat/completions"
    count_path: bytes | None = b"/chat/completions/input_tokens"

    def body(self, ask: Ask, *, model: str, output_cap: int) -> bytes:
        fields = dict(ask.fields)
        fields["model"] = msgspec.Raw(encode(model))
        fields.pop("max_completion_tokens", None)
        fields["max_tokens"] = msgspec.Raw(b"%d" % output_cap)
        fields["stream"] = msgspec.Raw(b"true")
        fields["stream_options"] = stream_options(ask)
        fields["timings_per_token"] = msgspec.Raw(b"true")
        return encode(fields)

    def tap(self, ask: Ask) -> "LlamaCppTap":
        return LlamaCppTap(wants_usage=ask.wants_usage, choices=ask.choices)

    def counters(self, metrics: str) -> Counters | None:
        """llama.cpp counts computed and cached prompt tokens apart; both were prompts."""
        prompt = counter_sum(metrics, "llamacpp:prompt_tokens_total")
        completion = counter_sum(metrics, "llamacpp:tokens_predicted_total")
        if prompt is None or completion is None:
            return None
        return Counters(prompt + (counter_sum(metrics, "llamacpp:prompt_tokens_cached_total") or 0), completion)


class LlamaCppTap(SseTap):
    """Reads the running counts out of each chunk and removes them again.

    Of several choices llama.cpp ends each with a usage chunk of its own; OpenAI's clients expect one for all of
    them, at the end. So these are held back and summed.
    """

    def __init__(self, *, wants_usage: bool, choices: int) -> None:
        super().__init__(wants_usage=wants_usage)
        self._choices = choices
        self._running: dict[bytes, int] = {}
        self._final: list[Counts] = []
        self._usage_event = b""

    def feed(self, data: bytes) -> bytes:
        data = self._whole_events(data)
        return self._each_event(data) if data else b""

    def on_event(self, event: bytes) -> bytes | None:
        at = event.rfind(_TIMINGS)
        if at < 0:
            return super().on_event(event)
        timings = dict(_COUNT.findall(event, at))
        event = event[:at] + b"}"
        if b'"usage":{' in event:
            return self._on_usage(event)
        index = _INDEX.search(event)
        cached = int(timings.get(b"cache_n", 0))
        self._running[index[1] if index else b"0"] = int(timings.get(b"predicted_n", 0))
        self._note(int(timings.get(b"prompt_n", 0)) + cached, cached, sum(self._running.values()))
        return event

    def _on_usage(self, event: bytes) -> bytes | None:
        usage = usage_of(data_of(event))
        if usage is None:
            return event
        self._final.append(usage)
        if len(self._final) == self._choices:
            self._note(usage.prompt, usage.cached, sum(each.completion for each in self._final))
        if not self._wants_usage:
            return None
        if self._choices == 1:
            return event
        if len(self._final) < self._choices:
            return None
        return b"data: " + with_usage(data_of(event), self.counts)

    def _note(self, prompt: int, cached: int, completion: int) -> None:
        before = self.counts
        self.counts = Counts(max(prompt, before.prompt), max(cached, before.cached), max(completion, before.completion))
        self.exact = True


def with_usage(chunk: bytes, counts: Counts) -> bytes:
    """A chunk with its usage object replaced by `counts`."""
    fields = _decode_object(chunk)
    usage = {
        "completion_tokens": counts.completion,
        "prompt_tokens": counts.prompt,
        "total_tokens": counts.prompt + counts.completion,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
    }
    fields["usage"] = msgspec.Raw(encode(usage))
    return encode(fields)
