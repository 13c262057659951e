"""Batches on a platform that really runs, with OpenAI's own client: from the upload to the invoice, through kills."""

import contextlib
import io
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform, wait_until

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
MODEL = "smollm2-135m-instruct"
OVER = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def engine() -> Iterator[Mock]:
    with Mock("--chunks", "5") as mock:
        yield mock


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, engine: Mock) -> Iterator[Platform]:
    config = engine.config("mock", batch_parallel=4) + engine.config("other") + 'batch_output = "1.00"\n'
    config += engine.config("narrow", max_concurrent=2, batch_parallel=2)
    with start_platform(tmp_path_factory.mktemp("batches"), config) as platform:
        yield platform


def client_of(platform: Platform, key: str) -> OpenAI:
    return OpenAI(base_url=platform.url, api_key=key, max_retries=0)


@pytest.fixture
def client(platform: Platform, request: pytest.FixtureRequest) -> OpenAI:
    """A tenant of the test's own."""
    return client_of(platform, platform.new_tenant(tenant_of(request)))


def tenant_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)[:100]


def line(custom_id: str, text: str = "one two three", *, url: str = CHAT, **fields: Any) -> dict[str, Any]:
    body = {"model": "mock", "messages": [{"role": "user", "content": text}], "max_tokens": 5, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def submit(client: OpenAI, lines: list[Any], endpoint: Any = CHAT, **more: Any) -> Batch:
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    file = client.files.create(file=("input.jsonl", io.BytesIO(text.encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def ended(client: OpenAI, batch: Batch, within_s: float = 30.0) -> Batch:
    """Wait for the end of a batch."""
    found = [batch]

    def over() -> bool:
        found[0] = client.batches.retrieve(batch.id)
        return found[0].status in OVER

    wait_until(over, within_s)
    return found[0]


def done(client: OpenAI, batch: Batch, at_least: int, within_s: float = 20.0) -> None:
    """Wait until some lines of a batch are done."""

    def enough() -> bool:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed >= at_least

    wait_until(enough, within_s)


def entries(client: OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of an output or error file, by custom id; none may be there twice."""
    if file_id is None:
        return {}
    found = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    assert all(set(each) == {"id", "custom_id", "response", "error"} for each in found)
    assert len({each["custom_id"] for each in found}) == len(found) == len({each["id"] for each in found})
    return {each["custom_id"]: each for each in found}


def records(platform: Platform, tenant: str, count: int) -> list[Any]:
    platform.record(tenant, count, within_s=15.0)
    found: list[Any] = platform.usage(tenant)["records"]
    return found


def runner(platform: Platform) -> int | None:
    """The process id of the batch runner."""
    assert platform.process is not None
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if words else 0
            if b"tidemill.app.batch_worker" in words and parent == platform.process.pid:
                return int(entry.name)
    return None


def kill_runner(platform: Platform) -> None:
    wait_until(lambda: runner(platform) is not None)
    pid = runner(platform)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_from_the_upload_to_the_invoice(platform: Platform, client: OpenAI, request: pytest.FixtureRequest) -> None:
    batch = submit(client, [line(f"r{number}") for number in range(50)], metadata={"night": "first"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", CHAT)
    assert batch.expires_at == batch.created_at + 86_400
    batch = ended(client, batch)
    assert batch.status == "completed" and batch.model == "mock" and batch.metadata == {"night": "first"}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at  # type: ignore[operator]
    assert batch.request_counts is not None and batch.usage is not None
    assert batch.request_counts.to_dict() == {"total": 50, "completed": 50, "failed": 0}
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (150, 250, 400)
    assert batch.errors is None and batch.error_file_id is None

    output = entries(client, batch.output_file_id)
    assert set(output) == {f"r{number}" for number in range(50)}
    for each in output.values():
        assert each["error"] is None and each["response"]["status_code"] == 200
        assert each["response"]["body"]["choices"][0]["message"]["content"] == " tide tide tide tide tide"
    assert batch.output_file_id is not None
    described = client.files.retrieve(batch.output_file_id)
    assert described.purpose == "batch_output" and described.bytes == len(client.files.content(described.id).content)

    tenant = tenant_of(request)
    found = records(platform, tenant, 50)
    # Half of 4.00 and 16.00 per million: 3 x 2000 + 5 x 8000 nanos.
    assert {record["charge"] for record in found} == {"0.000046"}
    assert {each["response"]["request_id"] for each in output.values()} == {record["request_id"] for record in found}
    usage = platform.usage(tenant)
    assert (usage["requests"], usage["charge"], usage["balance"]) == (50, "0.0023", "99.9977")
    month = usage["records"][0]["finished_at"][:7]
    invoice = platform.cli("invoice", "--tenant", tenant, "--month", month)
    assert [(each["kind"], each["tier"], each["price_per_million"], each["amount"]) for each in invoice["lines"]] == [
        ("input", "batch", "2.00", "0.0003"),
        ("output", "batch", "8.00", "0.002"),
    ]


def test_a_batch_price_of_its_own(platform: Platform, client: OpenAI, request: pytest.FixtureRequest) -> None:
    assert ended(client, submit(client, [line("a", model="other")])).status == "completed"
    (record,) = records(platform, tenant_of(request), 1)
    assert record["charge"] == "0.000011"  # 3 x 2000 + 5 x 1000


def test_a_request_of_another_price_beside_it(
    platform: Platform, client: OpenAI, request: pytest.FixtureRequest
) -> None:
    client.chat.completions.create(model="mock", messages=[{"role": "user", "content": "one two three"}], max_tokens=5)
    ended(client, submit(client, [line("a")]))
    charges = [record["charge"] for record in records(platform, tenant_of(request), 2)]
    assert charges == ["0.000092", "0.000046"]


def test_lines_fail_alone(platform: Platform, client: OpenAI, request: pytest.FixtureRequest) -> None:
    poison = {
        "negative": line("negative", max_tokens=-1),
        "stream": line("stream", stream=True),
        "refused": line("refused", mock={"status": 400}),
        "broken": line("broken", mock={"status": 500}),
        "no-messages": {**line("no-messages"), "body": {"model": "mock"}},
    }
    good = [line(f"good{number}") for number in range(20)]
    batch = ended(client, submit(client, [*good[:10], *poison.values(), *good[10:]]))
    assert batch.status == "completed" and batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 25, "completed": 20, "failed": 5}
    assert len(entries(client, batch.output_file_id)) == 20
    errors = entries(client, batch.error_file_id)
    assert set(errors) == set(poison)
    statuses = {name: each["response"]["status_code"] for name, each in errors.items()}
    assert statuses == {"negative": 400, "stream": 400, "refused": 400, "broken": 502, "no-messages": 400}
    for each in errors.values():
        assert each["error"] is None and each["response"]["body"]["error"]["message"]
    usage = platform.usage(tenant_of(request))
    assert usage["charge"] == "0.00092"  # what was refused costs nothing


def test_a_line_that_kills_its_engine_fails_alone(platform: Platform, client: OpenAI) -> None:
    batch = ended(client, submit(client, [line("killer", mock={"die_after": -1}), line("good")]), within_s=60)
    assert batch.status == "completed"
    assert set(entries(client, batch.output_file_id)) == {"good"}
    (killer,) = entries(client, batch.error_file_id).values()
    assert killer["response"]["status_code"] == 502


def test_a_wrong_file_fails_with_line_numbers(client: OpenAI) -> None:
    lines = [
        line("a"),
        "{not json",
        line("a"),
        {**line("b"), "method": "GET"},
        {**line("c"), "url": "/v1/embeddings"},
        {"custom_id": "d", "method": "POST", "url": CHAT},
        "",
        line("e", model="gpt-unknown"),
        {**line("f"), "custom_id": 7},
        '{"custom_id": "g", "method": "POST", "url": "/v1/chat/completions", "body": []}',
        line("h"),
    ]
    batch = ended(client, submit(client, lines))
    assert batch.status == "failed" and batch.failed_at is not None and batch.errors is not None
    assert [(error.line, error.code, error.param) for error in batch.errors.data or ()] == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "invalid_method", "method"),
        (5, "invalid_url", "url"),
        (6, "missing_required_parameter", "body"),
        (8, "model_not_found", "body.model"),
        (9, "invalid_type", "custom_id"),
        (10, "invalid_type", "body"),
    ]
    assert batch.output_file_id is None and batch.error_file_id is None
    empty = ended(client, submit(client, [""]))
    assert empty.errors is not None and [error.code for error in empty.errors.data or ()] == ["empty_file"]


def test_what_is_no_batch_is_refused(client: OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    for wrong, param in (
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ):
        wish: Any = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **wrong}
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**wish)
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file_none", endpoint=CHAT, completion_window="24h")


def test_other_endpoints(client: OpenAI) -> None:
    completion = {**line("a", url="/v1/completions"), "body": {"model": "mock", "prompt": "one two", "max_tokens": 3}}
    batch = ended(client, submit(client, [completion], endpoint="/v1/completions"))
    (entry,) = entries(client, batch.output_file_id).values()
    assert entry["response"]["body"]["choices"][0]["text"] == " tide tide tide"
    assert batch.usage is not None and (batch.usage.input_tokens, batch.usage.output_tokens) == (2, 3)
    response = {**line("a", url="/v1/responses"), "body": {"model": "mock", "input": "one two", "max_output_tokens": 3}}
    batch = ended(client, submit(client, [response], endpoint="/v1/responses"))
    (entry,) = entries(client, batch.output_file_id).values()
    assert entry["response"]["body"]["output"][0]["content"][0]["text"] == " tide tide tide"
    assert batch.usage is not None and (batch.usage.input_tokens, batch.usage.output_tokens) == (2, 3)
    with pytest.raises(openai.NotFoundError):  # it is in the output file, and not kept beside it
        client.responses.retrieve(entry["response"]["body"]["id"])


def test_another_tenant_sees_nothing(platform: Platform, client: OpenAI, request: pytest.FixtureRequest) -> None:
    batch = ended(client, submit(client, [line("a")]))
    rival = client_of(platform, platform.new_tenant(f"rival-{tenant_of(request)}"))
    assert rival.batches.list().data == [] and rival.files.list().data == []
    for forbidden in (
        lambda: rival.batches.retrieve(batch.id),
        lambda: rival.batches.cancel(batch.id),
        lambda: rival.batches.list(after=batch.id),
        lambda: rival.files.content(batch.output_file_id or ""),
        lambda: rival.files.delete(batch.input_file_id),
        lambda: rival.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            forbidden()
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_pages_of_batches(client: OpenAI) -> None:
    ids = [submit(client, [line("a")]).id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == ids[::-1]  # the client turns the pages
    with pytest.raises(openai.BadRequestError):
        client.batches.list(limit=101)


def test_a_file_that_a_batch_reads_cannot_be_deleted(client: OpenAI) -> None:
    batch = submit(client, [line("a", mock={"ttft_ms": 700})])
    with pytest.raises(openai.ConflictError):
        client.files.delete(batch.input_file_id)
    ended(client, batch)
    assert client.files.delete(batch.input_file_id).deleted


def test_people_go_first(platform: Platform, client: OpenAI) -> None:
    """While interactive requests wait for a full model, no line of a batch is begun."""
    slow: Any = {"model": "narrow", "messages": [{"role": "user", "content": "hi"}], "extra_body": _SLOW}
    with ThreadPoolExecutor(10) as people:
        asked = [people.submit(lambda: client.chat.completions.create(**slow)) for _ in range(10)]
        wait_until(lambda: sum(each.done() for each in asked) >= 2)
        batch = submit(client, [line("a", model="narrow")])
        while sum(each.done() for each in asked) < 8:
            counts = client.batches.retrieve(batch.id).request_counts
            assert counts is not None and counts.completed == 0
            time.sleep(0.05)
        for each in asked:
            each.result()
    assert ended(client, batch).status == "completed"


_SLOW = {"mock": {"ttft_ms": 500}}


def test_cancelling(platform: Platform, client: OpenAI, request: pytest.FixtureRequest) -> None:
    batch = submit(client, [line(f"r{number}", mock={"ttft_ms": 150}) for number in range(200)])
    done(client, batch, 8)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling" and cancelling.cancelling_at is not None
    batch = ended(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at is not None
    output, errors = entries(client, batch.output_file_id), entries(client, batch.error_file_id)
    assert 8 <= len(output) < 100 and len(output) + len(errors) == 200 and not set(output) & set(errors)
    assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 200, "completed": len(output), "failed": len(errors)}
    assert len(records(platform, tenant_of(request), len(output))) == len(output)  # what was in flight was let end


def test_expiry(platform: Platform, client: OpenAI) -> None:
    lines = [line(f"r{number}", mock={"ttft_ms": 150}) for number in range(100)]
    batch = submit(client, [*lines, line("busy", mock={"status": 503})])
    done(client, batch, 4)
    with contextlib.closing(sqlite3.connect(platform.data / "tidemill.db", timeout=10)) as store, store:
        store.execute("UPDATE batches SET expires_at = ? WHERE batch_id = ?", (time.time_ns() // 1000, batch.id))
    kill_runner(platform)  # the new one reads the store anew
    batch = ended(client, batch)
    assert batch.status == "expired" and batch.expired_at is not None
    output, errors = entries(client, batch.output_file_id), entries(client, batch.error_file_id)
    assert len(output) + len(errors) == 101 and "busy" in errors
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}


def test_a_balance_that_runs_out(platform: Platform, request: pytest.FixtureRequest) -> None:
    key = platform.new_tenant(tenant_of(request), credit="0.01")
    client = client_of(platform, key)
    batch = ended(client, submit(client, [line(f"r{number}", max_tokens=200) for number in range(12)]))
    output, errors = entries(client, batch.output_file_id), entries(client, batch.error_file_id)
    assert len(output) + len(errors) == 12 and output and errors
    for each in errors.values():
        assert each["response"]["body"]["error"]["code"] == "insufficient_quota"
    usage = platform.usage(tenant_of(request))
    assert float(usage["balance"]) >= 0


def test_the_runner_killed_again_and_again(
    platform: Platform, client: OpenAI, engine: Mock, request: pytest.FixtureRequest
) -> None:
    asked = engine.counter("mock_requests_total")
    lines = [line(f"r{number}", mock={"ttft_ms": 60}) for number in range(150)]
    batch = submit(client, lines)
    for lines_done in (5, 30, 60):
        done(client, batch, lines_done)
        kill_runner(platform)
    batch = ended(client, batch)
    assert batch.status == "completed"
    assert set(entries(client, batch.output_file_id)) == {f"r{number}" for number in range(150)}
    found = records(platform, tenant_of(request), 150)
    # Only what was in flight at a kill is run twice, and that is billed once, at the batch price.
    assert 150 <= engine.counter("mock_requests_total") - asked <= 150 + 3 * 4
    assert {record["status"] for record in found} == {"ok"} and {record["charge"] for record in found} == {"0.000046"}
    usage = platform.usage(tenant_of(request))
    assert (usage["charge"], usage["balance"]) == ("0.0069", "99.9931")


def test_the_gateway_killed_in_the_middle(platform: Platform, client: OpenAI, request: pytest.FixtureRequest) -> None:
    batch = submit(client, [line(f"r{number}", mock={"ttft_ms": 60}) for number in range(100)])
    for lines_done in (10, 40):
        done(client, batch, lines_done)
        platform.kill9("gateway")
        wait_until(lambda: _answers(platform))
    batch = ended(client, batch)
    assert batch.status == "completed" and batch.error_file_id is None
    assert len(entries(client, batch.output_file_id)) == 100
    found = records(platform, tenant_of(request), 100)
    assert {record["charge"] for record in found} == {"0.000046"}


def _answers(platform: Platform) -> bool:
    try:
        return httpx.get(f"{platform.url.removesuffix('/v1')}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_everything_killed_at_once_and_started_again(tmp_path: Path, engine: Mock) -> None:
    config = engine.config(batch_parallel=4)
    with start_platform(tmp_path, config) as platform:
        client = client_of(platform, platform.key)
        batch = submit(client, [line(f"r{number}", mock={"ttft_ms": 60}) for number in range(60)])
        done(client, batch, 15)
        headers = {"authorization": f"Bearer {platform.key}", "content-type": "multipart/form-data; boundary=b"}
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{platform.url}/files", headers=headers, content=_half(platform), timeout=5)
        assert platform.process is not None
        platform.start()
        batch = ended(client, batch)
        assert batch.status == "completed" and len(entries(client, batch.output_file_id)) == 60
        assert {record["charge"] for record in records(platform, "demo", 60)} == {"0.000046"}
        wait_until(lambda: not list((platform.data / "files" / "incoming").iterdir()))
        assert len(client.files.list().data) == 2


def _half(platform: Platform) -> Iterator[bytes]:
    yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n' + b"x" * 2_000_000
    wait_until(lambda: len(list((platform.data / "files" / "incoming").iterdir())) == 1)
    platform.kill9_all()
    yield b"x"


def test_a_large_file_in_bounded_memory(platform: Platform, client: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    text = "tide " * 800
    with path.open("w") as file:
        for number in range(49_999):
            file.write(json.dumps(line(f"r{number}", text)) + "\n")
        file.write("{the last line is wrong}\n")
    assert path.stat().st_size > 200_000_000
    (gateway,) = platform.pids("gateway")
    before = memory_kib(gateway)
    with path.open("rb") as data:
        uploaded = client.files.create(file=data, purpose="batch")
    assert uploaded.bytes == path.stat().st_size
    batch = client.batches.create(input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h")
    batch = ended(client, batch)
    assert batch.errors is not None and [error.line for error in batch.errors.data or ()] == [50_000]
    assert memory_kib(gateway) - before < 32 * 1024
    pid = runner(platform)
    assert pid is not None and memory_kib(pid) < 160 * 1024
    client.files.delete(uploaded.id)


def memory_kib(pid: int) -> int:
    """The most memory that a process has ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def test_nobody_comes_in_by_the_internal_road(platform: Platform, client: OpenAI) -> None:
    for token in ("?", "x", client.api_key):
        answer = httpx.post(
            f"{platform.url}/chat/completions",
            headers={"authorization": f"Tidemill {token}", "x-tidemill-tenant": "demo", "x-tidemill-key": "k"},
            json={"model": "mock", "messages": [{"role": "user", "content": "hi"}]},
        )
        assert answer.status_code == 401


@pytest.mark.slow
def test_the_real_model(running: Platform, request: pytest.FixtureRequest) -> None:
    client = client_of(running, running.new_tenant(tenant_of(request)))
    questions = ["Say hello.", "Name a colour.", "Count to three.", "What is the tide?", "Name a river."]
    lines = [line(f"q{number}", text, model=MODEL, max_tokens=12) for number, text in enumerate(questions)]
    too_long = line("too-long", "word " * 6000, model=MODEL)
    batch = ended(client, submit(client, [*lines, too_long]), within_s=60)
    assert batch.status == "completed"
    output = entries(client, batch.output_file_id)
    assert set(output) == {f"q{number}" for number in range(5)}
    for each in output.values():
        body = each["response"]["body"]
        assert body["choices"][0]["message"]["content"].strip() and body["usage"]["completion_tokens"] <= 12
    (error,) = entries(client, batch.error_file_id).values()
    assert error["response"]["body"]["error"]["code"] == "context_length_exceeded"
    found = {record["request_id"]: record for record in records(running, tenant_of(request), 6)}
    assert batch.usage is not None
    for each in output.values():
        usage, record = each["response"]["body"]["usage"], found[each["response"]["request_id"]]
        assert (record["prompt_tokens"], record["completion_tokens"]) == (
            usage["prompt_tokens"],
            usage["completion_tokens"],
        )
