"""/v1/files: uploads are streamed to disk, downloads are streamed from it with back-pressure.

Source: OpenAI API reference, "Files". Everything is a tenant's own: another's file does not exist.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import structlog

from tidemill.errors import Unavailable
from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.auth.snapshot import Principal
from tidemill.gateway.endpoints.pagination import limit_of, page, query_of
from tidemill.gateway.endpoints.tenant_api import Routes, TenantApi
from tidemill.gateway.endpoints.uploads import FORM_BYTES, UploadForm, file_limit_error, take_form
from tidemill.gateway.errors import BadRequest, TooManyUploads
from tidemill.http.request_body import BrokenBody
from tidemill.http.server import Exchange
from tidemill.store.blobs import BlobStore, InsufficientStorage
from tidemill.store.engine import Store
from tidemill.store.files import File, FileQuota, add_file, check_quota, delete_file, file_usage, find_file, list_files
from tidemill.store.ids import new_id

log = structlog.get_logger()
_encode = msgspec.json.Encoder().encode

UPLOADS_PER_TENANT = 4
"""Uploads that one gateway process takes from a tenant at a time."""
EXPIRES_WITHIN_S = (3600, 30 * 86_400)
"""OpenAI's bounds for `expires_after`."""


class FileRules(msgspec.Struct, frozen=True):
    """The limits of files, from the configuration."""

    directory: str
    max_file_bytes: int
    tenant_bytes: int
    tenant_files: int
    keep_s: int
    """How long a file is kept when its owner does not say."""
    reserve_bytes: int
    """What uploads leave free on the disk: the usage log and the store need room too."""


