"""Hashes of prompts' beginnings, and what is remembered of them."""

import json
import time

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tidemill.engines.protocol import Ask
from tidemill.gateway.routing.prefix_index import (
    BLOCK_BYTES,
    EDGES,
    FINENESS,
    MAX_PROMPT_BYTES,
    PrefixIndex,
    matched_bytes,
    prompt_keys,
)


def ask(**fields: object) -> Ask:
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}
    return Ask(b"/chat/completions", raw, False, False, 1, "max_tokens", None)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(st.text(max_size=5000), st.text(max_size=3000), st.text(max_size=3000))
def test_equal_keys_are_equal_beginnings(shared: str, one: str, other: str) -> None:
    first, second = json.dumps(chat(shared + one)), json.dumps(chat(shared + other))
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    known = common(prompt_keys(ask(messages=chat(shared + one))), prompt_keys(ask(messages=chat(shared + other))))
    assert matched_bytes(known) <= same
    assert same - matched_bytes(known) < max(BLOCK_BYTES, same // FINENESS) + 1


def test_a_conversation_that_grows_keeps_its_keys() -> None:
    turns = [f"turn {index}: " + "word " * 200 for index in range(20)]
    before: list[int] = []
    for count in range(1, 21):
        keys = prompt_keys(ask(messages=chat(*turns[:count])))
        assert keys[: len(before)] == before
        before = keys


def test_tools_come_first() -> None:
    messages = chat("x" * 1000)
    plain, tools = prompt_keys(ask(messages=messages)), prompt_keys(ask(messages=messages, tools=[{"a": 1}]))
    assert common(plain, tools) == 0


def test_a_short_prompt_has_none() -> None:
    assert prompt_keys(ask(messages=chat("hello"))) == []
    assert prompt_keys(ask()) == []


def test_a_long_prompt_is_cheap() -> None:
    request = ask(messages=chat("word " * 100_000))
    began = time.perf_counter()
    keys = prompt_keys(request)
    assert len(keys) < 110
    assert time.perf_counter() - began < 0.02  # 0.12 ms on a quiet machine
    assert len(prompt_keys(ask(messages=chat("x" * (2 * MAX_PROMPT_BYTES))))) == len(EDGES)


@given(st.lists(st.lists(st.integers(0, 50), max_size=10, unique=True), max_size=60))
def test_what_was_noted_last_is_known_and_memory_is_bounded(prompts: list[list[int]]) -> None:
    index = PrefixIndex(capacity=40)
    for keys in prompts:
        index.note(keys)
        assert index.match(keys) == len(keys)
        assert len(index) <= 40 + 2 * 10


def test_what_is_used_stays_and_what_is_not_goes() -> None:
    index = PrefixIndex(capacity=100)
    index.note([1, 2, 3])
    index.note([7, 8, 9])
    for key in range(1000, 1400):
        index.note([key])
        index.note([1, 2, 3])
    assert index.match([1, 2, 3]) == 3
    assert index.match([7, 8, 9]) == 0
    assert index.match([1, 2, 99]) == 2
    assert index.match([99, 2, 3]) == 0
