"""What engines cannot do: the parameters of a request that they would ignore in silence, so that it is refused.

llama.cpp takes a chat and leaves out what it does not know, without a word (its tools/server/README.md names what it
takes; the rest was tried on build 11549). So do vLLM and SGLang (the fields of the request classes of vLLM 0.33.0 and
SGLang 0.5.23 are recorded in tests/engines/contracts/). Another OpenAI-compatible server answers for itself: what it
does not like, it refuses by name, and that error reaches the client.
"""

from typing import Any

import msgspec

from tidemill.engines.protocol import Ask

Harmless = tuple[object, ...]
"""The values of a parameter that ask for nothing special. Null and an empty list always do."""

_decode = msgspec.json.Decoder().decode

LONGEST_HARMLESS = 64
"""A longer value, in bytes of JSON, always asks for something."""

_BY_ALL_OF_OURS: dict[str, tuple[Harmless, str]] = {
    "audio": ((), "It gives no sound."),
    "modalities": ((["text"],), "It gives text only."),
    "web_search_options": ((), "It does not search the web."),
    "store": ((False,), "It keeps no conversations; the Responses API does."),
    "functions": ((), "Send 'tools'."),
    "function_call": (("none",), "Send 'tool_choice'."),
    "verbosity": (("medium",), "Say in the prompt how long the answer shall be."),
}

_IGNORED: dict[str, dict[str, tuple[Harmless, str]]] = {
    "llamacpp": {
        **_BY_ALL_OF_OURS,
        "echo": ((False,), "Put the prompt before the answer yourself."),
        "suffix": (("",), "Use a chat."),
        "max_tokens_per_doc": ((), "Shorten the documents yourself."),
        "max_chunks_per_doc": ((), "Shorten the documents yourself."),
        "rank_fields": ((["text"],), "Send texts."),
    },
    "vllm": _BY_ALL_OF_OURS,
    "sglang": _BY_ALL_OF_OURS,
}
"""By kind of engine: parameter, what of it is harmless, and what to do instead."""


class _Function(msgspec.Struct):
    name: str


class _Tool(msgspec.Struct):
    function: _Function


_decode_tools = msgspec.json.Decoder(list[_Tool]).decode

_NEEDS = {"tools": "tools", "reasoning_effort": "reasoning_effort"}
"""Parameters that a model's chat template must know what to do with, and what `lacks` calls that."""


class Refusal(msgspec.Struct, frozen=True):
    """A parameter that will not be honoured, and what to do."""

    parameter: str
    hint: str


def refusal(kind: str, lacks: tuple[str, ...], ask: Ask) -> Refusal | None:
    """The first parameter of `ask` that an engine of this kind would ignore; None when there is none.

    `lacks` is what the model's chat template has no place for (`template_lacks`).
    """
    fields, ignored = ask.fields, _IGNORED.get(kind, {})
    for name in fields.keys() & ignored.keys():
        harmless, hint = ignored[name]
        if _asks_for_something(fields[name], harmless):
            return Refusal(name, hint)
    if kind == "llamacpp" and not _names_a_tool(fields):
        return Refusal("tool_choice", "Send 'auto', 'none', 'required', or a function that is among the 'tools'.")
    for name in lacks:
        if name in fields and _asks_for_something(fields[name], ()):
            return Refusal(name, "This model was not made for it; choose another.")
    return None


def _names_a_tool(fields: dict[str, msgspec.Raw]) -> bool:
    """A choice of one tool is a function, and it is there (see `llamacpp._choose_tool`)."""
    choice = fields.get("tool_choice")
    if choice is None or memoryview(choice)[0] != ord("{"):
        return True
    try:
        name = msgspec.json.decode(choice, type=_Tool).function.name
        return any(tool.function.name == name for tool in _decode_tools(fields.get("tools", b"[]")))
    except msgspec.DecodeError:
        return False


def _asks_for_something(value: msgspec.Raw, harmless: Harmless) -> bool:
    if memoryview(value).nbytes > LONGEST_HARMLESS:
        return True
    try:
        found = _decode(value)
    except msgspec.DecodeError:
        return True
    return found is not None and found != [] and found not in harmless


class _Props(msgspec.Struct):
    chat_template_caps: dict[str, Any] = {}


def template_lacks(props: bytes) -> tuple[str, ...]:
    """What llama.cpp's /props page says that the model's chat template has no place for."""
    try:
        caps = msgspec.json.decode(props, type=_Props).chat_template_caps
    except msgspec.DecodeError:
        return ()
    return tuple(name for name, cap in _NEEDS.items() if caps.get(f"supports_{cap}") is False)
