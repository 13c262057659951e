"""Requests in flight, in a memory-mapped file.

What survives `kill -9` to the token, without a system call.

A request takes a slot when it is admitted and leaves it when its record is on disk. Its running token counts are
stored into the slot as they pass. The pages belong to the kernel, so the death of the process does not lose them;
a flush each second bounds what the death of the machine can.
"""

import mmap
import os
import struct
import zlib
from pathlib import Path

import msgspec

from tidemill.errors import Unavailable
from tidemill.ledger.money import MAX_NANOS
from tidemill.meter.records import Opened, decode_opened, encode_opened

SLOT_BYTES = 1024
SLOTS = 8192
"""Requests that one gateway process has open at a time, at the most."""

_STATE = struct.Struct("<III")  # 1 when taken, length and crc32 of the opened record
_COUNTS = struct.Struct("<QQQQQI")  # prompt, cached, completion tokens; first token, micros; hold, nanos; estimated
_COUNTS_AT = 16
_BODY_AT = 64
LONGEST_US = 10 * 24 * 3600 * 1_000_000
"""A first token later than ten days after its request was not the engine's."""
_PADDING = bytes(_BODY_AT - _COUNTS_AT - _COUNTS.size)
_SLOT_WORDS = SLOT_BYTES // 8
_COMPLETION_WORD = _COUNTS_AT // 8 + 2
"""Of the words of a slot, the one that holds the completion tokens (native order, which is little endian here)."""
_FREE = bytes(_STATE.size)
MAX_OPENED = 720
"""Bytes of an opened record at the most; with its outcome it must fit into what the log reserves for it."""
_ROOM = SLOT_BYTES - _BODY_AT
"""Bytes of one that a slot has room for: earlier programs have used more of it."""


class TooManyOpen(Unavailable):
    """The gateway process has reached its limit of open requests."""

    code = "overloaded"


class Unfinished(msgspec.Struct, frozen=True):
    """A request that was open when its process died, with the counts that had passed."""

    opened: Opened
    prompt: int
    cached: int
    completion: int
    first_token_us: int
    hold: int
    estimated: bool


class LiveTable:
    """The slots of one gateway process, mapped from `path`."""

    def __init__(self, path: Path, slots: int = SLOTS) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # A store into a hole of a sparse file on a full disk would kill the process with SIGBUS.
            os.posix_fallocate(fd, 0, slots * SLOT_BYTES)
            self._map = mmap.mmap(fd, slots * SLOT_BYTES)
            self._words = memoryview(self._map).cast("Q")
        finally:
            os.close(fd)
        self._free = list(range(slots - 1, -1, -1))
        self._slots = slots

    @property
    def open_requests(self) -> int:
        return self._slots - len(self._free)

    def open(self, opened: Opened, hold: int) -> int:
        """Take a slot for a request; returns its number. Raises TooManyOpen when none is free."""
        if not self._free:
            raise TooManyOpen(
                f"The gateway has reached its limit of {self._slots} open requests.", hint="Try again in a moment."
            )
        body = encode_opened(opened)
        if len(body) > MAX_OPENED:
            raise ValueError(f"an opened record must have at most {MAX_OPENED} bytes, got {len(body)}")
        slot = self._free.pop()
        base = slot * SLOT_BYTES
        counts = _COUNTS.pack(0, 0, 0, 0, hold, 0)
        self._map[base + _COUNTS_AT : base + _BODY_AT + len(body)] = counts + _PADDING + body
        self._map[base : base + _STATE.size] = _STATE.pack(1, len(body), zlib.crc32(body))  # last: now it counts
        return slot

    def count(
        self, slot: int, prompt: int, cached: int, completion: int, first_token_us: int, hold: int, estimated: bool
    ) -> None:
        """Record the token counts so far."""
        at = slot * SLOT_BYTES + _COUNTS_AT
        # Copied in, not packed in place: `pack_into` clears the place first, and a kill in that moment would leave
        # zeros. A kill within the copy leaves each figure either as it was or as it is.
        self._map[at : at + _COUNTS.size] = _COUNTS.pack(prompt, cached, completion, first_token_us, hold, estimated)

    def count_completion(self, slot: int, completion: int) -> None:
        """Record only the completion tokens so far, if nothing else has changed."""
        # One aligned word: a kill leaves it either as it was or as it is.
        self._words[slot * _SLOT_WORDS + _COMPLETION_WORD] = completion

    def close_slot(self, slot: int) -> None:
        """Free a slot, once its record is on disk (or when nothing was dispatched)."""
        base = slot * SLOT_BYTES
        self._map[base : base + _STATE.size] = _FREE
        self._free.append(slot)

    def flush(self) -> None:
        """Write the pages to disk, against the loss of the machine. Blocking: call it from a thread."""
        self._map.flush()

    def close(self) -> None:
        self._words.release()
        self._map.close()


def read_unfinished(path: Path) -> list[Unfinished]:
    """The requests that a dead process left open, in slot order. A half-written slot was never dispatched."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for base in range(0, len(data) - SLOT_BYTES + 1, SLOT_BYTES):
        taken, length, checksum = _STATE.unpack_from(data, base)
        body = data[base + _BODY_AT : base + _BODY_AT + length]
        if taken != 1 or not 0 < length <= _ROOM or zlib.crc32(body) != checksum:
            continue  # free, or half-written: never dispatched, or settled already
        prompt, cached, completion, first_us, hold, estimated = _COUNTS.unpack_from(data, base + _COUNTS_AT)
        opened = decode_opened(body)
        # The counts have no checksum, which would cost as much as they do. A damaged page must still give a record.
        first_us = first_us if 0 <= first_us - opened.started_us < LONGEST_US else 0
        found.append(Unfinished(opened, prompt, cached, completion, first_us, min(hold, MAX_NANOS), bool(estimated)))
    return found
