"""/v1/files: what is kept, what is refused, and what is left when an upload breaks off."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from tests.support.files import Archive, form, part, simple, upload
from tests.support.plane import Plane
from tests.support.waiting import until
from tests.support.wire import get, post
from tidemill.clock import to_micros
from tidemill.gateway.endpoints.files import UPLOADS_PER_TENANT
from tidemill.store.blobs import PendingBlob
from tidemill.store.files import delete_expired
from tidemill.store.keys import create_key
from tidemill.store.tables.files import files
from tidemill.store.tenants import create_tenant


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with Plane(tmp_path, []) as plane:
        yield plane


@pytest.fixture
async def archive(plane: Plane, tmp_path: Path) -> AsyncIterator[Archive]:
    async with Archive(plane, tmp_path) as archive:
        yield archive


def delete(path: str, key: str) -> bytes:
    return get(path, key).replace(b"GET", b"DELETE", 1)


async def other_key(plane: Plane) -> str:
    now = datetime.now(UTC)
    with plane.store.write() as connection:
        tenant = create_tenant(connection, name="rival", currency="USD", now=now)
        _, key = create_key(connection, tenant_id=tenant.tenant_id, name="test", now=now)
    await plane.authenticator.renew()
    return key


async def test_an_upload_comes_back_byte_for_byte(archive: Archive, plane: Plane) -> None:
    data = bytes(range(256)) * 3000
    answer = await plane.send(simple(data, plane.key, filename="zürich.jsonl"))
    assert answer.status == 200, answer.body
    file = answer.json
    assert file["object"] == "file" and file["bytes"] == len(data) and file["purpose"] == "batch"
    assert file["filename"] == "zürich.jsonl" and file["status"] == "processed"
    assert file["expires_at"] == file["created_at"] + 3600
    assert (await plane.send(get(f"/v1/files/{file['id']}", plane.key))).json == file
    assert (await plane.send(get(f"/v1/files/{file['id']}/content", plane.key))).body == data
    assert archive.kept == [file["id"]]
    assert (archive.blobs.path(file["id"]).stat().st_mode & 0o777) == 0o600


async def test_parts_may_come_in_any_order_and_in_chunks(archive: Archive, plane: Plane) -> None:
    body = form(part("file", b"x\r\n--y\r\n", "a"), part("expires_after[anchor]", b"created_at"))
    body = form(part("file", b"x\r\n--y\r\n", "a"), part("purpose", b"batch"), part("ignored", b"1"))
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer = await plane.send(upload(pieces, plane.key, chunked=True))
    assert answer.status == 200, answer.body
    content = await plane.send(get(f"/v1/files/{answer.json['id']}/content", plane.key))
    assert content.body == b"x\r\n--y\r\n"


async def test_the_next_request_of_the_connection_is_answered_too(archive: Archive, plane: Plane) -> None:
    line = await plane.line()
    await line.send(simple(b"one", plane.key) + simple(b"two", plane.key) + get("/v1/files", plane.key))
    first, second, third = [await line.answer() for _ in range(3)]
    assert [each["id"] for each in third.json["data"]] == [second.json["id"], first.json["id"]]
    line.close()


async def test_pages(archive: Archive, plane: Plane) -> None:
    ids = [(await plane.send(simple(b"%d" % number, plane.key))).json["id"] for number in range(4)]
    newest = (await plane.send(get("/v1/files?limit=3", plane.key))).json
    assert [each["id"] for each in newest["data"]] == ids[:0:-1] and newest["has_more"]
    rest = (await plane.send(get(f"/v1/files?limit=3&after={newest['last_id']}", plane.key))).json
    assert [each["id"] for each in rest["data"]] == ids[:1] and not rest["has_more"]
    oldest = (await plane.send(get("/v1/files?order=asc&purpose=batch", plane.key))).json
    assert [each["id"] for each in oldest["data"]] == ids
    assert (await plane.send(get("/v1/files?purpose=batch_output", plane.key))).json["data"] == []
    for wrong in ("limit=0", "limit=x", "limit=10001", "order=up"):
        assert (await plane.send(get(f"/v1/files?{wrong}", plane.key))).status == 400
    assert (await plane.send(get("/v1/files?after=file_none", plane.key))).status == 404


async def test_a_deleted_file_is_gone(archive: Archive, plane: Plane) -> None:
    file_id = (await plane.send(simple(b"x", plane.key))).json["id"]
    gone = await plane.send(delete(f"/v1/files/{file_id}", plane.key))
    assert gone.json == {"id": file_id, "object": "file", "deleted": True}
    assert archive.kept == []
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        answer = await plane.send(get(path, plane.key))
        assert answer.status == 404 and answer.error["param"] == "id"
    assert (await plane.send(delete(f"/v1/files/{file_id}", plane.key))).status == 404


async def test_another_tenants_file_does_not_exist(archive: Archive, plane: Plane) -> None:
    file_id = (await plane.send(simple(b"secret", plane.key))).json["id"]
    rival = await other_key(plane)
    for request in (
        get(f"/v1/files/{file_id}", rival),
        get(f"/v1/files/{file_id}/content", rival),
        get(f"/v1/files?after={file_id}", rival),
        delete(f"/v1/files/{file_id}", rival),
        post(
            "/v1/batches",
            {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"},
            rival,
        ),
    ):
        answer = await plane.send(request)
        assert answer.status == 404 and "secret" not in answer.body.decode()
    assert (await plane.send(get("/v1/files", rival))).json["data"] == []
    assert (await plane.send(get(f"/v1/files/{file_id}/content", plane.key))).body == b"secret"


async def test_without_a_key_nothing_is_taken(archive: Archive, plane: Plane) -> None:
    answer = await plane.send(simple(b"x" * 300_000, "sk-tm-wrong"))
    assert answer.status == 401 and answer.headers["connection"] == "close"
    assert archive.kept == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (form(part("file", b"x", "a")), "purpose"),
        (form(part("purpose", b"fine-tune"), part("file", b"x", "a")), "purpose"),
        (form(part("purpose", b"batch")), "file"),
        (form(part("purpose", b"batch"), part("file", b"x", "a"), part("file", b"y", "b")), "file"),
        (form(part("purpose", b"batch" * 1000), part("file", b"x", "a")), None),
        (form(part("purpose", b"batch"), part("file", b"x", "a"))[:-10], None),
        (form(*[part(f"field{number}", b"1") for number in range(20)]), None),
        (b"no form at all", None),
        (
            form(part("purpose", b"batch"), part("expires_after[seconds]", b"9"), part("file", b"x", "a")),
            "expires_after",
        ),
        (
            form(
                part("purpose", b"batch"),
                part("expires_after[anchor]", b"created_at"),
                part("expires_after[seconds]", b"99"),
                part("file", b"x", "a"),
            ),
            "expires_after",
        ),
    ],
)
async def test_wrong_forms_are_refused_and_leave_nothing(
    archive: Archive, plane: Plane, body: bytes, param: str | None
) -> None:
    answer = await plane.send(upload(body, plane.key))
    assert answer.status == 400 and answer.error["param"] == param, answer.body
    assert archive.kept == []


async def test_an_expiry_of_its_own(archive: Archive, plane: Plane) -> None:
    expiry = part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"7200")
    file = (await plane.send(upload(form(part("purpose", b"batch"), expiry, part("file", b"x", "a")), plane.key))).json
    assert file["expires_at"] == file["created_at"] + 7200


async def test_an_expired_file_is_gone_at_once_and_its_bytes_soon(archive: Archive, plane: Plane) -> None:
    file_id = (await plane.send(simple(b"x", plane.key))).json["id"]
    now = datetime.now(UTC)
    with plane.store.write() as connection:
        connection.execute(update(files).values(expires_at=to_micros(now - timedelta(seconds=1))))
    assert (await plane.send(get(f"/v1/files/{file_id}", plane.key))).status == 404
    assert (await plane.send(get("/v1/files", plane.key))).json["data"] == []
    with plane.store.write() as connection:
        assert delete_expired(connection, site="elsewhere", now=now) == []
        assert delete_expired(connection, site=archive.blobs.site, now=now) == [file_id]


async def test_a_file_that_is_too_large(archive: Archive, plane: Plane) -> None:
    limit = archive.rules.max_file_bytes
    assert (await plane.send(simple(b"x" * limit, plane.key))).status == 200
    kept = archive.kept
    too_large = simple(b"x" * (limit + 1), plane.key)
    answer = await plane.send(too_large)
    assert answer.status == 413 and answer.error["code"] == "request_too_large"
    declared = await plane.send(upload(b"", plane.key, length=10 * limit))
    assert declared.status == 413
    endless = b"".join(b"10000\r\n%b\r\n" % (b"x" * 0x10000) for _ in range(40))
    chunked = await plane.send(
        upload(b"100\r\n" + part("file", b"", "a").ljust(0x100, b"x") + b"\r\n" + endless, plane.key, chunked=True)
    )
    assert chunked.status == 413
    assert archive.kept == kept


async def test_quotas(archive: Archive, plane: Plane) -> None:
    for size in (10, 10, 10, 10):
        assert (await plane.send(simple(b"x" * size, plane.key))).status == 200
    (last,) = (await plane.send(get("/v1/files?limit=1", plane.key))).json["data"]
    assert (await plane.send(simple(b"x", plane.key))).status == 200
    answer = await plane.send(simple(b"x", plane.key))
    assert answer.status == 400 and answer.error["code"] == "file_quota_exceeded"
    await plane.send(delete(f"/v1/files/{last['id']}", plane.key))
    assert (await plane.send(simple(b"x", plane.key))).status == 200


async def test_the_byte_quota_counts_what_is_on_its_way(plane: Plane, tmp_path: Path) -> None:
    async with Archive(plane, tmp_path, tenant_bytes=1_500_000) as archive:
        line = await plane.line()
        whole = simple(b"x" * 900_000, plane.key)
        await line.send(whole[:-100])
        while not archive.kept:
            await asyncio.sleep(0.01)
        answer = await plane.send(simple(b"x" * 900_000, plane.key))
        assert answer.status == 400 and answer.error["code"] == "file_quota_exceeded"
        await line.send(whole[-100:])
        assert (await line.answer()).status == 200
        line.close()


async def test_uploads_at_a_time_are_bounded(archive: Archive, plane: Plane) -> None:
    lines = [await plane.line() for _ in range(UPLOADS_PER_TENANT)]
    for line in lines:
        await line.send(simple(b"x", plane.key)[:-10])
    while len(archive.kept) < UPLOADS_PER_TENANT:
        await asyncio.sleep(0.01)
    answer = await plane.send(simple(b"x", plane.key))
    assert answer.status == 429 and answer.error["code"] == "too_many_uploads"
    for line in lines:
        line.reset()
    while archive.kept:
        await asyncio.sleep(0.01)
    assert (await plane.send(simple(b"x", plane.key))).status == 200


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_a_client_that_leaves_in_the_middle_leaves_nothing(archive: Archive, plane: Plane, leave: str) -> None:
    line = await plane.line()
    await line.send(simple(b"x" * 900_000, plane.key)[:-50])
    while not archive.kept:
        await asyncio.sleep(0.01)
    getattr(line, leave)()
    async with asyncio.timeout(60):
        while archive.kept or plane.server.working:
            await asyncio.sleep(0.01)


async def test_a_body_that_is_not_http_leaves_nothing(archive: Archive, plane: Plane) -> None:
    line = await plane.line()
    await line.send(upload(b"5\r\nhello\r\nzz\r\n", plane.key, chunked=True))
    assert (await line.answer()).status == 400
    assert archive.kept == []
    line.close()


async def test_what_a_killed_writer_leaves_is_swept(archive: Archive, plane: Plane) -> None:
    alive = archive.blobs.create()
    dead = archive.blobs.create()
    dead.write(b"half")
    dead._close()  # as the kernel does for a killed process
    assert len(archive.kept) == 2
    assert archive.blobs.sweep_incoming() == 1
    alive.write(b"whole")
    alive.keep("file_whole")
    assert archive.kept == ["file_whole"]


async def test_orphans_are_swept_but_not_the_young(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("file_known", "file_orphan"):
        blob = archive.blobs.create()
        blob.keep(name)
    assert archive.blobs.sweep_orphans(lambda ids: set()) == 0
    monkeypatch.setattr("tidemill.store.blobs.ORPHAN_AFTER_S", -1)
    assert archive.blobs.sweep_orphans(lambda ids: {"file_known"}) == 1
    assert archive.kept == ["file_known"]


@pytest.mark.parametrize("step", ["write", "fdatasync", "rename"])
async def test_a_disk_that_fills_up_says_so_and_keeps_nothing(
    archive: Archive, plane: Plane, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", full)
        else:
            patch.setattr(f"tidemill.store.blobs.os.{step}", full)
        answer = await plane.send(simple(b"x" * 500_000, plane.key))
    assert answer.status == 507 and answer.error["code"] == "insufficient_storage"
    assert archive.kept == []
    assert (await plane.send(simple(b"x", plane.key))).status == 200


async def test_no_upload_begins_when_the_disk_is_nearly_full(plane: Plane, tmp_path: Path) -> None:
    async with Archive(plane, tmp_path, reserve_bytes=2**60) as archive:
        answer = await plane.send(simple(b"x", plane.key))
        assert answer.status == 507
        assert archive.kept == []


async def test_a_slow_disk_makes_the_client_wait(
    archive: Archive, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = asyncio.Event()
    loop = asyncio.get_running_loop()
    write: Callable[[PendingBlob, bytes], None] = PendingBlob.write

    def slow(self: PendingBlob, data: bytes) -> None:
        asyncio.run_coroutine_threadsafe(released.wait(), loop).result()
        write(self, data)

    monkeypatch.setattr("tidemill.gateway.endpoints.uploads.WRITE_BYTES", 1)
    monkeypatch.setattr(PendingBlob, "write", slow)
    line = await plane.line()
    line.writer.transport.set_write_buffer_limits(high=1)
    whole = simple(b"x" * 1_000_000, plane.key)
    # More than fits into the sockets' buffers, which take what the server does not.
    monkeypatch.setattr("tidemill.http.request_body.BUFFER_BYTES", 4096)
    sending = asyncio.create_task(line.send(whole))
    (connection,) = plane.server.connections
    await until(lambda: (receiving := connection._parser.receiving) and receiving.incoming and receiving.incoming._held)
    receiving = connection._parser.receiving
    assert receiving is not None and receiving.incoming is not None
    assert len(receiving.incoming._buffer) < 600_000
    released.set()
    await sending
    assert (await line.answer()).json["bytes"] == 1_000_000
    line.close()


async def test_a_reader_that_leaves_a_download(archive: Archive, plane: Plane) -> None:
    data = b"x" * 1_000_000
    file_id = (await plane.send(simple(data, plane.key))).json["id"]
    line = await plane.line(receive_buffer=4096)
    await line.send(get(f"/v1/files/{file_id}/content", plane.key))
    await line.head()
    line.reset()
    async with asyncio.timeout(60):
        while plane.server.working:
            await asyncio.sleep(0.01)


async def test_unknown_methods_are_told_what_there_is(archive: Archive, plane: Plane) -> None:
    answer = await plane.send(post("/v1/files/file_1", {}, plane.key))
    assert answer.status == 405 and answer.headers["allow"] == "DELETE, GET"
    assert (await plane.send(get("/v1/files/", plane.key))).status == 404
    assert (await plane.send(get("/v1/files/x/y", plane.key))).status == 404
