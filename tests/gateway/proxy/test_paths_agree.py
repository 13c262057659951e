"""The fast path and the slow one, by the same script: the client's bytes, the record and what is stored are equal.

A script is what an engine sends and what happens meanwhile: its bytes cut anywhere, pauses, a client that leaves or
stops reading, an engine that breaks off, errs, falls silent or ends in any of the known ways. No socket is between:
both ends are protocols on transports that remember (`tests.support.transport`).
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import event, given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.plane import Plane, model
from tests.support.transport import FakeTransport
from tests.support.upstream import DONE, finish, role, usage, usage_object, word
from tests.support.upstream import completion as answer_of
from tests.support.upstream import event as event_of
from tests.support.wire import post
from tidemill.gateway.endpoints import model_endpoint
from tidemill.gateway.proxy.fast_path import try_fast
from tidemill.gateway.proxy.inflight import InFlightRequest
from tidemill.gateway.proxy.slow_path import run
from tidemill.http.client import ConnectionPool, EngineConnection
from tidemill.http.server_connection import ServerConnection
from tidemill.meter.records import Settled

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
UNFRAMED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
LAST = b"0\r\n\r\n"
USER: dict[str, Any] = {"model": "mock", "messages": [{"role": "user", "content": "one two three"}]}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat, streamed": ("/v1/chat/completions", {**USER, "stream": True}),
    "chat, streamed, usage": (
        "/v1/chat/completions",
        {**USER, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "chat, whole": ("/v1/chat/completions", USER),
    "messages, streamed": ("/v1/messages", {**USER, "max_tokens": 20, "stream": True}),
    "messages, whole": ("/v1/messages", {**USER, "max_tokens": 20}),
    "responses, streamed": (
        "/v1/responses",
        {"model": "mock", "input": "one two three", "stream": True, "store": True},
    ),
    "responses, whole": ("/v1/responses", {"model": "mock", "input": "one two three", "store": True}),
}


class Act(msgspec.Struct, frozen=True):
    """Something that happens: `data` arrives from the engine, or one of the names below."""

    what: str
    data: bytes = b""

    def __repr__(self) -> str:
        return f"{self.data!r}" if self.data else self.what


SETTLE = Act("settle")
"""All that can go on without anything else happening has gone on."""
LEAVE = Act("leave")
DROP = Act("drop")
END = Act("end")
SILENCE = Act("silence")
BLOCK = Act("block")
UNBLOCK = Act("unblock")


class Result(msgspec.Struct):
    """What a script has come to."""

    client: bytes
    record: dict[str, Any] | None
    stored: str
    asked: int


class Bench:
    """A data plane whose engine is played by `play`."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.engines: list[FakeTransport] = []

    def connect_of(self) -> Any:
        """What takes the place of `ConnectionPool.connect`."""

        async def connect(pool: ConnectionPool) -> EngineConnection:
            connection = EngineConnection(pool)
            self.engines.append(FakeTransport(connection, pool.loop))
            pool._busy.add(connection)
            return connection

        return connect

    async def play(self, kind: str, acts: list[Act], *, fast: bool, kept: bool) -> Result:
        """`kept`: the engine's connection has served a request before, so that the head of its answers is known."""
        plane = self.plane
        for route in plane.routes.by_name.values():
            for replica in route.replicas:
                replica.pool.close_idle()
        if kept:
            await self._play("chat, whole", [Act("data", whole(answer_of(usage=usage_object(3, 1)))), SETTLE], fast)
        return await self._play(kind, acts, fast)

    async def _play(self, kind: str, acts: list[Act], fast: bool) -> Result:
        plane, before = self.plane, self.plane.log.records
        self.engines.clear()
        model_endpoint.try_fast = try_fast if fast else slow_only  # type: ignore[attr-defined]
        model_endpoint.run = fast_if_possible if fast else run  # type: ignore[attr-defined,assignment]
        client = ServerConnection(plane.server)
        transport = FakeTransport(client, plane.server.loop)
        path, body = REQUESTS[kind]
        transport.feed(post(path, body, plane.key))
        async with asyncio.timeout(10):
            while not (engine := self.engine()) and not transport.sent:
                await asyncio.sleep(0.001)
        for act in acts:
            engine = self.engine() or engine
            assert engine is not None, transport.sent
            match act.what:
                case "settle":
                    await self.quiet()
                case "data":
                    engine.feed(act.data)
                case "leave":
                    transport.lose()
                case "drop":
                    engine.lose()
                case "end":
                    engine.end()
                case "silence":
                    for route in plane.routes.by_name.values():
                        for replica in route.replicas:
                            replica.pool.sweep(float("inf"))
                case "block":
                    client.pause_writing()
                case "unblock":
                    client.resume_writing()
        client.resume_writing()
        await self.quiet()
        while (engine := self.engine(unfinished=True)) is not None:  # whoever still waits gets to know that it is gone
            engine.lose()
            await self.quiet()
        async with asyncio.timeout(10):
            while plane.live.open_requests or plane.server.working:
                await asyncio.sleep(0.001)
        await idle()
        said = bytes(transport.sent)
        transport.lose()
        records = await plane.settled() if plane.log.records > before else []
        stored = await self.stored()
        return Result(normal(said), shown(records[-1]) if records else None, stored, len(self.engines))

    async def quiet(self) -> None:
        """Wait until nothing goes on without something else happening: no task has work, no record is being written."""
        log = self.plane.log
        await idle()
        while log._pending or log._due or log._out:
            await asyncio.sleep(0.001)
        await idle()

    def engine(self, *, unfinished: bool = False) -> FakeTransport | None:
        """The engine's end of the connection that is in use; `unfinished`: on which the answer is not complete."""
        pools = [replica.pool for route in self.plane.routes.by_name.values() for replica in route.replicas]
        found = [each._transport for pool in pools for each in pool._busy if not (unfinished and each.complete)]
        return next((each for each in found if isinstance(each, FakeTransport)), None)

    async def stored(self) -> str:
        """What is kept of responses since the last look."""
        store = self.plane.response_store
        if store._writing is not None:
            await store._writing
        with self.plane.store.write() as connection:
            from sqlalchemy import text

            rows = connection.execute(text("SELECT response FROM responses")).all()
            connection.execute(text("DELETE FROM responses"))
        return normal(b"\n".join(opened(row[0]) for row in rows)).decode()


