"""State of replicas that the gateway processes of one machine share in memory.

Prompts that were sent, and work in flight.

A file in memory that all of them map. Each writes to a part of its own and reads those of the others; nobody locks,
nobody waits, and no system call is made. All of it is a hint: what is lost or half-written costs a cache hit, never
more. A part is a head count, a table of loads with a row for each replica, and a ring of prompts:

    event = replica id, number of keys, keys        (little-endian, 8 bytes each)

The processes compute the same keys, as the supervisor starts them with the same hash seed (docs/routing.md).
"""

import mmap
import os
import struct
from array import array
from collections.abc import Callable
from pathlib import Path

from tidemill.gateway.routing.prefix_index import Keys

MAX_REPLICAS = 1024
"""Rows of the table of loads; replicas beyond keep theirs to themselves."""
RING_BYTES = 1024 * 1024
"""Prompts that a process may be behind: some ten thousand short ones, eight hundred of the longest."""

_HEAD = struct.Struct("<Q")
_ROW = struct.Struct("<Qqq")
_EVENT = struct.Struct("<QQ")
_WRAP = 2**64 - 1
"""In place of a number of keys: the ring goes on at its beginning."""
_ROWS_AT = 64
_RING_AT = _ROWS_AT + _ROW.size * MAX_REPLICAS
PART_BYTES = _RING_AT + RING_BYTES
_MAX_KEYS = 1024


def create_board(path: Path, processes: int) -> None:
    """Create the empty file for so many processes, before any of them opens it."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # A store into a hole of a sparse file on a full disk would kill the process with SIGBUS.
        os.posix_fallocate(fd, 0, processes * PART_BYTES)
    finally:
        os.close(fd)


class SharedReplicaState:
    """The shared state, as process `index` of `processes` sees it."""

    def __init__(self, path: Path, index: int, processes: int) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, processes * PART_BYTES)
        finally:
            os.close(fd)
        self._own = index * PART_BYTES
        self._peers = [each * PART_BYTES for each in range(processes) if each != index]
        self._heads = {peer: self._read_head(peer) for peer in self._peers}
        self._head = self._read_head(self._own)
        for row in range(MAX_REPLICAS):  # of an earlier process in this place
            self.tell_load(row, 0, 0, 0)

    def tell_load(self, row: int, replica: int, work: int, active: int) -> None:
        """Publish what this process has in flight at a replica."""
        at = self._own + _ROWS_AT + row * _ROW.size
        self._map[at : at + _ROW.size] = _ROW.pack(replica, work, active)

    def others_load(self, row: int, replica: int) -> tuple[int, int]:
        """The work and requests that the other processes have in flight at a replica."""
        work = active = 0
        for peer in self._peers:
            named, its_work, its_active = _ROW.unpack_from(self._map, peer + _ROWS_AT + row * _ROW.size)
            if named == replica:
                work += its_work
                active += its_active
        return max(work, 0), max(active, 0)

    def tell_prompt(self, replica: int, keys: Keys) -> None:
        """A prompt with these keys was sent to a replica."""
        body = array("q", keys[:_MAX_KEYS]).tobytes()
        at = self._head % RING_BYTES
        if at + _EVENT.size + len(body) > RING_BYTES - _EVENT.size:
            start = self._own + _RING_AT + at
            self._map[start : start + _EVENT.size] = _EVENT.pack(0, _WRAP)
            self._head += RING_BYTES - at
            at = 0
        start = self._own + _RING_AT + at
        event = _EVENT.pack(replica, len(body) // 8) + body
        self._map[start : start + len(event)] = event
        self._head += len(event)
        self._map[self._own : self._own + _HEAD.size] = _HEAD.pack(self._head)  # last: now it can be read

    def hear(self, tell: Callable[[int, list[int]], None]) -> None:
        """Call `tell` with replica and keys of each prompt that the others have sent since the last time."""
        for peer, seen in self._heads.items():
            head = self._read_head(peer)
            if head != seen:
                self._heads[peer] = head
                self._hear(peer, seen, head, tell)

    def _hear(self, peer: int, seen: int, head: int, tell: Callable[[int, list[int]], None]) -> None:
        ring = peer + _RING_AT
        while seen < head:
            if head - seen > RING_BYTES // 2:
                return  # far behind: what is still there may be overwritten while it is read
            start = ring + seen % RING_BYTES
            replica, count = _EVENT.unpack_from(self._map, start)
            if count == _WRAP:
                seen += RING_BYTES - seen % RING_BYTES
                continue
            if count > _MAX_KEYS:
                return
            keys = array("q")
            keys.frombytes(self._map[start + _EVENT.size : start + _EVENT.size + 8 * count])
            seen += _EVENT.size + 8 * count
            tell(replica, keys.tolist())

    def _read_head(self, part: int) -> int:
        head: int = _HEAD.unpack_from(self._map, part)[0]
        return head

    def close(self) -> None:
        self._map.close()
