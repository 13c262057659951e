"""OpenAI's own client and the Responses API: what it gets is what is billed, and what is kept costs nothing again."""

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseReasoningItem
from sqlalchemy import update

from tests.gateway.clients import openai as client_of
from tests.support.data_plane import Start
from tests.support.paths import GATEWAY_CONTRACTS
from tests.support.plane import Plane
from tests.support.upstream import (
    DONE,
    LAST_CHUNK,
    STREAM_HEAD,
    Asked,
    Caller,
    Script,
    completion,
    event,
    finish,
    role,
    usage,
    usage_object,
    word,
)
from tests.support.waiting import until
from tests.support.wire import get, post
from tidemill.errors import Unavailable
from tidemill.gateway.protocols.responses import store as responses_shelf
from tidemill.store.keys import create_key
from tidemill.store.responses import keep_responses
from tidemill.store.revision import bump_revision
from tidemill.store.tables.files import responses as responses_table
from tidemill.store.tenants import create_tenant

ASK: dict[str, Any] = {"model": "mock", "input": "one two three"}
TOOL: Any = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}


def saying(*texts: str) -> Script:
    """An engine that says each text in its turn, whole or streamed."""
    turns = iter(texts)

    async def script(asked: Asked, caller: Caller) -> None:
        text = next(turns)
        if asked.json.get("stream"):
            await caller.stream(role(), *map(word, text), finish(), usage(30, 5, 12), DONE)
        else:
            await caller.whole(completion(text, usage_object(30, 5, 12)))

    return script


async def billed(plane: Plane, response: Response) -> None:
    """The response's usage is its record's, to the token."""
    record, used = await plane.record(), response.usage
    assert used is not None
    cached = used.input_tokens_details.cached_tokens
    assert (used.input_tokens, cached, used.output_tokens) == (record.prompt, record.cached, record.completion)
    assert used.total_tokens == record.prompt + record.completion
    assert record.opened.request_id == response.id.replace("resp_", "req_")


async def other_tenant(plane: Plane) -> str:
    """The key of another tenant."""
    now = datetime.now(UTC)
    with plane.store.write() as connection:
        tenant = create_tenant(connection, name="other", currency="USD", now=now)
        _, key = create_key(connection, tenant_id=tenant.tenant_id, name="test", now=now)
        bump_revision(connection)
    await plane.authenticator.renew()
    return key


async def test_a_whole_answer(start: Start) -> None:
    plane, upstream = await start(saying("hello"))
    response = await client_of(plane).responses.create(**ASK, instructions="be brief", max_output_tokens=9)
    assert response.output_text == "hello" and response.status == "completed"
    asked = upstream.asked[0].json
    assert asked["messages"] == [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "one two three"},
    ]  # fmt: skip
    assert asked["max_tokens"] == 9 and "input" not in asked and "store" not in asked
    await billed(plane, response)


async def test_a_stream(start: Start) -> None:
    plane, _ = await start(saying("hello"))
    async with client_of(plane).responses.stream(**ASK) as stream:
        deltas = [each.delta async for each in stream if each.type == "response.output_text.delta"]
        response = await stream.get_final_response()
    assert deltas == list("hello") and response.output_text == "hello"
    await billed(plane, response)


async def test_an_answer_by_a_schema(start: Start) -> None:
    import pydantic

    class Mill(pydantic.BaseModel):
        wheels: int

    plane, upstream = await start(saying('{"wheels": 3}'))
    response = await client_of(plane).responses.parse(**ASK, text_format=Mill)
    assert response.output_parsed == Mill(wheels=3)
    form = upstream.asked[0].json["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["name"] == "Mill"
    assert form["json_schema"]["schema"]["required"] == ["wheels"]
    await plane.settled()


async def test_a_tool_call_and_its_output(start: Start) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"ci', 'ty": "Par', 'is"}')]

    async def script(asked: Asked, caller: Caller) -> None:
        if asked.json["messages"][-1]["role"] == "tool":
            await caller.whole(completion("22 degrees", usage_object(40, 3)))
            return
        deltas = [{"choices": [{"index": 0, "delta": {"tool_calls": [each]}}]} for each in [call, *pieces]]
        await caller.stream(role(), *[event(each) for each in deltas], finish("tool_calls"), usage(30, 9), DONE)

    plane, upstream = await start(script)
    client = client_of(plane)
    async with client.responses.stream(**ASK, tools=[TOOL]) as stream:
        first = await stream.get_final_response()
    (item,) = first.output
    assert item.type == "function_call" and (item.call_id, item.name) == ("call_1", "get_weather")
    assert json.loads(item.arguments) == {"city": "Paris"}
    result: Any = [{"type": "function_call_output", "call_id": "call_1", "output": "22"}]
    second = await client.responses.create(model="mock", input=result, previous_response_id=first.id, tools=[TOOL])
    assert second.output_text == "22 degrees"
    assert [message["role"] for message in upstream.asked[-1].json["messages"]] == ["user", "assistant", "tool"]
    assert len(await plane.settled()) == 2


