"""Blobs: the bytes of files, in a directory beside the store that knows their names.

DIR/site        the directory's name in the store, given at its first use
DIR/incoming/   uploads that are not whole yet, each locked by its writer
DIR/blobs/      a file a blob, named by its id, readable by its owner only
DIR/batches/    a working directory for each batch that runs

A blob appears under its id only when it is whole and on disk, and its row is written after that. So a kill at any
moment leaves at most bytes that nothing names, which `sweep` removes.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tidemill.errors import TidemillError, Unavailable

SYNC_EVERY_BYTES = 8 * 1024 * 1024
"""What is written goes to the disk in steps of this, so that one big fsync at the end does not hold up the usage log's
small ones."""
ORPHAN_AFTER_S = 600.0
"""A blob without a row is younger than this while its writer may still be about to write the row."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InsufficientStorage(TidemillError):
    """The disk has no room for this."""

    status = 507
    code = "insufficient_storage"


def no_room(error: OSError) -> InsufficientStorage | None:
    """The error for the reader when a write has failed for want of room; None for another failure."""
    if error.errno not in _NO_ROOM:
        return None
    return InsufficientStorage(
        "The platform's disk is full; this file was not stored.", hint="Try again later, or ask your operator."
    )


class PendingBlob:
    """A blob that is being written, by one thread at a time.

    It ends with `keep` or `discard`, or with its process.
    """

    def __init__(self, blobs: "BlobStore", path: Path, fd: int) -> None:
        self._blobs = blobs
        self._path = path
        self._fd = fd
        self._synced = 0
        self.bytes = 0

    def write(self, data: bytes | bytearray) -> None:
        """Append. Blocking. Raises InsufficientStorage, or OSError for a disk that fails otherwise."""
        view = memoryview(data)
        try:
            while view:
                written = os.write(self._fd, view)
                view = view[written:]
                self.bytes += written
            if self.bytes - self._synced >= SYNC_EVERY_BYTES:
                self._sync()
        except OSError as error:
            raise no_room(error) or error from error

    def keep(self, file_id: str) -> None:
        """Make it the blob `file_id`, on disk once this returns.

        Blocking. Raises like `write`; then discard it.
        """
        try:
            self._sync()
            self._path.rename(self._blobs.path(file_id))
            self._path = self._blobs.path(file_id)
            sync_directory(self._blobs.directory / "blobs")
        except OSError as error:
            raise no_room(error) or error from error
        self._close()

    def discard(self) -> None:
        """Leave nothing of it. Blocking; once it is kept, this does nothing."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            self._close()

    def _sync(self) -> None:
        os.fdatasync(self._fd)
        self._synced = self.bytes

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class BlobStore:
    """A directory of blobs. All methods block on the disk: call them from a thread."""

    def __init__(self, directory: Path) -> None:
        """Make the directory if it is not there. Raises OSError."""
        self.directory = directory
        for each in (directory, directory / "incoming", directory / "blobs", directory / "batches"):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.site = site_of(self.directory)

    def path(self, file_id: str) -> Path:
        """Where the blob of a file lies."""
        return self.directory / "blobs" / file_id

    def batch_directory(self, batch_id: str) -> Path:
        """The working directory of a batch."""
        return self.directory / "batches" / batch_id

    def free_bytes(self) -> int:
        """What the disk has room for."""
        state = os.statvfs(self.directory)
        return state.f_bavail * state.f_frsize

    def create(self) -> PendingBlob:
        """Begin a blob. Raises InsufficientStorage, or OSError."""
        try:
            while True:
                path = self.directory / "incoming" / secrets.token_hex(12)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                # A sweep may come between these two steps: then it has the lock, or the file is gone.
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(fd).st_nlink:
                        return PendingBlob(self, path, fd)
                os.close(fd)
        except OSError as error:
            raise no_room(error) or error from error

    def open(self, file_id: str, site: str) -> int:
        """Open a blob for reading; gives a file descriptor. Raises Unavailable when it is not here."""
        try:
            return os.open(self.path(file_id), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            where = "is on another machine" if site != self.site else "has just been deleted"
            raise Unavailable(f"The content of {file_id} {where}.") from None

    def remove(self, file_ids: Iterable[str]) -> None:
        """Remove blobs; those that are gone already are passed over."""
        for file_id in file_ids:
            self.path(file_id).unlink(missing_ok=True)

    def adopt(self, part: Path, file_id: str) -> int | None:
        """Make a finished file the blob `file_id`; gives its size, or None when there is neither.

        May be repeated after a kill at any moment. The file must be on disk already (fsync).
        """
        with contextlib.suppress(FileNotFoundError):
            part.rename(self.path(file_id))
            sync_directory(self.directory / "blobs")
        try:
            return self.path(file_id).stat().st_size
        except FileNotFoundError:
            return None

    def sweep_incoming(self) -> int:
        """Remove the uploads whose writer is gone; gives their number."""
        gone = 0
        for path in (self.directory / "incoming").iterdir():
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    gone += 1
                finally:
                    os.close(fd)
        return gone

    def sweep_orphans(self, known: Callable[[list[str]], set[str]]) -> int:
        """Remove blobs without a row; `known` says which of some file ids have one. Gives their number."""
        before = time.time() - ORPHAN_AFTER_S
        old = []
        for entry in os.scandir(self.directory / "blobs"):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_ctime < before:
                    old.append(entry.name)
        orphans = set(old) - known(old)
        self.remove(orphans)
        return len(orphans)

    def remove_batch_directory(self, batch_id: str) -> None:
        shutil.rmtree(self.batch_directory(batch_id), ignore_errors=True)


def site_of(directory: Path) -> str:
    """The name of a directory of files in the store, given at its first use."""
    path = directory / "site"
    if not path.exists():
        temporary = path.with_name(f".site-{secrets.token_hex(4)}")
        temporary.write_text(f"site_{secrets.token_hex(8)}\n")
        with contextlib.suppress(FileExistsError):  # another process was quicker: its name counts
            os.link(temporary, path)
        temporary.unlink()
    return path.read_text().strip()


def sync_directory(directory: Path) -> None:
    """Make names created or removed in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
