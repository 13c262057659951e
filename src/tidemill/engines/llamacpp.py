"""llama.cpp, the embedded engine.

Its stream carries exact running counts (`timings_per_token`), which are taken out again.

Source: llama.cpp tools/server/README.md: `timings_per_token`, `/v1/chat/completions/input_tokens`, `/metrics`.
"""

import re
from collections.abc import Collection

import msgspec

from tidemill.engines.capabilities import UNSUPPORTED_BY_OWN
from tidemill.engines.kind import EngineKind
from tidemill.engines.launch import EngineControl
from tidemill.engines.openai import LIMIT_ALIASES, OpenAIEngine, encode, stream_options
from tidemill.engines.prometheus import counter_sum
from tidemill.engines.protocol import Ask, Counters, Refusal, TokenCounts, Unsupported
from tidemill.engines.running_usage import sum_of_choices
from tidemill.engines.sse import SseTap, data_of, usage_object, usage_of

_NOT_FOR_TENANTS = ("verbose", "return_progress", "id_slot")
"""llama.cpp's own: they put more behind the timings, or choose among slots that other tenants use too."""
_TIMINGS = b',"timings":{'
_COUNT = re.compile(rb'"(cache_n|prompt_n|predicted_n)":(\d+)')
_INDEX = re.compile(rb'"index":(\d+)')
_REASONING = b'"reasoning_content":"'
_decode_any = msgspec.json.Decoder().decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


_UNSUPPORTED: Unsupported = {
    **UNSUPPORTED_BY_OWN,
    "echo": ((False,), "Put the prompt before the answer yourself."),
    "suffix": (("",), "Use a chat."),
    "max_tokens_per_doc": ((), "Shorten the documents yourself."),
    "max_chunks_per_doc": ((), "Shorten the documents yourself."),
    "rank_fields": ((["text"],), "Send texts."),
}
DEFAULT_CONTEXT = 4096
"""Tokens of one request, where the configuration does not say."""


class _Function(msgspec.Struct):
    name: str


class _Tool(msgspec.Struct):
    function: _Function


_decode_tool = msgspec.json.Decoder(_Tool).decode
_decode_tools = msgspec.json.Decoder(list[_Tool]).decode


class LlamaCppEngine(OpenAIEngine):
    """See `engines.protocol.Engine`."""

    kind = "llamacpp"
    collects = True
    unsupported = _UNSUPPORTED

    def __init__(self) -> None:
        super().__init__(owned=True)

    def refuses(self, ask: Ask) -> Refusal | None:
        if _names_a_tool(ask.fields):
            return None
        return Refusal("tool_choice", "Send 'auto', 'none', 'required', or a function that is among the 'tools'.")

    def body(self, ask: Ask, *, model: str, output_cap: int) -> bytes:
        fields = dict(ask.fields)
        fields["model"] = msgspec.Raw(encode(model))
        if not ask.generates:
            return encode(fields)
        for name in LIMIT_ALIASES + _NOT_FOR_TENANTS:
            fields.pop(name, None)
        _choose_tool(fields)
        fields["max_tokens"] = msgspec.Raw(b"%d" % output_cap)
        fields["stream"] = msgspec.Raw(b"true")
        fields["stream_options"] = stream_options(ask)
        fields["timings_per_token"] = msgspec.Raw(b"true")
        return encode(fields)

    def tap(self, ask: Ask) -> "LlamaCppTap":
        return LlamaCppTap(wants_usage=ask.wants_usage, choices=ask.choices, prompts=ask.prompts)

    def count(self, ask: Ask, *, model: str) -> tuple[bytes, bytes] | None:
        if ask.path != b"/chat/completions":
            return None
        return b"/chat/completions/input_tokens", self.body(ask, model=model, output_cap=1)

    def counters(self, metrics: str) -> Counters | None:
        """llama.cpp counts computed and cached prompt tokens apart; both were prompts."""
        prompt = counter_sum(metrics, "llamacpp:prompt_tokens_total")
        completion = counter_sum(metrics, "llamacpp:tokens_predicted_total")
        if prompt is None or completion is None:
            return None
        return Counters(prompt + (counter_sum(metrics, "llamacpp:prompt_tokens_cached_total") or 0), completion)


