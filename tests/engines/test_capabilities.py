"""What an engine would ignore in silence is found before it is asked."""

import json
from typing import Any

import pytest
from msgspec import Raw

from tidemill.engines.capabilities import refusal, template_lacks
from tidemill.engines.llamacpp import LlamaCppEngine
from tidemill.engines.protocol import Ask, Refusal
from tidemill.engines.registry import engine_of


def ask(**fields: Any) -> Ask:
    return Ask(
        path=b"/chat/completions",
        fields={name: Raw(json.dumps(value).encode()) for name, value in fields.items()},
        stream=False,
        wants_usage=False,
        choices=1,
        max_tokens_field="max_tokens",
        max_tokens=None,
    )


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {}}}


def chosen(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"store": False, "audio": None, "modalities": ["text"], "functions": [], "verbosity": "medium"},
        {"tools": [tool("f")], "tool_choice": "required", "logprobs": True, "n": 3, "seed": 5},
        {"tools": [tool("f"), tool("g")], "tool_choice": chosen("g")},
        {"reasoning_effort": None},
    ],
)
def test_what_is_honoured_passes(fields: Any) -> None:
    assert refusal(engine_of("llamacpp"), ("reasoning_effort",), ask(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"store": True}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "a" * 100}}, "audio"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"tools": [tool("f")], "tool_choice": chosen("g")}, "tool_choice"),
        ({"tool_choice": chosen("g")}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": 5, "tool_choice": chosen("g")}, "tool_choice"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_what_would_be_ignored_is_refused(fields: Any, parameter: str) -> None:
    found = refusal(engine_of("llamacpp"), ("reasoning_effort",), ask(**fields))
    assert isinstance(found, Refusal) and found.parameter == parameter and found.hint


def test_another_server_answers_for_itself() -> None:
    assert refusal(engine_of("openai"), (), ask(store=True, audio={}, tool_choice=chosen("g"))) is None


def test_what_a_template_lacks_is_read_from_its_props() -> None:
    caps = {"supports_tools": False, "supports_tool_calls": False, "supports_reasoning_effort": True}
    assert template_lacks(json.dumps({"chat_template_caps": caps}).encode()) == ("tools",)
    assert template_lacks(b"{}") == template_lacks(b"") == template_lacks(b"[]") == ()


def test_the_choice_of_one_tool_becomes_that_tool_alone_and_a_demand() -> None:
    asked = ask(tools=[tool("f"), tool("g")], tool_choice=chosen("g"))
    body = json.loads(LlamaCppEngine().body(asked, model="m", output_cap=9))
    assert body["tools"] == [tool("g")] and body["tool_choice"] == "required"
    plain = json.loads(LlamaCppEngine().body(ask(tools=[tool("f")], tool_choice="auto"), model="m", output_cap=9))
    assert plain["tools"] == [tool("f")] and plain["tool_choice"] == "auto"
