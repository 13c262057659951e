"""The engine `anthropic` without a network: what it is asked, and what its answers become."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines.streams import cut, feed, payloads
from tests.support.paths import ANTHROPIC_CONTRACTS
from tidemill.engines.anthropic.chat_answer import ChatTap
from tidemill.engines.anthropic.stream import MessagesTap
from tidemill.engines.capabilities import refusal
from tidemill.engines.collect import Collector
from tidemill.engines.protocol import Ask, Tap, TokenCounts
from tidemill.engines.registry import engine_of
from tidemill.engines.sse import BrokenStream

ENGINE = engine_of("anthropic")
EXPECTED: dict[str, dict[str, Any]] = json.loads((ANTHROPIC_CONTRACTS / "expected.json").read_bytes())
STREAMS = sorted(name for name in EXPECTED if name.endswith(".sse"))
MESSAGES = sorted(name for name in EXPECTED if not name.endswith(".sse"))
HI = [{"role": "user", "content": "hi"}]


def contract(name: str) -> bytes:
    return (ANTHROPIC_CONTRACTS / name).read_bytes()


def counts(name: str) -> TokenCounts:
    told = EXPECTED[name]
    return TokenCounts(told["prompt"], told["cached"], told["completion"], 0, told["cache_write"])


def raw(fields: dict[str, Any]) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}


def chat(path: bytes = b"/chat/completions", *, stream: bool = False, usage: bool = True, **fields: Any) -> Ask:
    return Ask(
        path=path,
        fields=raw({"model": "ours", "messages": HI, **fields}),
        stream=stream,
        wants_usage=usage,
        choices=1,
        max_tokens_field="max_tokens",
        max_tokens=None,
    )


def native(text: bytes | None = None, betas: bytes = b"", **fields: Any) -> Ask:
    body = text or json.dumps({"model": "ours", "max_tokens": 50, "messages": HI, **fields}).encode()
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return Ask(
        path=b"/messages",
        fields=members,
        stream=False,
        wants_usage=False,
        choices=1,
        max_tokens_field="max_tokens",
        max_tokens=50,
        body=body,
        betas=betas,
    )


def asked(**fields: Any) -> dict[str, Any]:
    """What the upstream is asked for a chat."""
    found: dict[str, Any] = json.loads(ENGINE.body(chat(**fields), model="theirs", output_cap=99))
    assert (found.pop("model"), found.pop("max_tokens"), found.pop("stream")) == ("theirs", 99, False)
    return found


def refused(ask: Ask) -> str | None:
    found = refusal(ENGINE, (), ask)
    return found.parameter if found is not None else None


# A client that speaks Messages


def test_a_messages_request_passes_but_for_its_model_and_its_limit() -> None:
    text = b'{ "max_tokens" : 50,\n "model":"ours","messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}],"new":{ }}'
    sent = ENGINE.body(native(text), model="theirs", output_cap=9)
    assert sent == text.replace(b'"max_tokens" : 50', b'"max_tokens" : 9').replace(b'"ours"', b'"theirs"')
    assert ENGINE.body(native(text), model="ours", output_cap=50) == text
    assert ENGINE.path(native()) == b"/messages"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", [*STREAMS, "overloaded.sse"])
@given(st.data())
def test_a_stream_passes_byte_for_byte_wherever_it_is_cut(name: str, line_end: bytes, data: Any) -> None:
    stream = contract(name).replace(b"\n", line_end)
    tap = ENGINE.tap(native(stream=True))
    assert feed(tap, data.draw(cut(stream))) == stream
    assert tap.done and tap.begun
    if name == "overloaded.sse":
        assert tap.failed and not tap.exact
        assert tap.estimate(4_000) == TokenCounts(40, 0, tap.estimated_completion) and tap.estimated_completion == 2
    else:
        assert tap.exact and tap.counts == counts(name) and not tap.failed


@pytest.mark.parametrize("name", STREAMS)
@given(data=st.data())
def test_a_stream_that_breaks_off_is_broken_and_its_prompt_is_known(name: str, data: Any) -> None:
    stream = contract(name)
    at = data.draw(st.integers(stream.index(b"content_block_start"), stream.index(b"event: message_delta") - 1))
    tap = ENGINE.tap(native(stream=True))
    out = tap.feed(stream[:at])
    assert stream.startswith(out) and not tap.done and not tap.exact
    told = tap.estimate(99)
    assert (told.cached, told.cache_write) == (
        EXPECTED[name]["cached"] if name != "refusal.sse" else 0,
        counts(name).cache_write,
    )
    assert told.completion >= 1
    with pytest.raises(BrokenStream):
        tap.end()


def test_a_ping_is_no_beginning() -> None:
    ping, start = b'event: ping\ndata: {"type":"ping"}\n\n', contract("text.sse").partition(b"\n\n")[0] + b"\n\n"
    for tap in (ENGINE.tap(native()), ENGINE.tap(chat())):
        assert tap.feed(ping) == b"" and tap.feed(b": so\n\n") == b"" and not tap.begun
    tap = ENGINE.tap(native())
    assert tap.feed(ping) + tap.feed(start) == ping + start and tap.begun
    assert ENGINE.tap(chat()).end() == b""


def test_what_is_no_json_is_broken() -> None:
    for tap in (ENGINE.tap(native()), ENGINE.tap(chat())):
        with pytest.raises(BrokenStream):
            tap.feed(b"event: message_start\ndata: {oops\n\n")
    with pytest.raises(BrokenStream):
        ENGINE.tap(chat()).feed(b"event: content_block_delta\ndata: {oops\n\n")


@given(st.data())
def test_what_comes_before_a_broken_event_passes_wherever_it_is_cut(data: Any) -> None:
    stream, broken = contract("text.sse"), b"event: content_block_stop\ndata: {oops\n\n"
    at = stream.index(b"event: content_block_stop")
    for ask in (native(), chat()):
        tap, out = ENGINE.tap(ask), b""
        whole = feed(ENGINE.tap(ask), [stream])
        with pytest.raises(BrokenStream):
            for piece in data.draw(cut(stream[:at] + broken + stream[at:])):
                out += tap.feed(piece)
            tap.end()
        assert whole.startswith(out) and "🌊".encode() in out and not tap.done


def test_a_server_that_names_no_events_is_understood_too() -> None:
    stream = b"".join(line + b"\n\n" for line in contract("text.sse").split(b"\n") if line.startswith(b"data:"))
    tap = ENGINE.tap(native())
    assert feed(tap, [stream]) == stream and tap.counts == counts("text.sse") and tap.produced == 15


@pytest.mark.parametrize("name", MESSAGES)
def test_a_whole_answer_passes_and_is_counted(name: str) -> None:
    body = contract(name)
    assert ENGINE.answer(native(), body) == body and ENGINE.usage(body) == counts(name)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": -5, "output_tokens": -1}, TokenCounts()),
        ({"input_tokens": None, "output_tokens": 3}, TokenCounts(completion=3)),
        ({"output_tokens": 3, "output_tokens_details": {"thinking_tokens": 2}}, TokenCounts(completion=3, reasoning=2)),
        ({"output_tokens": 3, "output_tokens_details": "none"}, TokenCounts(completion=3)),
        ({"input_tokens": 10**30, "output_tokens": 1}, TokenCounts(2**28, 0, 1)),
        ({"input_tokens": 1, "cache_read_input_tokens": 5, "cache_creation_input_tokens": -2}, TokenCounts(6, 5)),
    ],
)
def test_absurd_usage_stays_within_what_can_be(usage: Any, expected: TokenCounts) -> None:
    assert ENGINE.usage(json.dumps({"usage": usage}).encode()) == expected


def test_an_answer_without_usage_has_none() -> None:
    assert ENGINE.usage(b"{}") is None and ENGINE.usage(b'{"usage":{"input_tokens":"many"}}') is None
    with pytest.raises(BrokenStream):
        ENGINE.usage(b"<html>")


def test_the_key_goes_where_anthropic_wants_it_and_betas_only_as_far_as_they_may() -> None:
    assert ENGINE.auth_headers("k") == {"x-api-key": "k", "anthropic-version": "2023-06-01"}
    betas = b"interleaved-thinking-2025-05-14, files-api-2025-04-14,context-1m-2025-08-07,output-128k-2025-02-19\x80"
    assert ENGINE.headers(native(betas=betas)) == b"anthropic-beta: interleaved-thinking-2025-05-14\r\n"
    assert ENGINE.headers(native()) == ENGINE.headers(chat()) == b""


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "https://x"}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}, {"type": "web_search_20250305"}]}, "tools.1.type"),
        ({"mcp_servers": [], "speed": "standard", "container": None}, None),
        ({"tools": [{"name": "f", "input_schema": {}}, {"type": "custom"}, {"type": None}]}, None),
        ({"tools": "no list"}, None),  # the upstream says so
    ],
)
def test_what_would_be_billed_apart_is_refused(fields: Any, parameter: str | None) -> None:
    assert refused(native(**fields)) == parameter


def test_counting_asks_with_what_may_be_asked_with() -> None:
    path, body = ENGINE.count(
        native(system="s", temperature=1, stream=True, thinking={"type": "adaptive"}), model="t"
    ) or (b"", b"")
    assert path == b"/messages/count_tokens"
    assert json.loads(body) == {"model": "t", "messages": HI, "system": "s", "thinking": {"type": "adaptive"}}
    _, body = ENGINE.count(chat(temperature=1), model="t") or (b"", b"")
    assert json.loads(body) == {
        "model": "t",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    }


# A client that speaks chat


def put_together(events: bytes, told: TokenCounts) -> dict[str, Any]:
    collector = Collector()
    collector.feed(events)
    answer: dict[str, Any] = json.loads(collector.answer(told))
    return answer


def check_chat(name: str, answer: dict[str, Any]) -> None:
    told, (choice,) = EXPECTED[name], answer["choices"]
    said = choice["message"]
    assert (said.get("content") or "", said.get("reasoning_content", "")) == (told["text"], told["thinking"])
    calls = [
        [call["function"]["name"], json.loads(call["function"]["arguments"])] for call in said.get("tool_calls", [])
    ]
    assert calls == told["calls"] and choice["finish_reason"] == told["finish"]
    assert all(call["id"].startswith("toolu_") for call in said.get("tool_calls", []))
    assert answer["model"] == "ours" and answer["object"] == "chat.completion" and answer["id"].startswith("msg_")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (told["prompt"], told["completion"])
    details = usage["prompt_tokens_details"]
    assert (details["cached_tokens"], details.get("cache_write_tokens", 0)) == (told["cached"], told["cache_write"])


@pytest.mark.parametrize("name", STREAMS)
@given(data=st.data())
def test_a_stream_becomes_a_chat_wherever_it_is_cut(name: str, data: Any) -> None:
    tap = ENGINE.tap(chat(stream=True))
    events = feed(tap, data.draw(cut(contract(name))))
    assert tap.done and tap.exact and tap.counts == counts(name)
    check_chat(name, put_together(events, tap.counts))
    chunks = payloads(b"".join(each + b"\n\n" for each in events.split(b"\n\n") if each[:1] != b":" and each))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == tap.counts.completion
    assert {chunk["model"] for chunk in chunks} == {"ours"}


def test_usage_is_told_only_to_who_asks_for_it() -> None:
    tap = ENGINE.tap(chat(stream=True, usage=False))
    assert b'"usage"' not in feed(tap, [contract("text.sse")]) and tap.exact


def test_an_error_in_mid_stream_is_a_chats_error() -> None:
    tap = ENGINE.tap(chat(stream=True))
    events = feed(tap, [contract("overloaded.sse")])
    assert tap.failed and payloads(events)[-1]["error"]["code"] == "overloaded_error"


@pytest.mark.parametrize("name", MESSAGES)
def test_a_whole_answer_becomes_a_chat(name: str) -> None:
    check_chat(name, json.loads(ENGINE.answer(chat(), contract(name))))


def test_the_shapes_of_the_taps() -> None:
    taps: list[Tap] = [ENGINE.tap(native()), ENGINE.tap(chat())]
    assert [type(tap) for tap in taps] == [MessagesTap, ChatTap]


CALL = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
}
PNG = "data:image/png;base64,aWE="


def test_a_conversation_with_tools_and_images() -> None:
    found = asked(
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "developer", "content": [{"type": "text", "text": "be kind"}]},
            {"role": "user", "name": "x", "content": [
                {"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,aWE="}},
            ]},
            {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [CALL, {**CALL, "id": "t2"}]},
            {"role": "tool", "tool_call_id": "t1", "content": "22"},
            {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "23"}]},
            {"role": "user", "content": "so?"},
            {"role": "assistant", "content": ""},
        ],
        tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
    )  # fmt: skip
    use = {"type": "tool_use", "name": "f", "input": {"a": [1]}}
    assert found["system"] == [{"type": "text", "text": "be brief"}, {"type": "text", "text": "be kind"}]
    assert found["messages"] == [
        {"role": "user", "content": [
            {"type": "text", "text": "look"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aWE="}},
            {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
            {"type": "document", "title": "a.pdf",
             "source": {"type": "base64", "media_type": "application/pdf", "data": "aWE="}},
        ]},
        {"role": "assistant", "content": [{**use, "id": "t1"}, {**use, "id": "t2"}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "22"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "23"}]},
            {"type": "text", "text": "so?"},
        ]},
    ]  # fmt: skip
    assert found["tools"] == [{"name": "f", "description": "d", "strict": True, "input_schema": {"type": "object"}}]
    assert found["tool_choice"] == {"type": "any", "disable_parallel_tool_use": True}


@pytest.mark.parametrize(
    ("fields", "members"),
    [
        ({"stop": "x"}, {"stop_sequences": ["x"]}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 5}, {"temperature": 0.5, "top_p": 0.9, "top_k": 5}),
        ({"stop": ["x", "y"], "user": "u"}, {"stop_sequences": ["x", "y"], "metadata": {"user_id": "u"}}),
        ({"reasoning_effort": "minimal"}, {"output_config": {"effort": "low"}}),
        ({"reasoning_effort": "none", "response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"a": 1}}}},
            {"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}},
        ),
        ({"thinking": {"type": "adaptive"}}, {"thinking": {"type": "adaptive"}}),
        ({"tools": [], "tool_choice": "auto", "n": 1, "logprobs": False, "store": False, "stop": None}, {}),
        ({"frequency_penalty": 0.0, "logit_bias": {}, "service_tier": "flex", "metadata": {"a": "b"}}, {}),
    ],
)  # fmt: skip
def test_parameters(fields: Any, members: Any) -> None:
    found = asked(**fields)
    found.pop("messages")
    assert found == members and refused(chat(**fields)) is None


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}),
    ],
)
def test_the_choice_of_a_tool(choice: Any, expected: Any) -> None:
    assert asked(tools=[TOOL], tool_choice=choice)["tool_choice"] == expected
    parallel = asked(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)["tool_choice"]
    assert parallel.get("disable_parallel_tool_use", False) is (choice != "none")


@pytest.mark.parametrize(
    ("arguments", "given"),
    [("", {}), (None, {}), ("{oops", {"INVALID_JSON": "{oops"}), ("[1]", {"INVALID_JSON": "[1]"})],
)
def test_arguments_that_are_no_object(arguments: Any, given: Any) -> None:
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (message,) = asked(messages=[{"role": "assistant", "tool_calls": [call]}])["messages"]
    assert message["content"][0]["input"] == given


def says(part: Any, role: str = "user") -> Any:
    return {"messages": [{"role": role, "content": [part]}]}


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"seed": 7}, "seed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": 1.5}, "temperature"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_p": 0.1}, "min_p"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": {"a": 1}}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (says({"type": "input_audio"}), "messages.0.content.0"),
        (says({"type": "file", "file": {"file_id": "f"}}), "messages.0.content.0"),
        (says({"type": "image_url", "image_url": "data:x"}), "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages.0.tool_calls.0"),
        (says({"type": "image_url", "image_url": PNG}, role="system"), "messages.0.content"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_refused_by_its_name(fields: Any, parameter: str) -> None:
    assert refused(chat(**fields)) == parameter


def test_a_text_completion_is_refused() -> None:
    assert refused(chat(b"/completions", prompt="x")) == "prompt"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "role content type text image_url url file file_data tool_calls id function name arguments".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
NAMES = "messages tools tool_choice stop temperature user reasoning_effort response_format parallel_tool_calls".split()


@given(st.dictionaries(st.sampled_from(NAMES), json_values))
def test_no_chat_breaks_the_translation(fields: Any) -> None:
    ask = chat(**fields)
    if refused(ask) is None:
        json.loads(ENGINE.body(ask, model="m", output_cap=1))
