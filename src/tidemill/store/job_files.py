"""The files of jobs: logs of each attempt, checkpoints, artefacts. All of it blocks on the disk.

DIR/site                                the directory's name in the store
DIR/<job>/work                          where it runs, unless it was given another directory
DIR/<job>/checkpoints                   TIDEMILL_CHECKPOINT_DIR, the same for all attempts
DIR/<job>/artifacts                     TIDEMILL_ARTIFACT_DIR, what its owner can download
DIR/<job>/attempts/<n>/rank-<r>.log     what its processes said, and `.1`, what was before that (see `fleet.shim`)
DIR/<job>/attempts/<n>/rank-<r>.end     how they ended, written by their shims
DIR/<job>/attempts/<n>/pids             which processes they were, to be looked for after a kill
"""

import contextlib
import os
import pwd
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from tidemill.errors import BadInput, NotFound
from tidemill.store.blobs import site_of

MAX_LISTED = 10_000
"""Artefacts that are listed."""
LOG_PIECE = 256 * 1024
"""Bytes of a log in one answer."""
DONE = "done"
"""A job that writes this file into its checkpoint directory is done, even when it was just asked to go."""
_JOB_ID = re.compile(r"job_[0-9a-z]{1,24}")


class Artifact(msgspec.Struct, frozen=True):
    """A file that a job has made for its owner."""

    path: str
    bytes: int
    modified_at: float
    """Unix time, seconds."""


class LogPage(msgspec.Struct, frozen=True):
    """A part of a log, and where the next one begins."""

    data: bytes
    next: str


