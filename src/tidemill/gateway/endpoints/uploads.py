"""Uploads: a multipart form, streamed from the socket to disk.

The pieces are written by a thread, and the client waits while the disk does. Whatever goes wrong, nothing is left.
Source: RFC 7578; OpenAI API reference, "Upload file".
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from tidemill.gateway.errors import BadRequest, BodyTooLarge
from tidemill.http.request_body import BrokenBody
from tidemill.http.server import Exchange
from tidemill.store.blobs import BlobStore, PendingBlob

WRITE_BYTES = 1024 * 1024
"""What is gathered before a thread is asked to write it."""
FORM_BYTES = 64 * 1024
"""What a form may have beside the file: its fields and its boundaries."""
MAX_FIELD_BYTES = 4096
MAX_PARTS = 16
MAX_FILENAME = 255

T = TypeVar("T")
InThread = Callable[[Callable[[], T]], Awaitable[T]]


class UploadForm(msgspec.Struct):
    """A received form: its fields, and the file on disk, not yet under its id."""

    fields: dict[str, str]
    filename: str
    incoming: PendingBlob


def file_limit_error(limit: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"The file is larger than {limit // 2**20} MiB.", hint="Split it into several files.", param="file"
    )


async def take_form(exchange: Exchange, blobs: BlobStore, in_thread: InThread[None], *, max_bytes: int) -> UploadForm:
    """Read an exchange's multipart form; the part `file` is written to disk.

    Raises BadRequest, BodyTooLarge, InsufficientStorage, and BrokenBody when the client leaves; nothing is left then.
    """
    parser = _parser(exchange)
    taken = _Taking(blobs, in_thread, max_bytes)
    body = exchange.incoming
    assert body is not None
    try:
        try:
            while data := await body.next():
                for event in parser.parse(data):
                    await taken.on(event)
            parser.close()
        except MultipartError as error:
            raise BadRequest(f"The form is malformed: {error}.", hint="Send multipart/form-data.") from error
        except BrokenBody as error:
            if exchange.gone:
                raise
            raise BadRequest(f"The request body is malformed: {error}") from error
        return await taken.end()
    except BaseException:
        if taken.incoming is not None:
            incoming = taken.incoming
            await in_thread(incoming.discard)
        raise


def _parser(exchange: Exchange) -> PushMultipartParser:
    kind, options = parse_options_header(exchange.headers.get(b"content-type", b"").decode("latin-1"))
    boundary = options.get("boundary", "")
    if kind != "multipart/form-data" or not 0 < len(boundary) <= 256:
        raise BadRequest(
            "A file must be uploaded as multipart/form-data.", hint="Send the parts 'purpose' and 'file'.", param="file"
        )
    try:
        return PushMultipartParser(boundary, max_segment_count=MAX_PARTS)
    except MultipartError as error:
        raise BadRequest(f"The form is malformed: {error}.") from error


class _Taking:
    """The state of an upload between two pieces of its body."""

    def __init__(self, blobs: BlobStore, in_thread: InThread[None], max_bytes: int) -> None:
        self.incoming: PendingBlob | None = None
        self._blobs = blobs
        self._in_thread = in_thread
        self._max_bytes = max_bytes
        self._part: MultipartSegment | None = None
        self._filename: str | None = None
        self._pending = bytearray()
        self._fields: dict[str, str] = {}

    async def on(self, event: "MultipartSegment | bytes | None") -> None:
        if isinstance(event, MultipartSegment):
            await self._begin(event)
        elif event is None:
            await self._finish_part()
        else:
            self._pending += event
            if self._part is None or self._part.name != "file":
                if len(self._pending) > MAX_FIELD_BYTES:
                    raise BadRequest(f"A form field is longer than {MAX_FIELD_BYTES} bytes.")
            elif self._part.bytes_received > self._max_bytes:
                raise file_limit_error(self._max_bytes)
            elif len(self._pending) >= WRITE_BYTES:
                await self._write()

    async def end(self) -> UploadForm:
        if self.incoming is None:
            raise BadRequest("The part 'file' is missing.", param="file")
        return UploadForm(self._fields, (self._filename or "file")[:MAX_FILENAME], self.incoming)

    async def _begin(self, part: MultipartSegment) -> None:
        self._part = part
        self._pending.clear()
        if part.name != "file":
            return
        if self.incoming is not None:
            raise BadRequest(
                "The form has more than one part 'file'.", hint="Upload one file per request.", param="file"
            )
        self._filename = "".join(letter for letter in part.filename or "" if letter.isprintable())

        def create() -> None:
            self.incoming = self._blobs.create()

        await self._in_thread(create)

    async def _finish_part(self) -> None:
        assert self._part is not None
        if self._part.name == "file":
            await self._write()
        else:
            self._fields[self._part.name or ""] = self._pending.decode(errors="replace")
        self._pending.clear()

    async def _write(self) -> None:
        assert self.incoming is not None
        incoming, data = self.incoming, bytes(self._pending)
        self._pending.clear()
        if data:
            await self._in_thread(lambda: incoming.write(data))