class FileEndpoints(TenantApi):
    """The Files API of one gateway process. What blocks on disk or store runs in `executor`."""

    streamed = ((b"POST", b"/v1/files"),)
    """The routes whose bodies are taken piece by piece."""

    def __init__(
        self, authenticator: Authenticator, store: Store, blobs: BlobStore, rules: FileRules, executor: Executor
    ) -> None:
        super().__init__(authenticator, store, executor)
        self._blobs = blobs
        self._rules = rules
        self._quota = FileQuota(rules.tenant_bytes, rules.tenant_files)
        self._uploading: dict[str, list[int]] = {}
        """By tenant: the sizes of running uploads."""

    @property
    def routes(self) -> Routes:
        return {
            (b"POST", b"/v1/files"): self._upload,
            (b"GET", b"/v1/files"): self._list,
            (b"GET", b"/v1/files/{id}"): self._retrieve,
            (b"GET", b"/v1/files/{id}/content"): self._content,
            (b"DELETE", b"/v1/files/{id}"): self._delete,
        }

    async def _upload(self, exchange: Exchange) -> None:
        principal = await self.authenticate(exchange)
        length = exchange.headers.get(b"content-length")
        size = int(length) if length is not None else self._rules.max_file_bytes
        if size > self._rules.max_file_bytes + FORM_BYTES:
            raise file_limit_error(self._rules.max_file_bytes)
        with self._counted(principal.tenant_id, size):
            await self.in_thread(lambda: self._check_room(principal.tenant_id, size))
            with contextlib.suppress(BrokenBody):  # the client has left; nothing is kept, nobody to tell
                form = await take_form(exchange, self._blobs, self.in_thread, max_bytes=self._rules.max_file_bytes)
                try:
                    file = self._described(principal, form)
                    await self.in_thread(lambda: self._keep(file, form))
                finally:
                    await self.in_thread(form.incoming.discard)
                self.answer(exchange, file_json(file))

    async def _list(self, exchange: Exchange) -> None:
        principal = await self.authenticate(exchange)
        query = query_of(exchange)
        limit = limit_of(query, default=10_000, highest=10_000)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise BadRequest("'order' must be 'asc' or 'desc'.", param="order")

        def read() -> list[File]:
            with self._store.read() as connection:
                return list_files(
                    connection,
                    tenant_id=principal.tenant_id,
                    now=datetime.now(UTC),
                    limit=limit + 1,
                    purpose=query.get("purpose"),
                    after=query.get("after"),
                    ascending=order == "asc",
                )

        found = await self.in_thread(read)
        self.answer(exchange, page([file_json(file) for file in found], limit))

    async def _retrieve(self, exchange: Exchange) -> None:
        self.answer(exchange, file_json(await self._find(exchange)))

    async def _content(self, exchange: Exchange) -> None:
        file = await self._find(exchange)
        fd = await self.in_thread(lambda: self._blobs.open(file.file_id, file.site))
        await self.send_file(exchange, fd, file.file_id)

    async def _delete(self, exchange: Exchange) -> None:
        principal = await self.authenticate(exchange)
        file_id = id_of(exchange)

        def delete() -> None:
            with self._store.write() as connection:
                delete_file(connection, tenant_id=principal.tenant_id, file_id=file_id, now=datetime.now(UTC))
            self._blobs.remove([file_id])

        await self.in_thread(delete)
        self.answer(exchange, {"id": file_id, "object": "file", "deleted": True})

    async def _find(self, exchange: Exchange) -> File:
        principal = await self.authenticate(exchange)
        file_id = id_of(exchange)

        def read() -> File:
            with self._store.read() as connection:
                return find_file(connection, tenant_id=principal.tenant_id, file_id=file_id, now=datetime.now(UTC))

        return await self.in_thread(read)

    @contextlib.contextmanager
    def _counted(self, tenant_id: str, size: int) -> Iterator[None]:
        """Count a running upload."""
        sizes = self._uploading.setdefault(tenant_id, [])
        if len(sizes) >= UPLOADS_PER_TENANT:
            raise TooManyUploads(
                f"You are already uploading {len(sizes)} files, the most at a time.",
                hint="Wait until one has finished.",
            )
        sizes.append(size)
        try:
            yield
        finally:
            sizes.remove(size)
            if not sizes:
                del self._uploading[tenant_id]

    def _check_room(self, tenant_id: str, size: int) -> None:
        """Refuse an upload that would not fit, before its body. Raises QuotaExceeded, InsufficientStorage."""
        underway = sum(sum(sizes) for sizes in list(self._uploading.values()))
        if self._blobs.free_bytes() < underway + self._rules.reserve_bytes:
            raise InsufficientStorage(
                "The platform has no disk space for this file.", hint="Try again later, or ask your operator."
            )
        with self._store.read() as connection:
            count, stored = file_usage(connection, tenant_id)
        own = self._uploading.get(tenant_id, [])
        slack = FORM_BYTES * len(own)  # the size of a body is a little more than that of its file
        check_quota(count + len(own), stored + max(sum(own) - slack, 0), self._quota)

    def _described(self, principal: Principal, form: UploadForm) -> File:
        fields = form.fields
        purpose = fields.get("purpose")
        if purpose != "batch":
            what = "is missing" if not purpose else f"{purpose[:40]!r} is not supported"
            raise BadRequest(f"The purpose of the file {what}.", hint="Upload with purpose 'batch'.", param="purpose")
        now = datetime.now(UTC)
        seconds = expiry_of(fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]"), "expires_after")
        return File(
            file_id=new_id("file"),
            tenant_id=principal.tenant_id,
            site=self._blobs.site,
            purpose=purpose,
            filename=form.filename,
            bytes=form.incoming.bytes,
            created_at=now,
            expires_at=now + timedelta(seconds=seconds or self._rules.keep_s),
        )

    def _keep(self, file: File, form: UploadForm) -> None:
        """Put the file on disk under its id, then enter it into the store."""
        form.incoming.keep(file.file_id)
        try:
            with self._store.write() as connection:
                add_file(connection, file, self._quota)
        except Unavailable:
            raise  # the row may have been written; if not, the blob is swept away as an orphan
        except BaseException:
            self._blobs.remove([file.file_id])
            raise


def open_blobs(rules: FileRules) -> BlobStore:
    """Open the blob store that the rules name, and delete half-written files of a killed process."""
    blobs = BlobStore(Path(rules.directory))
    blobs.sweep_incoming()
    return blobs


def id_of(exchange: Exchange) -> str:
    """The `{id}` of a route such as `/v1/files/{id}/content`."""
    return exchange.path.split(b"/")[3].decode("latin-1")


def expiry_of(anchor: object, seconds: object, param: str) -> int | None:
    """The seconds of an `expires_after`; None when there is none. Raises BadRequest."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadRequest(f"'{param}.anchor' must be 'created_at'.", param=param)
    low, high = EXPIRES_WITHIN_S
    text = str(seconds)
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and low <= int(text) <= high):
        raise BadRequest(f"'{param}.seconds' must be a number from {low} to {high}.", param=param)
    return int(text)


def file_json(file: File) -> dict[str, object]:
    """OpenAI's File object."""
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": None if file.expires_at is None else int(file.expires_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
