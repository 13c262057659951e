"""Reading requests of the Responses API: what an engine is asked for them, and what is refused by its name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.chunks import on_streams
from tidemill.gateway.errors import BadRequest, UnsupportedParameter
from tidemill.gateway.protocols.responses.request import ResponsesRequest, read_responses

HI = {"role": "user", "content": "hi"}


def read(**fields: Any) -> ResponsesRequest:
    return read_responses(json.dumps({"model": "m", "input": "hi", **fields}).encode())


def asked(**fields: Any) -> dict[str, Any]:
    found = {name: json.loads(bytes(value)) for name, value in read(**fields).ask.fields.items()}
    assert found.pop("model") == "m"
    return found


def chat(*items: Any, **fields: Any) -> Any:
    return asked(input=[*items], **fields)["messages"]


def call(name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"id_{name}", "name": name, "arguments": arguments}


def output(name: str = "f", output: Any = "ok") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"id_{name}", "output": output}


def called(name: str = "f", arguments: str = "{}") -> dict[str, Any]:
    return {"id": f"id_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_plain_request() -> None:
    assert asked() == {"messages": [HI]}
    assert asked(stream=True, temperature=0.5, max_output_tokens=7, min_p=0.1, user="u") == {
        "messages": [HI], "stream": True, "temperature": 0.5, "max_tokens": 7, "min_p": 0.1, "user": "u",
    }  # fmt: skip
    assert read(max_output_tokens=7).ask.max_tokens == 7


def test_instructions_and_leading_system_messages_are_one() -> None:
    developer = {"role": "developer", "content": [{"type": "input_text", "text": "be kind"}]}
    assert chat(developer, HI, instructions="be brief") == [{"role": "system", "content": "be brief\n\nbe kind"}, HI]
    assert chat(HI, developer) == [HI, {"role": "system", "content": "be kind"}]


def test_content_parts() -> None:
    parts = [
        {"type": "input_text", "text": "look"},
        {"type": "input_image", "image_url": "data:image/png;base64,aWE=", "detail": "low"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,aWE="},
    ]
    (message,) = chat({"type": "message", "role": "user", "content": parts})
    assert message["content"] == [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aWE=", "detail": "low"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,aWE="}},
    ]


def test_what_an_assistant_said_and_called_is_one_message() -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "wait"}]}
    image = [{"type": "input_text", "text": "22"}, {"type": "input_image", "image_url": "https://x/y.png"}]
    got = chat(HI, said, call("f", '{"a":1}'), call("g"), output("f", image), output("g"), said)
    assert got[1:] == [
        {"role": "assistant", "content": "wait", "tool_calls": [called("f", '{"a":1}'), called("g")]},
        {"role": "tool", "tool_call_id": "id_f", "content": "22"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]},
        {"role": "tool", "tool_call_id": "id_g", "content": "ok"},
        {"role": "assistant", "content": "wait"},
    ]


def test_reasoning_is_sent_on_only_while_its_calls_are_being_answered() -> None:
    in_full = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    in_short = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "h"}], "encrypted_content": "x"}
    got = chat(HI, in_full, call(), output(), HI, in_short, call("g"), output("g"))
    assert [message.get("reasoning_content") for message in got if message["role"] == "assistant"] == [None, "h"]


def test_functions() -> None:
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True, "description": None}]
    got = asked(tools=tools, parallel_tool_calls=False)
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert got["tools"] == [{"type": "function", "function": function}] and got["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("choice", "expected", "left"),
    [
        ("required", "required", ["f", "g"]),
        ({"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}, ["f", "g"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
            "required",
            ["g"],
        ),
    ],
)
def test_the_choice_of_tools(choice: Any, expected: Any, left: list[str]) -> None:
    got = asked(tools=[{"type": "function", "name": name} for name in "fg"], tool_choice=choice)
    assert got["tool_choice"] == expected and [tool["function"]["name"] for tool in got["tools"]] == left


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}}},
        ),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"include": ["reasoning.encrypted_content"], "store": False, "metadata": {"a": "b"}}, {}),
        ({"background": False, "truncation": "disabled", "max_tool_calls": 3, "conversation": None}, {}),
        ({"stream_options": {"include_obfuscation": False}}, {}),
        ({"tool_choice": "auto", "tools": []}, {}),
    ],
)
def test_parameters_with_a_counterpart(fields: Any, expected: Any) -> None:
    got = asked(**fields)
    del got["messages"]
    assert got == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [HI, {"type": "computer_call"}]}, "input[1].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0]",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        read(**fields)
    assert refused.value.param == param and param in refused.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [HI, {"type": "function_call", "name": "f"}]}, "input[1].call_id"),
        ({"input": [HI, {"type": "function_call_output", "output": "x"}]}, "input[1].call_id"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"store": "yes"}, "store"),
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"text": "json"}, "text"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_wrong_is_named(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(**fields)
    assert refused.value.param == param


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
items = st.fixed_dictionaries(
    {"type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "x"])},
    optional=dict.fromkeys("role content call_id name arguments output summary".split(), json_values),
)
NAMES = [*"model input instructions tools tool_choice text reasoning max_output_tokens include store".split(),
         *"previous_response_id top_logprobs stream_options background n".split()]  # fmt: skip


@on_streams
@given(st.dictionaries(st.sampled_from(NAMES), json_values | st.lists(items, max_size=3)), st.lists(items, max_size=4))
def test_no_body_breaks_the_reader(fields: Any, given_items: Any) -> None:
    try:
        read_responses(json.dumps({"model": "m", "input": given_items, **fields}).encode())
    except BadRequest as refused:
        assert refused.message