def opened(stored: bytes) -> bytes:
    import zlib

    try:
        return zlib.decompress(stored)
    except zlib.error:
        return stored


def slow_only(inflight: InFlightRequest, guard: Any) -> Any:
    return run(inflight)


async def fast_if_possible(inflight: InFlightRequest) -> None:
    """Of endpoints that have something to wait for first."""

    async def guard(exchange: Any, rest: Any) -> None:
        await rest

    rest = try_fast(inflight, guard)
    if rest is not None:
        await rest


async def idle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


CHANGING = (
    # What was counted so far, which hangs on what has come in the same packet; the last event has what is billed.
    (re.compile(rb'("type":"message_start".*?"usage":)\{[^}]*\}'), rb"\1{}"),
    (re.compile(rb"date: [^\r]*\r\n"), b""),
    (re.compile(rb"req_[0-9a-f]{24}"), b"req_X"),
    (re.compile(rb"(resp|msg|rs|fc|chatcmpl|toolu)_[0-9a-f]{16,}(_\d+)?"), rb"\1_X"),
    (re.compile(rb'"(created|created_at|completed_at)":\d+'), rb'"\1":0'),
)


def normal(said: bytes) -> bytes:
    """Without what differs from request to request, and with the chunks of its body put together."""
    head, separator, body = said.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        out, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            count = int(size, 16)
            out += rest[:count] if count else b"<end>"
            rest = rest[count + 2 :]
        said = head + separator + out
    for pattern, instead in CHANGING:
        said = pattern.sub(instead, said)
    return said


def shown(record: Settled) -> dict[str, Any]:
    """What must be equal of a record."""
    names = ("status", "prompt", "cached", "completion", "estimated", "hold", "charge", "uncollected")
    return {**{name: getattr(record, name) for name in names}, "began": bool(record.first_token_us)}


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def whole(body: dict[str, Any] | bytes, status: int = 200, headers: bytes = b"") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n%b" % (status, headers, len(data), data)


