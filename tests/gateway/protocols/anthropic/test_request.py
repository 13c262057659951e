"""Reading Anthropic's requests: what an engine is asked for them, and what is refused by its name."""

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.chunks import on_streams
from tidemill.engines.openai import OpenAIEngine
from tidemill.gateway.errors import BadRequest, UnsupportedParameter
from tidemill.gateway.protocols.anthropic.request import MessagesRequest, read_count, read_messages

HI = [{"role": "user", "content": "hi"}]
PNG = {"type": "base64", "media_type": "image/png", "data": "aWE="}


def for_chat(request: MessagesRequest) -> MessagesRequest:
    """The request as an engine that speaks OpenAI's API is asked."""
    request.prepare_for(OpenAIEngine(), {})
    return request


def read(**fields: Any) -> MessagesRequest:
    return for_chat(read_messages(json.dumps({"model": "m", "max_tokens": 9, "messages": HI, **fields}).encode()))


def asked(**fields: Any) -> dict[str, Any]:
    """The chat that the engine is asked for, without what every one has."""
    found = {name: json.loads(bytes(value)) for name, value in read(**fields).ask.fields.items()}
    assert found.pop("model") == "m" and found.pop("max_tokens") == 9
    return found


def chat(*messages: Any, **fields: Any) -> Any:
    return asked(messages=[*messages], **fields)["messages"]


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def use(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"id_{name}", "name": name, "input": arguments}


def result(name: str = "f", content: Any = "ok", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": f"id_{name}", "content": content, **more}


def test_a_plain_request() -> None:
    assert asked() == {"messages": HI}
    assert asked(stream=True, temperature=0.5, top_p=0.9, top_k=5) == {
        "messages": HI, "stream": True, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
    }  # fmt: skip


def test_what_is_not_known_passes_through() -> None:
    assert asked(min_p=0.1, seed=7)["min_p"] == 0.1


def test_the_size_that_bounds_the_prompt_is_that_of_what_the_engine_gets() -> None:
    request = read(system="x" * 1000)
    sent = msgspec.json.encode(request.ask.fields)
    assert len(sent) <= request.body_bytes <= len(sent) + 16


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("be brief", "be brief"),
        ([text("be brief"), text("be kind")], "be brief\nbe kind"),
        ([text("x-anthropic-billing-header: cc=1"), text("be kind")], "be kind"),
    ],
)
def test_the_system_prompt_is_the_first_message(system: Any, expected: str) -> None:
    assert chat(*HI, system=system) == [{"role": "system", "content": expected}, *HI]


def test_texts_are_joined_and_images_make_parts() -> None:
    assert chat(user(text("a"), text('b"é'))) == [{"role": "user", "content": 'a\nb"é'}]
    image = {"type": "image", "source": PNG}
    link = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
    assert chat(user(text("look"), image, link)) == [
        user(
            text("look"),
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,aWE="}},
            {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        )
    ]


def test_documents() -> None:
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "words"}}
    blocks = {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}}
    assert chat(user(plain, blocks)) == [{"role": "user", "content": "T\nwords\na\nb"}]
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aWE="}}
    file = {"filename": "document.pdf", "file_data": "data:application/pdf;base64,aWE="}
    assert chat(user(pdf)) == [user({"type": "file", "file": file})]
    found = {"type": "search_result", "source": "https://x", "title": "T", "content": [text("words")]}
    assert chat(user(found)) == [{"role": "user", "content": "T\nhttps://x\nwords"}]


def test_turns_of_one_role_in_a_row_are_one() -> None:
    assert chat(user(text("a")), {"role": "user", "content": "b"}) == [{"role": "user", "content": "a\nb"}]


