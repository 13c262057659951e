"""Clients that leave, on a platform that really runs: the embedded engine and an upstream in a process of its own."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.mock import Mock
from tests.support.platform import Platform
from tests.support.wire import Line, post

MODEL = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "Write a very long story about the sea."}], "max_tokens": 600}
LONG |= {"ignore_eos": True}
LEAVE = pytest.mark.parametrize("how", ["close", "reset"])


async def ask(platform: Platform, key: str, **fields: Any) -> Line:
    line = await Line.open(platform.port, receive_buffer=fields.pop("receive_buffer", None))
    await line.send(post(CHAT, fields, key))
    return line


async def leave(line: Line, how: str) -> None:
    getattr(line, how)()
    await asyncio.sleep(0.02)  # the event loop does it; what looks at the records blocks it


async def at_work(platform: Platform) -> int:
    """How many requests the embedded engine works on."""
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"{platform.engine_url}/metrics")).text
    found = re.search(r"^llamacpp:requests_processing (\d+)", page, re.MULTILINE)
    assert found
    return int(found[1])


async def until_at_work(platform: Platform, count: int, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while await at_work(platform) != count:
            await asyncio.sleep(0.02)


@LEAVE
async def test_embedded_right_after_the_last_frame(running: Platform, how: str) -> None:
    key = running.new_tenant(f"last-{how}")
    for _ in range(3):
        line = await ask(running, key, model=MODEL, messages=LONG["messages"], max_tokens=4, stream=True)
        await line.reader.readuntil(b"[DONE]\n\n")
        await leave(line, how)
    record = running.record(f"last-{how}", 3)
    assert (record["status"], record["completion_tokens"], record["estimated"]) == ("ok", 4, False)


@LEAVE
async def test_embedded_in_mid_stream(running: Platform, how: str) -> None:
    """It is aborted soon, and what it had produced is billed."""
    key = running.new_tenant(f"mid-{how}")
    line = await ask(running, key, model=MODEL, stream=True, **LONG)
    seen = 0
    while seen < 8:
        seen += (await line.reader.readuntil(b"\n\n")).count(b'"content":"')
    await leave(line, how)
    await until_at_work(running, 0, 5.0)
    record = running.record(f"mid-{how}")
    assert (record["status"], record["estimated"]) == ("client_closed", False)
    assert seen <= record["completion_tokens"] < 200
    assert record["prompt_tokens"] > 20
    assert record["charge"] != "0.00"


@LEAVE
async def test_embedded_before_the_first_byte(running: Platform, how: str) -> None:
    """A prompt that takes a while: the engine is let go in the middle of it, and nothing is billed for no answer."""
    key = running.new_tenant(f"before-{how}")
    words = " ".join(f"{how}{n}" for n in range(100))
    line = await ask(running, key, model=MODEL, stream=True, messages=[{"role": "user", "content": words}])
    await until_at_work(running, 1, 10.0)
    await leave(line, how)
    record = running.record(f"before-{how}")
    assert (record["status"], record["completion_tokens"], record["estimated"]) == ("client_closed", 0, False)
    await until_at_work(running, 0, 20.0)


@LEAVE
async def test_embedded_whole_answer_that_nobody_waits_for(running: Platform, how: str) -> None:
    key = running.new_tenant(f"whole-{how}")
    line = await ask(running, key, model=MODEL, **LONG)
    await until_at_work(running, 1, 5.0)
    await asyncio.sleep(0.5)
    await leave(line, how)
    await until_at_work(running, 0, 5.0)
    record = running.record(f"whole-{how}")
    assert (record["status"], record["estimated"], record["streamed"]) == ("client_closed", False, False)
    assert 0 < record["completion_tokens"] < 600


@pytest.mark.slow
async def test_upstream_and_a_client_that_never_reads(running: Platform, mock: Mock) -> None:
    """Memory stays bounded, the engine waits, and after the write timeout the client is taken for gone."""
    key = running.new_tenant("deaf")
    (gateway,) = running.pids("gateway")

    def memory() -> int:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{gateway}/status").read_text())
        assert found
        return int(found[1]) * 1024

    before = memory()
    behaviour = {"chunks": 30_000, "token": "x" * 1000}  # 35 MB
    lines = [
        await ask(
            running,
            key,
            model="mock-abort",
            stream=True,
            messages=LONG["messages"],
            mock=behaviour,
            receive_buffer=4096,
        )
        for _ in range(8)
    ]
    await asyncio.sleep(1.0)
    grown = memory() - before
    aborted = mock.counter("mock_aborted_total")
    record = await asyncio.to_thread(running.record, "deaf", 8)
    assert mock.counter("mock_aborted_total") == aborted + 8
    assert {each["status"] for each in running.usage("deaf")["records"]} == {"client_closed"}
    # What the kernel's buffers took counts as sent: four bytes are a token. Most of it was never asked for.
    assert 0 < record["completion_tokens"] < 30_000 * 1000 // 4 // 2 and record["estimated"]
    assert grown < 8 * 4 * 1024 * 1024, f"grown by {grown} bytes"
    for line in lines:
        line.close()


@LEAVE
async def test_upstream_aborted_in_mid_stream(running: Platform, mock: Mock, how: str) -> None:
    key = running.new_tenant(f"abort-{how}")
    before = mock.counter("mock_aborted_total")
    line = await ask(
        running,
        key,
        model="mock-abort",
        stream=True,
        messages=LONG["messages"],
        mock={"chunks": 1000, "interval_ms": 10},
    )
    for _ in range(10):
        await line.reader.readuntil(b"\n\n")
    await leave(line, how)
    record = running.record(f"abort-{how}")
    assert (record["status"], record["estimated"]) == ("client_closed", True)
    assert 8 <= record["completion_tokens"] <= 20
    assert mock.counter("mock_aborted_total") == before + 1


@LEAVE
@pytest.mark.parametrize("stream", [True, False])
async def test_upstream_drained_in_time(running: Platform, mock: Mock, how: str, stream: bool) -> None:
    tenant = f"drain-{how}-{stream}"
    key = running.new_tenant(tenant)
    before = mock.counter("mock_aborted_total")
    behaviour = {"chunks": 40, "interval_ms": 10, "prompt_tokens": 123, "cached": 23}
    line = await ask(running, key, model="mock", stream=stream, messages=LONG["messages"], mock=behaviour)
    await (line.reader.readuntil(b"\n\n") if stream else asyncio.sleep(0.1))
    await leave(line, how)
    record = running.record(tenant)
    counts = tuple(record[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens"))
    assert counts == (123, 23, 40)
    assert (record["status"], record["estimated"]) == ("client_closed", False)
    assert mock.counter("mock_aborted_total") == before


@pytest.mark.parametrize("stream", [True, False])
async def test_upstream_that_takes_longer_than_it_is_drained(running: Platform, mock: Mock, stream: bool) -> None:
    tenant = f"late-{stream}"
    key = running.new_tenant(tenant)
    behaviour = {"chunks": 1000, "interval_ms": 20}
    line = await ask(running, key, model="mock", stream=stream, messages=LONG["messages"], mock=behaviour)
    await asyncio.sleep(0.2)
    await leave(line, "close")
    record = running.record(tenant)
    assert (record["status"], record["estimated"]) == ("client_closed", True)
    assert (30 <= record["completion_tokens"] <= 100) if stream else record["prompt_tokens"]


async def test_upstream_before_the_first_byte(running: Platform, mock: Mock) -> None:
    key = running.new_tenant("early")
    behaviour = {"chunks": 5, "ttft_ms": 400}
    line = await ask(running, key, model="mock", stream=True, messages=LONG["messages"], mock=behaviour)
    await asyncio.sleep(0.1)
    await leave(line, "reset")
    record = running.record("early")
    assert (record["status"], record["completion_tokens"], record["estimated"]) == ("client_closed", 5, False)


@pytest.mark.slow
async def test_embedded_many_leave_at_once(running: Platform) -> None:
    """Three times as many as it works on at a time, so some leave while they wait. What the engine counted and the
    records do not have are the few tokens between a client's leaving and the engine's noticing."""
    before = running.reconcile()["replicas"][0]["difference"]
    key = running.new_tenant("crowd")
    short = {**LONG, "max_tokens": 12}
    lines = [await ask(running, key, model=MODEL, stream=True, **short) for _ in range(24)]

    async def one(n: int, line: Line) -> None:
        if n % 2:
            assert (await line.answer(within_s=60)).chunks
            line.close()
            return
        if n % 4:
            await asyncio.sleep(0.05 * n)
        else:
            await line.reader.readuntil(b'"content":"')
        await leave(line, ("close", "reset")[n % 3 == 0])

    await asyncio.gather(*(one(n, line) for n, line in enumerate(lines)))
    await until_at_work(running, 0, 20.0)
    await asyncio.sleep(0.2)
    records = running.usage("crowd")["records"]
    assert 18 <= len(records) <= 24, "who leaves before a word may have left before the engine was asked"
    assert {record["status"] for record in records} <= {"ok", "client_closed"}
    assert sum(record["status"] == "ok" for record in records) >= 12
    assert not any(record["estimated"] for record in records)
    after = running.reconcile()["replicas"][0]["difference"]
    assert 0 <= after["completion_tokens"] - before["completion_tokens"] <= 12 * 4
    assert after["prompt_tokens"] >= before["prompt_tokens"]