ERROR = event_of({"error": {"message": "boom", "code": 500}})
COMMENT = b": still here\n\n"
EVENTS = st.sampled_from(
    [role(), word("one "), word("two "), word("x" * 300), word('q"\\n'), COMMENT, finish(), finish("length"),
     usage(7, 3, 2), usage(9, 40), ERROR, DONE, b"data: not json\n\n", b"event: ping\ndata: {}\n\n", b"data: {\r\n",
     word("one ") + word("two "), b"\n\n", event_of({"choices": [], "usage": None})]
)  # fmt: skip
WHOLE = st.sampled_from(
    [whole(answer_of(usage=usage_object(9, 4, 3))), whole(answer_of("x" * 50)), whole(b"<html>"), whole(b""),
     whole({"error": {"message": "busy"}}, 503, b"retry-after: 3\r\n"), whole({"error": "no"}, 400), whole(b"", 500),
     whole({"choices": [], "usage": usage_object(9, 4)}), whole(answer_of(usage=usage_object(9, 4)))[:-7]]
)  # fmt: skip


@st.composite
def scripts(draw: st.DrawFn, kind: str) -> list[Act]:
    """Bytes of an answer cut into pieces, with things that happen between them."""
    streamed = "streamed" in kind
    if streamed and draw(st.integers(0, 9)) < 9:
        events = draw(st.lists(EVENTS, max_size=8))
        if draw(st.booleans()):
            events = [role(), *events, finish(), usage(7, 3, 2), DONE]
        chunked = draw(st.integers(0, 4)) > 0
        if chunked:
            data = HEAD + b"".join(framed(each) for each in events) + (LAST if draw(st.booleans()) else b"")
        else:
            data = UNFRAMED + b"".join(events)
    else:
        data = draw(WHOLE)
    if draw(st.booleans()) and streamed:  # as engines send them: a chunk a packet
        cuts = [at.end() for at in re.finditer(rb"\n\n\r\n|\r\n\r\n", data)]
    else:
        cuts = sorted(draw(st.sets(st.integers(1, max(len(data) - 1, 1)), max_size=6)))
    acts: list[Act] = []
    for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        if data[begin:end]:
            acts.append(Act("data", data[begin:end]))
        for act in draw(st.lists(st.sampled_from([SETTLE, SETTLE, SETTLE, BLOCK, UNBLOCK]), max_size=2)):
            # A task may be woken only after what follows at once: it would see a client as slow that was not yet.
            acts += [act] if act is SETTLE else [SETTLE, act, SETTLE]
    for strange in draw(st.lists(st.sampled_from([LEAVE, LEAVE, DROP, END, SILENCE]), max_size=2)):
        at = draw(st.integers(0, len(acts)))
        acts[at:at] = [SETTLE, strange, SETTLE]
    return [*acts, SETTLE, draw(st.sampled_from([END, DROP, SETTLE, SILENCE])), SETTLE]


OWNED = {"upstream": False, "own": True}


@pytest_asyncio.fixture(params=OWNED)
async def bench(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    monkeypatch.setattr(model_endpoint, "try_fast", try_fast)
    monkeypatch.setattr(model_endpoint, "run", run)
    async with Plane(tmp_path, [model(1, owned=OWNED[request.param])], credit="1000000") as plane:
        bench = Bench(plane)
        monkeypatch.setattr(ConnectionPool, "connect", bench.connect_of())
        await bench.play(
            "chat, whole", [Act("data", whole(answer_of(usage=usage_object(3, 1)))), SETTLE], fast=False, kept=False
        )
        yield bench


@examples(0.6, report_multiple_bugs=False)
@given(data=st.data())
@pytest.mark.parametrize("kind", REQUESTS)
async def test_both_paths_come_to_the_same(bench: Bench, kind: str, data: st.DataObject) -> None:
    acts = data.draw(scripts(kind))
    kept = data.draw(st.booleans())
    slow = await bench.play(kind, acts, fast=False, kept=kept)
    fast = await bench.play(kind, acts, fast=True, kept=kept)
    event(f"{slow.record['status'] if slow.record else 'no record'}")
    assert msgspec.structs.astuple(fast) == msgspec.structs.astuple(slow), f"\nfast {fast}\nslow {slow}"