def test_tool_use_and_its_results() -> None:
    got = chat(
        *HI,
        assistant(text("wait"), use("f", city="Paris"), use("g")),
        user(text("and?"), result("f", [text("22"), text("°C"), {"type": "image", "source": PNG}]), result("g")),
    )
    assert got[1] == {
        "role": "assistant",
        "content": "wait",
        "tool_calls": [
            {"id": "id_f", "type": "function", "function": {"name": "f", "arguments": '{"city": "Paris"}'}},
            {"id": "id_g", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    assert got[2:4] == [
        {"role": "tool", "tool_call_id": "id_f", "content": "22\n°C"},
        {"role": "tool", "tool_call_id": "id_g", "content": "ok"},
    ]
    assert [part["type"] for part in got[4]["content"]] == ["text", "image_url"]


@pytest.mark.parametrize(
    ("content", "expected"), [("no such file", "Error: no such file"), ("Error: no", "Error: no"), (None, "Error: ")]
)
def test_a_tool_that_failed_says_so(content: Any, expected: str) -> None:
    got = chat(*HI, assistant(use()), user(result(content=content, is_error=True)))
    assert got[2]["content"] == expected


def test_thinking_is_sent_on_only_while_its_calls_are_being_answered() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": ""}
    hidden = {"type": "redacted_thinking", "data": "x"}
    got = chat(
        *HI, assistant(thinking, hidden, use()), user(result()), assistant(text("a")),
        user(text("more")), assistant(thinking, use()), user(result()),
    )  # fmt: skip
    assert [message.get("reasoning_content") for message in got if message["role"] == "assistant"] == [None, None, "hm"]


def test_a_beginning_of_the_answer_is_gone_on_with() -> None:
    got = asked(messages=[*HI, {"role": "assistant", "content": "{"}])
    assert got["messages"][-1] == {"role": "assistant", "content": "{"}
    assert (got["continue_final_message"], got["add_generation_prompt"]) == (True, False)


def test_tools_become_functions() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"name": "f", "description": "d", "input_schema": schema, "strict": True, "cache_control": {"type": "x"}}
    got = asked(tools=[tool, {"type": "custom", "name": "g", "input_schema": {}}])["tools"]
    assert got == [
        {"type": "function", "function": {"name": "f", "description": "d", "strict": True, "parameters": schema}},
        {"type": "function", "function": {"name": "g", "parameters": {}}},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
    ],
)
def test_the_choice_of_tools(choice: Any, expected: Any) -> None:
    got = asked(tools=[{"name": "f", "input_schema": {}}], tool_choice=choice)
    assert {name: got[name] for name in got if name not in ("tools", "messages")} == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop_sequences": []}, {}),
        ({"metadata": {"user_id": "u1"}}, {"user": "u1"}),
        ({"service_tier": "standard_only"}, {"service_tier": "default"}),
        ({"output_config": {"effort": "high"}}, {"reasoning_effort": "high"}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            {
                "chat_template_kwargs": {"enable_thinking": True, "thinking": True},
                "thinking_budget_tokens": 2000,
                "thinking_token_budget": 2000,
            },
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "output", "strict": True, "schema": {"type": "object"}},
                }
            },
        ),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}, {}),
        ({"cache_control": {"type": "ephemeral"}, "diagnostics": {"previous_message_id": None}}, {}),
        ({"container": None, "mcp_servers": [], "speed": "standard", "n": 1}, {}),
    ],
)
def test_parameters_with_a_counterpart(fields: Any, expected: Any) -> None:
    got = asked(**fields)
    del got["messages"]
    assert got == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"container": "c1"}, "container"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"inference_geo": "eu"}, "inference_geo"),
        ({"speed": "fast"}, "speed"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"messages": [user({"type": "container_upload", "file_id": "f"})]}, "messages.0.content.0.type"),
        (
            {"messages": [user({"type": "image", "source": {"type": "file", "file_id": "f"}})]},
            "messages.0.content.0.source",
        ),
        (
            {"messages": [user({"type": "document", "source": PNG, "citations": {"enabled": True}})]},
            "messages.0.content.0.citations",
        ),
        ({"messages": [*HI, assistant({"type": "server_tool_use", "id": "s"}), *HI]}, "messages.1.content.0.type"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        read(**fields)
    assert refused.value.param == param and f"'{param}" in refused.value.message.replace("Citations", f"'{param}'")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [user({"text": "no type"})]}, "messages.0.content"),
        ({"messages": [user({"type": "text"})]}, "messages.0.content.0"),
        ({"messages": [*HI, assistant(use())]}, "messages"),
        ({"messages": [*HI, assistant({"type": "tool_use", "name": "f"}), user(result())]}, "messages.1.content.0.id"),
        ({"messages": [user({"type": "tool_result"})]}, "messages.0.content.0.tool_use_id"),
        ({"system": 5}, "system"),
        ({"tools": 5}, "tools"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "x"}}, "tool_choice.type"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"metadata": "u"}, "metadata"),
        ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, "budget_tokens"),
        ({"thinking": {"type": "enabled", "display": "loud"}}, "thinking.display"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_is_wrong_is_named(fields: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"\xff","content":"x"}]}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"i",'
        b'"name":"f","input":{"a":"\xff"}}]},{"role":"user","content":"x"}]}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}],"container":"\xff"}',
        b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}],"thinking":{"type":"\xff"}}',
    ],
)
def test_bytes_that_are_no_text_never_break_the_reader(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        for_chat(read_messages(body))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = [*"model max_tokens messages system tools tool_choice stop_sequences metadata thinking output_config".split(),
         *"service_tier context_management container stream n".split()]  # fmt: skip
BLOCK_TYPES = ["text", "image", "tool_use", "tool_result", "thinking", "document", "x"]
BLOCK_FIELDS = ["text", "source", "id", "name", "input", "tool_use_id", "content", "thinking", "title"]
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(BLOCK_TYPES)}, optional=dict.fromkeys(BLOCK_FIELDS, json_values)
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"])},
        optional={"content": json_values | st.lists(blocks, max_size=3)},
    ),
    max_size=4,
)


@on_streams
@given(st.dictionaries(st.sampled_from(NAMES), json_values), messages)
def test_no_body_breaks_the_reader(fields: Any, messages: Any) -> None:
    body = {"model": "m", "max_tokens": 5, "messages": messages, **fields}
    for reader in (read_messages, read_count):
        try:
            read = for_chat(reader(json.dumps(body).encode()))
        except BadRequest as refused:
            assert refused.message
        else:
            assert all(json.loads(bytes(value)) is not ... for value in read.ask.fields.values())


def test_counting_asks_for_no_more_than_the_prompt() -> None:
    request = read_count(json.dumps({"model": "m", "messages": HI, "system": "s"}).encode())
    assert (request.ask.max_tokens, request.ask.stream) == (1, False)
