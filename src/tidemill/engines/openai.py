"""Any OpenAI-compatible server: another vendor's API, or an engine that somebody else runs."""

import msgspec

from tidemill.engines.prometheus import counter_sum
from tidemill.engines.protocol import Ask, Counters
from tidemill.engines.sse import SseTap

encode = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def stream_options(ask: Ask) -> msgspec.Raw:
    """The client's `stream_options` with `include_usage` on: metering always wants the usage chunk."""
    given = ask.fields.get("stream_options")
    options: dict[str, msgspec.Raw] = {}
    if given is not None and bytes(given) != b"null":
        options = _decode_object(given)
    options["include_usage"] = msgspec.Raw(b"true")
    return msgspec.Raw(encode(options))


LIMIT_ALIASES = ("max_tokens", "max_completion_tokens", "n_predict", "n_cmpl")
"""Fields that some engine takes for the limit of the answer or for the number of answers, which a hold covers.
llama.cpp takes its own `n_predict` before `max_tokens`, and `n_cmpl` before `n`."""


class OpenAIEngine:
    """See `engines.protocol.Engine`."""

    kind = "openai"
    collects = False
    count_path: bytes | None = None

    def __init__(self, *, owned: bool = False) -> None:
        self.owned = owned

    def body(self, ask: Ask, *, model: str, output_cap: int) -> bytes:
        """The client's own fields pass through; only the model's name, the limit and the usage option are set."""
        fields = dict(ask.fields)
        fields["model"] = msgspec.Raw(encode(model))
        if ask.generates:
            for alias in LIMIT_ALIASES:
                fields.pop(alias, None)
            fields[ask.max_tokens_field] = msgspec.Raw(b"%d" % output_cap)
        if ask.stream:
            fields["stream_options"] = stream_options(ask)
        return encode(fields)

    def tap(self, ask: Ask) -> SseTap:
        return SseTap(wants_usage=ask.wants_usage)

    def counters(self, metrics: str) -> Counters | None:
        """vLLM's and SGLang's totals, where the server has a Prometheus page."""
        for family in ("vllm", "sglang"):
            prompt = counter_sum(metrics, f"{family}:prompt_tokens_total")
            completion = counter_sum(metrics, f"{family}:generation_tokens_total")
            if prompt is not None and completion is not None:
                return Counters(prompt, completion)
        return None
