"""The usage log on disk: segments of a fixed, preallocated size, filled with checksummed frames.

A segment is allocated and zeroed before its first frame, so that a record which was promised room cannot fail for
a full disk, and an fdatasync has no file size to write. A frame is `length, crc32, payload`. A length of zero is
the end so far; END_OF_SEGMENT says that the log goes on in the next segment.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

HEADER = struct.Struct("<II")
END_OF_SEGMENT = 0xFFFFFFFF
SEGMENT_BYTES = 4 * 1024 * 1024
MAX_PAYLOAD = 4096
"""A settled record has about 300 bytes; a longer one than this is a bug, not a request."""

Position = tuple[int, int]
"""(segment number, byte offset within it): where the next frame begins."""


class ReadFrame(msgspec.Struct, frozen=True, gc=False):
    """One intact frame and the position after it."""

    payload: bytes
    after: Position


def frame(payload: bytes) -> bytes:
    """Wrap a payload for the log. Raises ValueError for one longer than MAX_PAYLOAD or empty."""
    if not 0 < len(payload) <= MAX_PAYLOAD:
        raise ValueError(f"a log record must have 1 to {MAX_PAYLOAD} bytes, got {len(payload)}")
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.log"


def segment_numbers(directory: Path) -> list[int]:
    """The numbers of the segments in a worker's directory, ascending."""
    return sorted(int(path.stem) for path in directory.glob("*.log") if path.stem.isdigit())


def allocate_segment(directory: Path, number: int, size: int = SEGMENT_BYTES) -> int:
    """Make a zeroed segment that owns its disk blocks; returns its file descriptor.

    It appears under its name only when it is whole. Raises OSError (ENOSPC among others) and then leaves nothing.
    """
    path = segment_path(directory, number)
    temporary = path.with_suffix(".new")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # Written rather than fallocate()d: an extent that is only reserved must still be marked as written at the
        # first fdatasync behind each new block, which costs a journal commit.
        zeros = bytes(256 * 1024)
        written = 0
        while written < size:
            written += os.pwrite(fd, zeros[: size - written], written)
        os.fsync(fd)
        temporary.rename(path)
        sync_directory(directory)
    except BaseException:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    return fd


def sync_directory(directory: Path) -> None:
    """Make names created or removed in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_frames(directory: Path, start: Position) -> Iterator[ReadFrame]:
    """The intact frames from `start` on, across segments, up to the end so far.

    A frame whose checksum does not fit ends the reading: in a live log it is still being written; in that of a dead
    process it is the torn tail, which nobody was promised.
    """
    number, offset = start
    while True:
        try:
            fd = os.open(segment_path(directory, number), os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            while True:
                found, more = _frames_at(fd, number, offset)
                for each in found:
                    yield each
                    offset = each.after[1]
                if not found:
                    break
        finally:
            os.close(fd)
        if not more:
            return
        number, offset = number + 1, 0


_NOT_ZERO = re.compile(rb"[^\0]")


def salvage_frames(directory: Path, start: Position) -> Iterator[bytes]:
    """The intact payloads behind `start`, where `read_frames` ended, found by trying every offset.

    For the log of a dead process only: what is there is a torn last write, or a damage of the disk with records that
    were promised behind it.
    """
    first, offset = start
    for number in segment_numbers(directory):
        if number < first:
            continue
        data = segment_path(directory, number).read_bytes()
        at = offset if number == first else 0
        while (found := _NOT_ZERO.search(data, at)) is not None:
            at = max(at, found.start() - 1)  # the lowest byte of a length may be zero, the second then is not
            payload = _payload_at(data, at)
            if payload is None:
                at += 1
            else:
                at += HEADER.size + len(payload)
                yield payload


SEGMENT_READ_BYTES = 256 * 1024


def _frames_at(fd: int, number: int, offset: int) -> tuple[list[ReadFrame], bool]:
    """Whole frames in the next READ_BYTES, and whether the log continues in the next segment."""
    data = os.pread(fd, SEGMENT_READ_BYTES, offset)
    found: list[ReadFrame] = []
    at = 0
    while at + HEADER.size <= len(data):
        if HEADER.unpack_from(data, at)[0] == END_OF_SEGMENT:
            return found, True
        payload = _payload_at(data, at)
        if payload is None:
            break
        at += HEADER.size + len(payload)
        found.append(ReadFrame(payload, (number, offset + at)))
    return found, False


def _payload_at(data: bytes, at: int) -> bytes | None:
    """The payload of an intact frame that begins at `at`."""
    if at + HEADER.size > len(data):
        return None
    length, checksum = HEADER.unpack_from(data, at)
    if not 0 < length <= MAX_PAYLOAD:
        return None
    payload = data[at + HEADER.size : at + HEADER.size + length]
    return payload if len(payload) == length and zlib.crc32(payload) == checksum else None
