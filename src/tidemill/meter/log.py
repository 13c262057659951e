"""The usage log's writer: group commit on its own thread.

The event loop hands over frames and awaits; the thread writes all that has gathered with one pwrite and one
fdatasync, so that one commit serves every request of that moment, and a slow disk never stops a stream.
"""

import asyncio
import errno
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from tidemill.errors import Unavailable
from tidemill.meter.frames import END_OF_SEGMENT, HEADER, SEGMENT_BYTES, allocate_segment, frame, segment_numbers
from tidemill.meter.histogram import Histogram, milliseconds

log = structlog.get_logger()

RECORD_RESERVE = 1024
"""Bytes kept free in the segments for each open request: what its settlement will need at the most."""

COMMIT_BOUNDS = milliseconds(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)

PACE_S = 0.001
"""While records come in numbers, one commit begins this long after the last: it serves all that came meanwhile. A
record that comes alone is committed at once."""

SEGMENT_RETRY_S = 1.0
"""How long a disk without room for another segment is left alone."""


class LogFull(Unavailable):
    """The disk has no room to meter another request, so none is accepted."""

    code = "metering_unavailable"


class NoSegment(OSError):
    """There is no next segment to write to. Nothing was written; it may go on once the disk has room."""


Durable = Callable[[OSError | None], None]
"""Called in the event loop once a record is on disk (None), or cannot be written."""

Batch = list[tuple[bytes, Durable]]


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
        self._pending: Batch = []
        self._due = False
        """It is decided when what has gathered is handed to the thread."""
        self._out = False
        """The thread is at work on a batch."""
        self._last = float("-inf")
        self._crowd = 0
        """Records of the last batch."""
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self.commits = 0
        self.records = 0
        self.commit_times = Histogram(COMMIT_BOUNDS)
        self.failure: OSError | None = None
        """The error after which this log takes nothing more."""
        self.on_commit: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="usage-log", daemon=True)
        self._thread.start()

    def refusal(self) -> LogFull | None:
        """Why no further request can be metered now; None as long as one can."""
        if self.failure is not None:
            return LogFull(
                f"The gateway cannot write its usage log ({self.failure.strerror}), so requests cannot be metered"
                " and are refused.",
                hint="Try again in a moment; the gateway is restarting.",
            )
        if self._reserved >= self._room():
            return LogFull(
                "The gateway's disk is full, so requests cannot be metered and are refused.",
                hint="Try again later; the operator must free disk space under the data directory.",
            )
        return None

    def reserve(self) -> None:
        """Promise room for one settlement. Raises LogFull when the disk has none left for it, or has failed."""
        if self.failure is not None or self._reserved >= self._room():
            refusal = self.refusal()
            if refusal is not None:
                raise refusal
        self._reserved += 1

    def release(self) -> None:
        """Give back the room of a reservation that will not be settled."""
        self._reserved -= 1

    def append(self, payload: bytes) -> "asyncio.Future[None]":
        """Settle one reservation: the returned future is done when `payload` is on disk."""
        future: asyncio.Future[None] = self._loop.create_future()

        def durable(failure: OSError | None) -> None:
            if future.cancelled():
                return
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

        self.append_then(payload, durable)
        return future

    def append_then(self, payload: bytes, durable: Durable) -> None:
        """Settle one reservation; `durable` is called when that is decided."""
        self._pending.append((frame(payload), durable))
        if not self._due and not self._out:
            self._hand_over_in_time()

    def _hand_over_in_time(self) -> None:
        """Hand over pending records: at once, or shortly later if many records come."""
        early = self._last + PACE_S - self._loop.time()
        if early > 0.0 and self._crowd > 1:
            self._due = True
            self._loop.call_later(early, self._hand_over)
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        """Hand over pending records to the idle thread."""
        self._due, self._out = False, True
        self._last = self._loop.time()
        batch, self._pending = self._pending, []
        self._crowd = len(batch)
        self._batches.put(batch)

    def close(self) -> None:
        """Write what is pending and stop. Call from the loop's thread, after the last append was awaited."""
        if self._pending:
            self._batches.put(self._pending)
            self._pending = []
        self._batches.put(None)
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
            try:
                batch = self._batches.get(timeout=None if self._next_fd is not None else SEGMENT_RETRY_S)
            except queue.Empty:
                batch = []
            if batch is None:
                return
            if batch:
                self._commit(batch)
                batch = []  # the loop's thread, which made what hangs on it, frees it too
            self._keep_ready()

    def _commit(self, batch: Batch) -> None:
        failure: OSError | None = self.failure
        if failure is None:
            try:
                began = time.monotonic_ns()
                self._write([data for data, _ in batch])
                self.commit_times.note((time.monotonic_ns() - began) // 1000)
            except NoSegment as error:
                failure = error
            except OSError as error:
                failure = self.failure = error
        self.commits += 1
        self.records += len(batch)
        self._loop.call_soon_threadsafe(self._resolve, batch, failure)

    def _write(self, frames: list[bytes]) -> None:
        data: bytes | bytearray = b"".join(frames)
        if self._offset + len(data) + HEADER.size <= self._segment_bytes:
            self._write_at_end(data)
            return
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

    def _write_at_end(self, data: bytes | bytearray) -> None:
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

    def _resolve(self, batch: Batch, failure: OSError | None) -> None:
        self._reserved -= len(batch)
        self._out = False
        if self._pending:
            self._crowd = max(self._crowd, len(self._pending))
            self._hand_over_in_time()
        for _, durable in batch:
            try:
                durable(failure)
            except Exception:  # one request's trouble is not that of the others
                log.exception("what follows a settled request has failed")
        if self.on_commit is not None:
            self.on_commit()
