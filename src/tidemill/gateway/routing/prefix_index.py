"""An index of the prefixes in the engines' caches, inferred from the requests sent to them.

Hashes of prompts' beginnings.

A prompt is hashed as raw JSON, never decoded, up to edges that lie a block or a sixteenth of the way apart. So a
prompt of 500 KB has about a hundred keys, and its common part with another one is known to within 6%. Each key covers
all bytes before its edge (and the tools, which chat templates put first), so equal keys are equal beginnings.
"""

from collections.abc import Sequence

from tidemill.engines.protocol import Ask

BLOCK_BYTES = 256
FINENESS = 16
"""Each edge is at least 1/FINENESS further from the start than the edge before."""
MAX_PROMPT_BYTES = 4 * 1024 * 1024
"""Bytes of a prompt that are looked at; beyond that a prompt is mostly pictures."""
CAPACITY = 32_768
"""Keys kept for a replica: about 3 MB, for prompts of 8 MB (two million tokens) and mostly far more."""


def _edges() -> tuple[int, ...]:
    edges, at = [], 0
    while at < MAX_PROMPT_BYTES:
        at += max(BLOCK_BYTES, at // FINENESS)
        edges.append(at)
    return tuple(edges)


EDGES = _edges()
"""Byte offsets in a prompt at which its keys end."""

Keys = Sequence[int]
"""The keys of one prompt, shortest beginning first: `keys[i]` covers `EDGES[i]` bytes."""


def prompt_keys(ask: Ask) -> list[int]:
    """The keys of a request's prompt; none for a prompt shorter than a block.

    By Python's own hash: 0.1 ms for half a megabyte, and keyed by a secret of this process, so that nobody can make
    two prompts that look alike.
    """
    fields = ask.fields
    prompt = fields.get("messages") or fields.get("prompt") or fields.get("input")
    if prompt is None:
        return []
    text = bytes(prompt)
    size = len(text)
    if size < BLOCK_BYTES:
        return []
    tools = fields.get("tools")
    key = 0 if tools is None else hash(bytes(tools))
    keys = []
    at = 0
    for edge in EDGES:
        if edge > size:
            break
        key = hash((key, hash(text[at:edge])))
        keys.append(key)
        at = edge
    return keys


class PrefixIndex:
    """The prefix keys recently sent to one replica. Bounded, least recently used first out.

    Two generations stand in for an order of use: what is touched moves to the young one; when that is full, the old
    one is dropped and the young one grows old. No entry is ever moved by itself, and a prompt's keys age together.
    """

    __slots__ = ("_half", "_old", "_young")

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._half = max(capacity // 2, 1)
        self._young: dict[int, None] = {}
        self._old: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def match(self, keys: Keys) -> int:
        """The number of a prompt's leading keys in the index."""
        young, old = self._young, self._old
        known = 0
        for key in keys:
            if key not in young and key not in old:
                break
            known += 1
        return known

    def note(self, keys: Keys) -> None:
        """Note a prompt with these keys, sent to the replica."""
        self._young.update(dict.fromkeys(keys))
        if len(self._young) > self._half:
            self._old, self._young = self._young, {}


def matched_bytes(known: int) -> int:
    """The bytes of a prompt that its first `known` keys cover."""
    return EDGES[known - 1] if known else 0
