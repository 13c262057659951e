"""Writing the usage log: group commit on a thread of its own.

The event loop hands over frames and awaits; the thread writes all that has gathered with one pwrite and one
fdatasync, so that one commit serves every request of that moment, and a slow disk never stops a stream.
"""

import asyncio
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tidemill.errors import Unavailable
from tidemill.meter.frames import END_OF_SEGMENT, HEADER, SEGMENT_BYTES, allocate_segment, frame, segment_numbers

RECORD_RESERVE = 1024
"""Bytes kept free in the segments for each open request: what its settlement will need at the most."""

SEGMENT_RETRY_S = 1.0
"""How long a disk without room for another segment is left alone."""


class LogFull(Unavailable):
    """The disk has no room to meter another request, so none is accepted."""

    code = "metering_unavailable"


class NoSegment(OSError):
    """There is no next segment to write to. Nothing was written; it may go on once the disk has room."""


class UsageLog:
    """The append-only log of one gateway process. Only that process writes to `directory`.

    `reserve()` before a request is accepted; `append()` to settle it. Two segments are kept ready, so room for what
    was reserved is on disk already when the disk fills up.

    After an error of the disk nothing is written any more: what of the failed bytes is on disk cannot be known
    (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020), and the loader may have read them
    from the kernel's memory already, so their place must not be written twice. The process has to be replaced;
    recovery then writes the records of what it had open.
    """

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._loop = loop
        self._segment_bytes = segment_bytes
        self._number = max(segment_numbers(directory), default=0) + 1
        self._fd = allocate_segment(directory, self._number, segment_bytes)
        self._next_fd: int | None = allocate_segment(directory, self._number + 1, segment_bytes)
        self._offset = 0
        self._retry_at = 0.0
        self._reserved = 0
        # A deque, as the two threads must never hold different ideas of which list an append has gone to.
        self._pending: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._wake = threading.Semaphore(0)
        self._thread_waits = True
        self._closing = False
        self.commits = 0
        self.records = 0
        self.failure: OSError | None = None
        """The error after which this log takes nothing more."""
        self.on_commit: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="usage-log", daemon=True)
        self._thread.start()

    def reserve(self) -> None:
        """Promise room for one settlement. Raises LogFull when the disk has none left for it, or has failed."""
        if self.failure is not None:
            raise LogFull(
                f"The usage log of the gateway cannot be written ({self.failure.strerror}), and what cannot be metered"
                " is not accepted.",
                hint="Try again in a moment; the gateway is being started anew.",
            )
        if self._reserved >= self._room():
            raise LogFull(
                "The disk of the gateway is full, and what cannot be metered is not accepted.",
                hint="Try again later; the operator must free disk space under the data directory.",
            )
        self._reserved += 1

    def release(self) -> None:
        """Give back the room of a reservation that will not be settled."""
        self._reserved -= 1

    def append(self, payload: bytes) -> "asyncio.Future[None]":
        """Settle one reservation: the returned future is done when `payload` is on disk."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._pending.append((frame(payload), future))
        if self._thread_waits:
            self._thread_waits = False
            self._wake.release()
        return future

    def close(self) -> None:
        """Write what is pending and stop. Call from the loop's thread, after the last append was awaited."""
        self._closing = True
        self._wake.release()
        self._thread.join()
        os.close(self._fd)
        if self._next_fd is not None:
            os.close(self._next_fd)

    def _room(self) -> int:
        """How many settlements the segments at hand have room for. No record spans two of them."""
        records = (self._segment_bytes - self._offset - HEADER.size) // RECORD_RESERVE
        if self._next_fd is not None:
            records += (self._segment_bytes - HEADER.size) // RECORD_RESERVE
        return records

    def _run(self) -> None:
        while True:
            self._wake.acquire(timeout=None if self._next_fd is not None else SEGMENT_RETRY_S)
            while self._pending:
                self._commit([self._pending.popleft() for _ in range(len(self._pending))])
                self._keep_ready()  # also when there is no pause between commits
            self._thread_waits = True
            if self._pending:  # appended between the check and the flag
                self._thread_waits = False
                self._wake.release()
            elif self._closing:
                return
            self._keep_ready()

    def _commit(self, batch: list[tuple[bytes, "asyncio.Future[None]"]]) -> None:
        failure: OSError | None = self.failure
        if failure is None:
            try:
                self._write([data for data, _ in batch])
            except NoSegment as error:
                failure = error
            except OSError as error:
                failure = self.failure = error
        self.commits += 1
        self.records += len(batch)
        self._loop.call_soon_threadsafe(self._resolve, batch, failure)

    def _write(self, frames: list[bytes]) -> None:
        data = bytearray()
        for piece in frames:
            if self._offset + len(data) + len(piece) + HEADER.size > self._segment_bytes:
                self._require_next()  # before the end is marked: nobody reads on behind it
                data += HEADER.pack(END_OF_SEGMENT, 0)
                self._write_at_end(data)
                self._advance()
                data = bytearray()
            data += piece
        self._write_at_end(data)

    def _write_at_end(self, data: bytearray) -> None:
        view, offset = memoryview(data), self._offset
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written
        os.fdatasync(self._fd)
        self._offset = offset

    def _require_next(self) -> None:
        if self._next_fd is None:
            self._prepare_next()
        if self._next_fd is None:
            raise NoSegment(errno.ENOSPC, "no room for another segment of the usage log")

    def _advance(self) -> None:
        assert self._next_fd is not None
        os.close(self._fd)
        self._fd, self._next_fd = self._next_fd, None
        self._number, self._offset = self._number + 1, 0

    def _keep_ready(self) -> None:
        if self._next_fd is None and time.monotonic() >= self._retry_at:
            self._prepare_next()

    def _prepare_next(self) -> None:
        try:
            self._next_fd = allocate_segment(self._directory, self._number + 1, self._segment_bytes)
        except OSError:
            self._next_fd = None  # reserve() refuses once the current segment is promised
            self._retry_at = time.monotonic() + SEGMENT_RETRY_S

    def _resolve(self, batch: list[tuple[bytes, "asyncio.Future[None]"]], failure: OSError | None) -> None:
        self._reserved -= len(batch)
        for _, future in batch:
            if future.cancelled():
                continue
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)
        if self.on_commit is not None:
            self.on_commit()