async def test_reasoning_is_an_item_and_counted(start: Start) -> None:
    recorded = (GATEWAY_CONTRACTS / "llamacpp_reasoning.sse").read_bytes()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.stream(*[each + b"\n\n" for each in recorded.split(b"\n\n") if each])

    plane, _ = await start(script, engine="llamacpp", owned=True)
    client = client_of(plane)
    whole = await client.responses.create(**ASK)
    async with client.responses.stream(**ASK) as stream:
        streamed = await stream.get_final_response()
    for response in (whole, streamed):
        (item,) = response.output
        assert isinstance(item, ResponseReasoningItem) and item.content is not None and len(item.content[0].text) > 10
        assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens == 11
    assert whole.usage == streamed.usage
    assert len(await plane.settled()) == 2


async def test_retrieving_a_stored_response_never_charges_again(start: Start) -> None:
    plane, upstream = await start(saying("hello", "again"))
    client = client_of(plane)
    made = await client.responses.create(**ASK, metadata={"a": "b"})
    async with client.responses.stream(**ASK) as stream:
        streamed = await stream.get_final_response()
    before = await plane.settled()
    for _ in range(3):
        assert await client.responses.retrieve(made.id) == made
        kept = await client.responses.retrieve(streamed.id)
        assert kept.to_dict() == Response.model_validate(streamed.to_dict()).to_dict() or kept.output_text == "again"
    assert made.store is True
    assert await plane.settled() == before and len(before) == 2
    assert len(upstream.asked) == 2


async def test_a_response_is_kept_beyond_the_process_that_made_it(start: Start) -> None:
    plane, _ = await start(saying("hello"))
    made = await client_of(plane).responses.create(**ASK)
    await plane.settled()
    if plane.response_store._writing is not None:
        await plane.response_store._writing
    other_process = responses_shelf.ResponseStore(plane.store)
    found = await other_process.find(plane.tenant_id, made.id)
    assert found is not None and json.loads(found.response)["id"] == made.id
    await other_process.close(within_s=1.0)


@pytest.mark.parametrize(
    ("by_default", "keep_s", "asked", "kept"),
    [
        (True, 100, None, True),
        (False, 100, None, False),
        (False, 100, True, True),
        (True, 100, False, False),
        (True, 0, True, False),
    ],
)
async def test_the_operator_says_what_is_kept(
    start: Start, by_default: bool, keep_s: int, asked: bool | None, kept: bool
) -> None:
    plane, _ = await start(saying("hello", "hello"))
    plane.response_store._rules = responses_shelf.ResponseStoreRules(keep_s=keep_s, by_default=by_default)
    client = client_of(plane)
    wish: dict[str, Any] = {} if asked is None else {"store": asked}
    made = await client.responses.create(**ASK, **wish)
    assert made.store is kept
    async with client.responses.stream(**ASK, **wish) as stream:
        assert (await stream.get_final_response()).to_dict()["store"] is kept
    if kept:
        assert (await client.responses.retrieve(made.id)).id == made.id
    else:
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)


async def test_old_responses_are_swept(start: Start) -> None:
    plane, _ = await start(saying("hello"))
    made = await client_of(plane).responses.create(**ASK)
    await until(lambda: plane.response_store._writing is None)  # it is written down behind the answer
    await plane.response_store.sweep()
    assert await plane.response_store.find(plane.tenant_id, made.id) is not None
    plane.response_store._rules = responses_shelf.ResponseStoreRules(keep_s=0)
    await plane.response_store.sweep()
    plane.response_store._rules = responses_shelf.ResponseStoreRules()
    assert await plane.response_store.find(plane.tenant_id, made.id) is None


async def test_going_on_from_a_response(start: Start) -> None:
    plane, upstream = await start(saying("one", "two", "three"))
    client = client_of(plane)
    first = await client.responses.create(**ASK, instructions="only now")
    second = await client.responses.create(model="mock", input="more", previous_response_id=first.id)
    async with client.responses.stream(model="mock", input="yet more", previous_response_id=second.id) as stream:
        third = await stream.get_final_response()
    assert third.previous_response_id == second.id
    assert [(message["role"], message["content"]) for message in upstream.asked[-1].json["messages"]] == [
        ("user", "one two three"), ("assistant", "one"), ("user", "more"), ("assistant", "two"), ("user", "yet more"),
    ]  # fmt: skip
    assert len(await plane.settled()) == 3


