"""The Files and Batch API on a `Plane`, and forms to send to it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from tests.support.plane import Plane
from tidemill.gateway.endpoints.app import OPERATIONS, GatewayApp
from tidemill.gateway.endpoints.batches import BatchEndpoints, BatchRules
from tidemill.gateway.endpoints.files import FileEndpoints, FileRules, open_blobs
from tidemill.gateway.proxy.inflight import GatewayMeter

BOUNDARY = b"---tide"


def rules(directory: Path, **changes: Any) -> FileRules:
    """Small limits, so that a test reaches them."""
    spec = FileRules(
        directory=str(directory),
        max_file_bytes=1024 * 1024,
        tenant_bytes=4 * 1024 * 1024,
        tenant_files=5,
        keep_s=3600,
        reserve_bytes=0,
    )
    return msgspec.structs.replace(spec, **changes)


class Archive:
    """`async with Archive(plane, path) as archive`: the plane answers /v1/files and /v1/batches from then on."""

    def __init__(self, plane: Plane, path: Path, *, tenant_open: int = 3, **changes: Any) -> None:
        self.plane = plane
        self.rules = rules(path / "files", **changes)
        self._tenant_open = tenant_open

    async def __aenter__(self) -> "Archive":
        plane = self.plane
        self.blobs = open_blobs(self.rules)
        self.executor = ThreadPoolExecutor(2)
        self.files = FileEndpoints(plane.authenticator, plane.store, self.blobs, self.rules, self.executor)
        batches = BatchEndpoints(
            plane.authenticator,
            plane.store,
            BatchRules(tenant_open=self._tenant_open),
            self.executor,
            operations=OPERATIONS,
        )
        meter = GatewayMeter(plane.log, plane.live, plane.leasing)
        plane.server.handler = GatewayApp(
            plane.authenticator, plane.routes, meter, started_at=0, more={**self.files.routes, **batches.routes}
        )
        plane.server.streamed = FileEndpoints.streamed
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.executor.shutdown()

    @property
    def kept(self) -> list[str]:
        """The names of all blobs, whole ones and those that are being written."""
        return sorted(path.name for room in ("blobs", "incoming") for path in (self.blobs.directory / room).iterdir())


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    """A part of a form."""
    more = f'; filename="{filename}"' if filename is not None else ""
    head = f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode()
    return b"--" + BOUNDARY + b"\r\n" + head + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


def upload(body: bytes, key: str, *, length: int | None = None, chunked: bool = False, headers: bytes = b"") -> bytes:
    """A POST /v1/files."""
    framing = (
        b"transfer-encoding: chunked\r\n"
        if chunked
        else b"content-length: %d\r\n" % (len(body) if length is None else length)
    )
    head = b"POST /v1/files HTTP/1.1\r\nhost: test\r\nauthorization: Bearer %b\r\n%b%b" % (
        key.encode(),
        framing,
        headers,
    )
    return head + b"content-type: multipart/form-data; boundary=" + BOUNDARY + b"\r\n\r\n" + body


def simple(data: bytes, key: str, *, purpose: str = "batch", filename: str = "in.jsonl", **more: Any) -> bytes:
    """The upload of a file."""
    return upload(form(part("purpose", purpose.encode()), part("file", data, filename)), key, **more)
