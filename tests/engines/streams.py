"""Event streams to feed to taps, and ways to cut them."""

import json
from typing import Any

from hypothesis import strategies as st

from tidemill.engines.protocol import Tap

words = st.text(min_size=1, max_size=6) | st.sampled_from(
    ["usage", '"usage"', "error", "[DONE]", "data: [DONE]\n\n", "\n\n", "\r\n", ',"timings":{', "東京", "🌊", "\u2028"]
)


def event(payload: Any) -> bytes:
    """One event. Raw text, not escapes: what is cut may be in the middle of a character."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def feed(tap: Tap, pieces: list[bytes]) -> bytes:
    return b"".join(tap.feed(piece) for piece in pieces) + tap.end()


def payloads(data: bytes) -> list[Any]:
    """What a client decodes."""
    return [json.loads(block.removeprefix(b"data: ")) for block in data.split(b"\n\n") if block]


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """`data` in pieces, at any byte."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
