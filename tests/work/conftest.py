"""A batch runner on a real store and a real disk, before a data plane that the test plays."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from tests.support.stores import migrated_store
from tidemill.clock import to_micros
from tidemill.store.batches import Batch, BatchStatus, ask_to_cancel, create_batch, find_batch
from tidemill.store.blobs import BlobStore
from tidemill.store.files import File, FileQuota, add_file
from tidemill.store.ids import new_id
from tidemill.store.tables.files import batches
from tidemill.store.tenants import create_tenant
from tidemill.work.batches.attempt import LineAnswer, LineCall
from tidemill.work.batches.lifecycle import Lifecycle
from tidemill.work.batches.lines import LineRules
from tidemill.work.batches.runner import BatchRunner
from tidemill.work.batches.slack import ConfiguredSlack

CHAT = "/v1/chat/completions"
RULES = LineRules(max_lines=1000, max_line_bytes=100_000)
Plane = Callable[[LineCall], Awaitable[LineAnswer]]


def line(custom_id: str, **fields: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"model": "mock", **fields}}


def answered(status: int = 200, body: Any = None, retry_after_s: float = 0.0) -> LineAnswer:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    return LineAnswer(status, json.dumps(body or {"id": "c", "usage": usage}).encode(), retry_after_s)


class Mill:
    """Store, disk and slack of one site. `run` starts a runner, of which there may be many one after the other."""

    def __init__(self, path: Path) -> None:
        self.store = migrated_store(path)
        self.blobs = BlobStore(path / "files")
        self.slack = ConfiguredSlack()
        self.slack.parallel = {"mock": 4, "other": 1}
        with self.store.write() as connection:
            self.tenant_id = create_tenant(connection, name="acme", currency="USD", now=datetime.now(UTC)).tenant_id

    def submit(self, lines: list[Any], *, expires_in_s: float = 86_400, endpoint: str = CHAT) -> str:
        text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines).encode()
        now = datetime.now(UTC)
        blob = self.blobs.create()
        blob.write(text)
        file = File(
            file_id=new_id("file"),
            tenant_id=self.tenant_id,
            site=self.blobs.site,
            purpose="batch",
            filename="in.jsonl",
            bytes=len(text),
            created_at=now,
            expires_at=None,
        )
        blob.keep(file.file_id)
        batch = Batch(
            batch_id=new_id("batch"),
            tenant_id=self.tenant_id,
            key_id="key_1",
            site="",
            endpoint=endpoint,
            input_file_id=file.file_id,
            completion_window="24h",
            metadata=None,
            output_expires_s=None,
            created_at=now,
            expires_at=now + timedelta(seconds=expires_in_s),
        )
        with self.store.write() as connection:
            add_file(connection, file, FileQuota(10**9, 1000))
            create_batch(connection, batch, max_open=100)
        return batch.batch_id

    def batch(self, batch_id: str) -> Batch:
        with self.store.read() as connection:
            return find_batch(connection, tenant_id=self.tenant_id, batch_id=batch_id)

    def cancel(self, batch_id: str) -> None:
        with self.store.write() as connection:
            ask_to_cancel(connection, tenant_id=self.tenant_id, batch_id=batch_id, now=datetime.now(UTC))

    def expire(self, batch_id: str) -> None:
        with self.store.write() as connection:
            values = {"expires_at": to_micros(datetime.now(UTC))}
            connection.execute(update(batches).where(batches.c.batch_id == batch_id).values(**values))

    def entries(self, file_id: str | None) -> dict[str, Any]:
        """The lines of an output or error file by custom id; none is there twice."""
        if file_id is None:
            return {}
        found = [json.loads(text) for text in self.blobs.path(file_id).read_text().splitlines()]
        assert len({each["custom_id"] for each in found}) == len(found)
        return {each["custom_id"]: each for each in found}

    def lifecycle(self) -> Lifecycle:
        return Lifecycle(self.store, self.blobs, RULES, keep_s=3600)

    def run(self, plane: Plane) -> "Running":
        return Running(self, plane)


class Running:
    """`async with mill.run(plane) as running`: a runner at work, stopped in order at the end unless it was killed."""

    def __init__(self, mill: Mill, plane: Plane) -> None:
        self.mill = mill
        self.calls: list[LineCall] = []
        self.most = 0
        """The most lines that were ever in flight together."""
        self._plane = plane
        self._in_flight = 0
        self._stop = asyncio.Event()
        self.runner = BatchRunner(mill.lifecycle(), self._send, mill.slack, lambda: {"mock": "mock", "alias": "mock"})

    async def _send(self, call: LineCall) -> LineAnswer:
        self.calls.append(call)
        self._in_flight += 1
        self.most = max(self.most, self._in_flight)
        try:
            return await self._plane(call)
        finally:
            self._in_flight -= 1

    async def __aenter__(self) -> "Running":
        self._task = asyncio.create_task(self.runner.run(self._stop))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await self._task
        await self.runner.close(0.5)

    async def until(self, true: Callable[[], bool], within_s: float = 60.0) -> None:
        async with asyncio.timeout(within_s):
            while not true():
                assert not self._task.done() or self._stop.is_set(), "the runner has ended"
                await asyncio.sleep(0.01)

    async def ended(self, batch_id: str, within_s: float = 60.0) -> Batch:
        await self.until(lambda: self.mill.batch(batch_id).finished, within_s)
        return self.mill.batch(batch_id)

    async def started(self, batch_id: str) -> None:
        await self.until(lambda: self.mill.batch(batch_id).status is BatchStatus.IN_PROGRESS)


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    mill = Mill(tmp_path)
    yield mill
    mill.store.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of the runner, shortened."""
    monkeypatch.setattr("tidemill.work.batches.runner.LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("tidemill.work.batches.runner.SYNC_EVERY_S", 0.05)
    monkeypatch.setattr("tidemill.work.batches.attempt.FIRST_WAIT_S", 0.02)


async def fine(call: LineCall) -> LineAnswer:
    """A data plane that answers."""
    await asyncio.sleep(0)
    return answered()