async def test_what_was_not_kept_cannot_be_gone_on_from_nor_read(start: Start) -> None:
    plane, _ = await start(saying("hello", "hello"))
    client = client_of(plane)
    unkept = await client.responses.create(**ASK, store=False)
    assert unkept.store is False
    for response_id in (unkept.id, "resp_nothing"):
        with pytest.raises(openai.NotFoundError) as missing:
            await client.responses.retrieve(response_id)
        assert missing.value.code == "response_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.responses.create(**ASK, previous_response_id=response_id)
        assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")
    kept = await client.responses.create(**ASK)
    await client.responses.delete(kept.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(kept.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.delete(kept.id)
    assert len(await plane.settled()) == 2


async def test_the_answer_to_a_delete_is_openais(start: Start) -> None:
    plane, _ = await start(saying("hello"))
    kept = await client_of(plane).responses.create(**ASK)
    raw = get(f"/v1/responses/{kept.id}", plane.key).replace(b"GET", b"DELETE")
    assert (await plane.send(raw)).json == {"id": kept.id, "object": "response", "deleted": True}
    await plane.settled()


async def test_a_response_is_its_tenants_alone(start: Start) -> None:
    plane, _ = await start(saying("hello"))
    stranger = client_of(plane, await other_tenant(plane))
    kept = await client_of(plane).responses.create(**ASK)
    for written in (False, True):
        if written and plane.response_store._writing is not None:
            await plane.response_store._writing
        with pytest.raises(openai.NotFoundError):
            await stranger.responses.retrieve(kept.id)
        with pytest.raises(openai.NotFoundError):
            await stranger.responses.delete(kept.id)
        with pytest.raises(openai.BadRequestError):
            await stranger.responses.create(**ASK, previous_response_id=kept.id)
    assert (await client_of(plane).responses.retrieve(kept.id)).id == kept.id
    await plane.settled()


async def test_a_response_that_is_too_old_is_gone(start: Start) -> None:
    plane, _ = await start(saying("hello"))
    client = client_of(plane)
    kept = await client.responses.create(**ASK)
    await plane.settled()
    if plane.response_store._writing is not None:
        await plane.response_store._writing
    with plane.store.write() as connection:
        connection.execute(update(responses_table).values(expires_at=time.time_ns() // 1000))
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(kept.id)


async def test_a_shelf_without_room_says_so_in_the_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_shelf, "MAX_WAITING_BYTES", 100)
    plane, _ = await start(saying("hello"))
    response = await client_of(plane).responses.create(**ASK)
    assert (response.output_text, response.store) == ("hello", False)
    await plane.settled()


async def test_a_store_that_does_not_answer_for_a_while_loses_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_shelf, "TRY_AGAIN_S", 0.05)
    plane, _ = await start(saying("hello"))
    tries = []

    def failing(*args: Any, **options: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("Not now.")
        keep_responses(*args, **options)

    monkeypatch.setattr(responses_shelf, "keep_responses", failing)
    response = await client_of(plane).responses.create(**ASK)
    assert (await client_of(plane).responses.retrieve(response.id)).id == response.id  # from memory
    async with asyncio.timeout(60):
        while plane.response_store._writing is not None:
            await asyncio.sleep(0.02)
    assert len(tries) == 3
    assert (await client_of(plane).responses.retrieve(response.id)).id == response.id
    await plane.settled()


async def test_many_at_once_are_all_kept(start: Start) -> None:
    plane, _ = await start(saying(*["hello"] * 100))
    client = client_of(plane)
    made = await asyncio.gather(*(client.responses.create(**ASK) for _ in range(100)))
    found = await asyncio.gather(*(client.responses.retrieve(each.id) for each in made))
    assert [each.id for each in found] == [each.id for each in made]
    assert len(await plane.settled()) == 100


async def test_errors_are_openais(start: Start) -> None:
    plane, upstream = await start(saying())
    client = client_of(plane)
    for kind, code, changes in (
        (openai.NotFoundError, "model_not_found", {"model": "nothing"}),
        (openai.BadRequestError, "unsupported_parameter", {"background": True}),
        (openai.BadRequestError, "unsupported_parameter", {"tools": [{"type": "web_search"}]}),
    ):
        with pytest.raises(kind) as failed:
            await client.responses.create(**{**ASK, **changes})
        assert failed.value.code == code
    with pytest.raises(openai.AuthenticationError):
        await client_of(plane, "sk-no").responses.create(**ASK)
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.retrieve("resp_1", stream=True)
    assert refused.value.param == "stream"
    assert not upstream.asked


async def test_an_engine_lost_in_mid_stream_fails_the_response(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for each in (role(), word("hel")):
            await caller.chunk(each)
        caller.reset()

    plane, _ = await start(script)
    stream = await client_of(plane).responses.create(**ASK, stream=True)
    events = [each async for each in stream]
    assert [each.type for each in events[-2:]] == ["error", "response.failed"]
    failed = events[-1]
    assert failed.type == "response.failed" and failed.response.error is not None
    assert failed.response.error.code == "engine_lost"
    assert (await plane.record()).status == "engine_lost"


REST_AFTER_THE_CLIENT = {
    "it ends well": ((word("lo"), finish(), usage(30, 5), DONE), "client_closed"),
    "it ends without a word": ((word("lo"), finish(), usage(30, 5)), "client_closed"),
    "an error event and the end": ((word("lo"), event({"error": {"message": "boom"}}), DONE), "engine_lost"),
    "an error event": ((word("lo"), event({"error": {"message": "boom"}})), "engine_lost"),
    "something that is no JSON": ((word("lo"), b"data: {no\n\n", DONE), "client_closed"),
    "the connection breaks": ((word("lo"), None), "client_closed"),
}


@pytest.mark.parametrize(("rest", "status"), REST_AFTER_THE_CLIENT.values(), ids=REST_AFTER_THE_CLIENT)
async def test_a_stream_that_its_client_left_is_not_kept(
    start: Start, rest: tuple[bytes | None, ...], status: str
) -> None:
    """However it ends then: what the client did not see was not translated, so the stored answer would be cut short."""
    left = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        for each in (role(), word("hel")):
            await caller.chunk(each)
        await left.wait()
        for piece in rest:
            if piece is None:
                caller.reset()
                return
            await caller.chunk(piece)
        await caller.send(LAST_CHUNK)

    plane, _ = await start(script)
    stream = await client_of(plane).responses.create(**ASK, stream=True)
    created = await anext(aiter(stream))
    assert created.type == "response.created"
    await stream.close()
    async with asyncio.timeout(5):
        while plane.server.connections:
            await asyncio.sleep(0.005)
    left.set()
    record = await plane.record()
    assert record.status == status
    if usage(30, 5) in rest:
        assert record.completion == 5
    with pytest.raises(openai.NotFoundError):
        await client_of(plane).responses.retrieve(created.response.id)


async def test_an_answer_that_is_no_chat_is_the_engines_fault_and_not_billed(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        await caller.whole({"choices": [], "usage": usage_object(30, 5)})

    plane, _ = await start(script)
    with pytest.raises(openai.InternalServerError) as failed:
        await client_of(plane).responses.create(**ASK)
    assert failed.value.code == "engine_lost"
    record = await plane.record()
    assert (record.status, record.charge) == ("engine_lost", 0)


async def test_no_model_judges_content_and_the_route_says_so(start: Start) -> None:
    plane, _ = await start(saying())
    with pytest.raises(openai.NotFoundError) as missing:
        await client_of(plane).moderations.create(input="x")
    assert missing.value.code == "moderation_not_configured"
    assert (await plane.send(post("/v1/moderations", {"input": "x"}))).status == 401


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"verbosity": "low"}, "verbosity"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
async def test_what_llamacpp_would_ignore_is_refused_by_name(start: Start, fields: Any, param: str) -> None:
    plane, upstream = await start(saying(), engine="llamacpp", owned=True, lacks=("tools", "reasoning_effort"))
    answer = await plane.ask(**fields)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, "unsupported_parameter")
    assert f"'{param}'" in answer.error["message"]
    assert not upstream.asked


async def test_what_is_refused_is_named_as_the_client_called_it(start: Start) -> None:
    plane, _ = await start(saying(), engine="llamacpp", owned=True, lacks=("reasoning_effort",))
    with pytest.raises(openai.BadRequestError) as refused:
        await client_of(plane).responses.create(**ASK, reasoning={"effort": "low"})
    assert refused.value.param == "reasoning.effort"
    with pytest.raises(openai.BadRequestError) as refused:
        await client_of(plane).responses.create(**ASK, text={"verbosity": "low"})
    assert refused.value.param == "text.verbosity"
