"""Any OpenAI-compatible server: another vendor's API, or an engine that somebody else runs."""

from collections.abc import Mapping

import msgspec

from tidemill.engines.kind import EngineKind
from tidemill.engines.prometheus import counter_sum
from tidemill.engines.protocol import Ask, Counters, Probe, Refusal, TokenCounts, Unsupported
from tidemill.engines.sse import SseTap, usage_of

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


NOTHING: Unsupported = {}
"""It answers for itself: what it does not like, it refuses by name."""


class OpenAIEngine:
    """See `engines.protocol.Engine`."""

    kind = "openai"
    collects = False
    unsupported: Unsupported = NOTHING
    native: frozenset[bytes] = frozenset()
    probes: tuple[Probe, ...] = (Probe(b"/health", at_root=True), Probe(b"/models"))

    def __init__(self, *, owned: bool = False) -> None:
        self.owned = owned

    def auth_headers(self, key: str | None) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {key}"} if key else {}

    def path(self, ask: Ask) -> bytes:
        return ask.path

    def headers(self, ask: Ask) -> bytes:
        return b""

    def unseen_tokens(self, ask: Ask) -> int:
        return 0

    def refuses(self, ask: Ask) -> Refusal | None:
        return None

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

    def usage(self, body: bytes) -> TokenCounts | None:
        return usage_of(body)

    def answer(self, ask: Ask, body: bytes) -> bytes:
        return body

    def count(self, ask: Ask, *, model: str) -> tuple[bytes, bytes] | None:
        return None

    def counters(self, metrics: str) -> Counters | None:
        """vLLM's and SGLang's totals, where the server has a Prometheus page."""
        for family in ("vllm", "sglang"):
            prompt = counter_sum(metrics, f"{family}:prompt_tokens_total")
            completion = counter_sum(metrics, f"{family}:generation_tokens_total")
            if prompt is not None and completion is not None:
                return Counters(prompt, completion)
        return None


KIND = EngineKind(name="openai", engine=lambda options: OpenAIEngine(owned=options.owned))
