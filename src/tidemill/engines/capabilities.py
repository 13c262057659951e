"""What engines cannot do: parameters that they would ignore in silence, and that are refused.

llama.cpp takes a chat and leaves out what it does not know, without a word (its tools/server/README.md names what it
takes; the rest was tried on build 11549). So do vLLM and SGLang (the fields of the request classes of vLLM 0.33.0 and
SGLang 0.5.23 are recorded in tests/engines/contracts/). Another OpenAI-compatible server answers for itself: what it
does not like, it refuses by name, and that error reaches the client.
"""

from typing import Any

import msgspec

from tidemill.engines.protocol import Ask, Engine, Harmless, Refusal, Unsupported

_decode = msgspec.json.Decoder().decode

LONGEST_HARMLESS = 64
"""A longer value, in bytes of JSON, always asks for something."""

UNSUPPORTED_BY_OWN: Unsupported = {
    "audio": ((), "It gives no sound."),
    "modalities": ((["text"],), "It gives text only."),
    "web_search_options": ((), "It does not search the web."),
    "store": ((False,), "It keeps no conversations; the Responses API does."),
    "functions": ((), "Send 'tools'."),
    "function_call": (("none",), "Send 'tool_choice'."),
    "verbosity": (("medium",), "Say in the prompt how long the answer shall be."),
}

"""What engines of our own leave out, as the `unsupported` of an engine."""

_NEEDS = {"tools": "tools", "reasoning_effort": "reasoning_effort"}
"""Parameters that a model's chat template must know what to do with, and what `lacks` calls that."""


def refusal(engine: Engine, lacks: tuple[str, ...], ask: Ask) -> Refusal | None:
    """The first parameter of `ask` that the engine would not honour; None when there is none.

    `lacks` is what the model's chat template has no place for (`template_lacks`).
    """
    fields, unsupported = ask.fields, engine.unsupported
    for name in fields.keys() & unsupported.keys():
        harmless, hint = unsupported[name]
        if asks_for_something(fields[name], harmless):
            return Refusal(name, hint)
    refused = engine.refuses(ask)
    if refused is not None:
        return refused
    for name in lacks:
        if name in fields and asks_for_something(fields[name], ()):
            return Refusal(name, "This model was not made for it; choose another.")
    return None


def asks_for_something(value: msgspec.Raw, harmless: Harmless) -> bool:
    """A parameter's value is neither null, an empty list, nor one of the `harmless`."""
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