def _choose_tool(fields: dict[str, msgspec.Raw]) -> None:
    """Offer the chosen tool alone, and demand a call: llama.cpp ignores the choice of one tool."""
    choice = fields.get("tool_choice")
    if choice is None or memoryview(choice)[0] != ord("{"):
        return
    name = (_decode_any(choice).get("function") or {}).get("name")
    tools = _decode_any(fields.get("tools", b"[]"))
    fields["tools"] = msgspec.Raw(encode([tool for tool in tools if tool.get("function", {}).get("name") == name]))
    fields["tool_choice"] = msgspec.Raw(b'"required"')


def _names_a_tool(fields: dict[str, msgspec.Raw]) -> bool:
    """A choice of one tool is a function, and it is there (see `_choose_tool`)."""
    choice = fields.get("tool_choice")
    if choice is None or memoryview(choice)[0] != ord("{"):
        return True
    try:
        name = _decode_tool(choice).function.name
        return any(tool.function.name == name for tool in _decode_tools(fields.get("tools", b"[]")))
    except msgspec.DecodeError:
        return False


class LlamaCppTap(SseTap):
    """Reads the running counts out of each chunk and removes them again.

    Of several choices llama.cpp ends each with a usage of its own; OpenAI's clients expect one for all of them, at
    the end. In a chat these come as chunks without a choice, which are held back and summed; in a text completion
    the last chunk of each choice carries its own.
    """

    def __init__(self, *, wants_usage: bool, choices: int, prompts: int) -> None:
        super().__init__(wants_usage=wants_usage)
        self._choices = choices
        self._prompts = prompts
        self._by_choice: dict[bytes, TokenCounts] = {}
        self._reasoned: dict[bytes, int] = {}
        self._final: list[TokenCounts] = []

    def feed(self, data: bytes) -> bytes:
        data = self._whole_events(data)
        return self._each_event(data) if data else b""

    def on_event(self, event: bytes) -> bytes | None:
        at = event.rfind(_TIMINGS)
        if at < 0:
            return None if event == b"data: null" else super().on_event(event)
        timings = dict(_COUNT.findall(event, at))
        event = event[:at] + b"}"
        usage = usage_of(data_of(event)) if b'"usage":{' in event else None
        if usage is not None and b'"choices":[]' in event:
            return self._on_last_of_a_choice(event, usage)
        if usage is None:
            cached = int(timings.get(b"cache_n", 0))
            usage = TokenCounts(int(timings.get(b"prompt_n", 0)) + cached, cached, int(timings.get(b"predicted_n", 0)))
        found = _INDEX.search(event)
        index = found[1] if found else b"0"
        self._by_choice[index] = usage
        if _REASONING in event:
            self._reasoned[index] = usage.completion
        self._add_up(self._by_choice.values())
        return event

    def _on_last_of_a_choice(self, event: bytes, usage: TokenCounts) -> bytes | None:
        self._final.append(usage)
        if len(self._final) < self._choices:
            return None
        self._add_up(self._final)
        if not self._wants_usage:
            return None
        if self._choices == 1 and not self._reasoned:
            return event
        return b"data: " + with_usage(data_of(event), self.counts)

    def _add_up(self, counts: Collection[TokenCounts]) -> None:
        """The sum over the choices; what of it was reasoning is known of the chunks alone."""
        found = sum_of_choices(counts, choices=self._choices, prompts=self._prompts)
        reasoning = min(sum(self._reasoned.values()), found.completion)
        self.counts = TokenCounts(found.prompt, found.cached, found.completion, reasoning)
        self.exact = True


def with_usage(chunk: bytes, counts: TokenCounts) -> bytes:
    """A chunk with its usage object replaced by `counts`."""
    fields = _decode_object(chunk)
    fields["usage"] = msgspec.Raw(encode(usage_object(counts)))
    return encode(fields)


KIND = EngineKind(
    name="llamacpp",
    engine=lambda options: LlamaCppEngine(),
    control=EngineControl(
        ready="/health",
        running="llamacpp:requests_processing",
        waiting="llamacpp:requests_deferred",
        template="/props",
        batches_beside=True,
    ),
    default_context=DEFAULT_CONTEXT,
    embeds=False,
    ranks=False,
)
