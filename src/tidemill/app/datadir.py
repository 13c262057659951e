"""The data directory: its lock, its secrets, and what says where the running platform is.

DATA/lock           held by the supervisor while it runs
DATA/runtime.json   where the running platform listens
DATA/tidemill.db    the embedded store
DATA/store-url      where the store is instead, without the password
DATA/meter/         the usage logs of the gateway processes, one directory each
DATA/board          what the gateway processes tell each other of replicas (see gateway.routing.shared_state)
DATA/files/         files of tenants, and batches at work (see store.blobs)
DATA/logs/          what the engines and gateways say
DATA/admin-token    the control plane's token (0600)
DATA/first-key      the first tenant's key (0600)
"""

import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

import msgspec
from sqlalchemy import URL

from tidemill.errors import ConfigError, Conflict
from tidemill.meter.frames import sync_directory

LOG_BYTES = 16 * 1024 * 1024
"""A log file longer than this is begun anew at the next start of its process."""
LOCK_TRIES = 5
STORE_FILE = "store-url"


class Runtime(msgspec.Struct, frozen=True):
    """Where the running platform is: DATA/runtime.json."""

    pid: int
    url: str
    control_url: str


class DataDir:
    """A data directory that this process may use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def meter(self) -> Path:
        return self.path / "meter"

    def open(self) -> None:
        """Make what is missing and take the lock. Raises Conflict when another platform runs on it."""
        os.umask(0o077)  # what this process and its children write is for the operator alone
        try:
            for each in (self.path, self.meter, self.path / "logs"):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"The data directory {self.path} cannot be used: {error.strerror}.") from error
        try:
            self._take_lock()
        except BlockingIOError as error:
            where = self._running_at()
            raise Conflict(
                f"Tidemill is already running on the data directory {self.path}{where}.",
                hint="Stop it first, or use another --data.",
            ) from error
        for unborn in self.path.glob(".gw*.new"):  # gateway processes that were killed in their first moment
            shutil.rmtree(unborn, ignore_errors=True)

    def _take_lock(self) -> None:
        """Lock at once, or after a moment.

        A command that looks whether a platform runs holds the lock briefly.
        """
        assert self._lock is not None
        for _ in range(LOCK_TRIES - 1):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Give the lock back; the platform is stopped."""
        (self.path / "runtime.json").unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def announce(self, runtime: Runtime) -> None:
        """Say where the platform listens."""
        self.write("runtime.json", msgspec.json.format(msgspec.json.encode(runtime)).decode() + "\n")

    def note_store(self, url: URL) -> None:
        """Say where the store is, for who reads the data of a stopped platform.

        Its password is not written down.
        """
        if url.get_backend_name() == "sqlite" and url.database == str(self.path.resolve() / "tidemill.db"):
            (self.path / STORE_FILE).unlink(missing_ok=True)
        else:
            self.write(STORE_FILE, url.set(password=None).render_as_string() + "\n")

    def admin_token(self) -> str:
        """The control plane's token: from TIDEMILL_ADMIN_TOKEN, else made at the first start and kept."""
        given = os.environ.get("TIDEMILL_ADMIN_TOKEN", "").strip()
        if given:
            return given
        path = self.path / "admin-token"
        if not path.exists():
            self.write("admin-token", f"tm-admin-{secrets.token_urlsafe(24)}\n")
        return path.read_text().strip()

    def write(self, name: str, text: str) -> None:
        """Write a file readable by its owner only, whole or not at all."""
        path = self.path / name
        temporary = path.with_name(f".{name}.new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(self.path)

    def log_file(self, name: str) -> int:
        """Open a child's log for appending; gives its file descriptor."""
        path = self.path / "logs" / f"{name.replace('/', '-')}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        if path.exists() and path.stat().st_size > LOG_BYTES:
            flags |= os.O_TRUNC
        return os.open(path, flags, 0o600)

    def _running_at(self) -> str:
        try:
            runtime = msgspec.json.decode((self.path / "runtime.json").read_bytes(), type=Runtime)
        except (OSError, msgspec.DecodeError):
            return ""
        return f" (process {runtime.pid}, {runtime.url})"