class JobFiles:
    """The jobs' directory of one platform. `user`: whom the directories that jobs write to belong to."""

    def __init__(self, root: Path, *, user: str | None = None) -> None:
        self.root = root
        self.user = user
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if user is not None:
            root.chmod(0o711)
        self.site = site_of(root)

    def directory(self, job_id: str) -> Path:
        if not _JOB_ID.fullmatch(job_id):
            raise NotFound(f"There is no job {job_id[:80]!r}.", param="job")
        return self.root / job_id

    def work(self, job_id: str) -> Path:
        return self.directory(job_id) / "work"

    def checkpoints(self, job_id: str) -> Path:
        return self.directory(job_id) / "checkpoints"

    def artifacts_of(self, job_id: str) -> Path:
        return self.directory(job_id) / "artifacts"

    def log(self, job_id: str, attempt: int, rank: int) -> Path:
        return self._attempt(job_id, attempt) / f"rank-{rank}.log"

    def end_file(self, job_id: str, attempt: int, rank: int) -> Path:
        return self._attempt(job_id, attempt) / f"rank-{rank}.end"

    def _attempt(self, job_id: str, attempt: int) -> Path:
        return self.directory(job_id) / "attempts" / str(attempt)

    def prepare(self, job_id: str, attempt: int) -> None:
        """Make what an attempt needs. Raises OSError, KeyError for a user that is not there."""
        directory = self.directory(job_id)
        own = (self.work(job_id), self.checkpoints(job_id), self.artifacts_of(job_id))
        for each in (directory, *own, self._attempt(job_id, attempt)):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.user is not None:
            entry = pwd.getpwnam(self.user)
            directory.chmod(0o711)
            for each in own:
                if each.stat().st_uid != entry.pw_uid:
                    os.chown(each, entry.pw_uid, entry.pw_gid)

    def done(self, job_id: str) -> bool:
        """The job says itself that it is done."""
        return os.path.lexists(self.checkpoints(job_id) / DONE)

    def saved_at(self, job_id: str) -> float | None:
        """When its newest checkpoint was written, Unix time; None without one."""
        newest: float | None = None
        with contextlib.suppress(OSError), os.scandir(self.checkpoints(job_id)) as entries:
            for count, entry in enumerate(entries):
                if count >= 1000:
                    break
                with contextlib.suppress(OSError):
                    at = entry.stat(follow_symlinks=False).st_mtime
                    newest = at if newest is None else max(newest, at)
        return newest

    # Processes, for the time after a kill

    def note_pids(self, job_id: str, attempt: int, pids: Sequence[int | None]) -> None:
        """Remember which processes of this machine an attempt has."""
        marks = [f"{pid} {begun}" for pid in pids if pid is not None and (begun := _begun(pid)) is not None]
        (self._attempt(job_id, attempt) / "pids").write_text("\n".join(marks))

    def any_alive(self, job_id: str, attempt: int) -> bool:
        """Whether a process of the attempt still runs on this machine."""
        try:
            lines = (self._attempt(job_id, attempt) / "pids").read_text().split("\n")
        except OSError:
            return False
        marks = [line.split() for line in lines if line]
        return any(_begun(int(pid)) == begun for pid, begun in marks)

    # For readers

    def read_log(self, job_id: str, attempt: int, rank: int, cursor: str = "") -> LogPage:
        """A part of a log from a cursor on (empty: the beginning of what is kept). Raises NotFound, BadInput.

        A cursor is an offset into the log, or `old:` and one into what was moved aside when it grew too long. Who
        stands beyond the log's end has read what is aside by now, up to there.
        """
        path = self.log(job_id, attempt, rank)
        aside = path.with_name(path.name + ".1")
        if not path.exists():
            raise NotFound(
                f"Attempt {attempt} of {job_id} has no log of rank {rank}.", hint="It may not have started yet."
            )
        old, _, text = cursor.rpartition(":")
        if old not in ("", "old") or not ((text.isdecimal() and text.isascii() and len(text) < 16) or not cursor):
            raise BadInput(f"cursor: {cursor[:40]!r} is not a `next` of an earlier part.", param="cursor")
        if not cursor:
            old, offset = ("old" if aside.exists() else ""), 0
        else:
            offset = int(text)
        if not old and offset > path.stat().st_size:
            old = "old"
        if old:
            data = _piece(aside, offset)
            if data:
                return LogPage(data, f"old:{offset + len(data)}")
            offset = 0
        data = _piece(path, offset)
        return LogPage(data, str(offset + len(data)))

    def artifacts(self, job_id: str) -> list[Artifact]:
        """What a job has made for its owner, by path; links are not followed, and not listed."""
        found: list[Artifact] = []
        root = self.artifacts_of(job_id)
        for path in _files(root):
            status = path.lstat()
            found.append(Artifact(str(path.relative_to(root)), status.st_size, status.st_mtime))
            if len(found) >= MAX_LISTED:
                break
        return sorted(found, key=lambda each: each.path)

    def open_artifact(self, job_id: str, path: str) -> int:
        """Open an artefact for reading; gives its file descriptor.

        Raises NotFound, also for what lies elsewhere.

        Each part of the path is opened below the one before and never through a link, so that no name leads out of
        the directory, whatever a job puts there.
        """
        missing = NotFound(
            f"There is no artefact {path[:200]!r}.",
            hint="List the artefacts of the job to see their paths.",
            param="path",
        )
        parts = path.split("/")
        if not path.isprintable() or any(part in ("", ".", "..") for part in parts):
            raise missing
        fd = -1
        try:
            root = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self.artifacts_of(job_id), root)
            for part in parts:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                below = os.open(part, flags, dir_fd=fd)
                os.close(fd)
                fd = below
            status = os.fstat(fd)
            # A job's user can link to files that it may not read, where the kernel does not forbid that.
            linked = status.st_nlink > 1 and self.user is not None
            foreign = linked and status.st_uid != pwd.getpwnam(self.user or "").pw_uid
            if foreign or not stat.S_ISREG(status.st_mode):
                raise missing
            return fd
        except (OSError, KeyError, NotFound) as error:
            if fd >= 0:
                os.close(fd)
            raise missing from error

    def remove(self, job_id: str) -> None:
        """Remove all files of a job."""
        shutil.rmtree(self.directory(job_id), ignore_errors=True)

    def kept(self) -> list[str]:
        """The jobs that have files here."""
        return [entry.name for entry in os.scandir(self.root) if _JOB_ID.fullmatch(entry.name)]


def _piece(path: Path, offset: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, LOG_PIECE, offset)
    finally:
        os.close(fd)


def _files(root: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(root):  # does not follow links
        for name in sorted(names):
            path = Path(directory) / name
            with contextlib.suppress(OSError):
                if stat.S_ISREG(path.lstat().st_mode):
                    yield path


def _begun(pid: int) -> str | None:
    """When a process of this machine began, in its kernel's ticks; None when it does not run."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if words[0] in (b"Z", b"X") else words[19].decode()
