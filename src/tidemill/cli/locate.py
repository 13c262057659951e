"""Finds the running platform by the lock and the addresses in its data directory."""

import fcntl
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tidemill.cli.client import AdminClient, Json
from tidemill.cli.output import complain
from tidemill.cli.target import Target
from tidemill.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from tidemill.cli.offline import OfflinePlatform

# As app.datadir lays them out.
LOCK_FILE = "lock"
METER_DIRECTORY = "meter"
RUNTIME_FILE = "runtime.json"
TOKEN_FILE = "admin-token"
TOKEN_VARIABLE = "TIDEMILL_ADMIN_TOKEN"


class PlatformSource(Protocol):
    """What can be read of a platform, whether it runs or not."""

    def tenants(self) -> Json: ...
    def keys(self, tenant: str | None) -> Json: ...
    def usage(self, tenant: str, month: str | None, *, records: bool) -> Json: ...
    def invoice(self, tenant: str, month: str | None) -> Json: ...
    def invoice_text(self, tenant: str, month: str | None) -> str: ...
    def check_ledger(self) -> Json: ...
    def models(self) -> Json: ...
    def batches(self, tenant: str | None, *, unfinished: bool, limit: int) -> Json: ...
    def batch(self, batch: str) -> Json: ...
    def jobs(self, tenant: str | None, *, state: str | None, unfinished: bool, limit: int) -> Json: ...
    def job(self, job: str) -> Json: ...
    def queues(self) -> Json: ...
    def reservations(self, tenant: str | None, *, over: bool) -> Json: ...


def running(target: Target) -> AdminClient:
    """The running platform, for a command that changes something. Raises Unavailable when it does not run."""
    url = target.remote()
    directory = target.directory()
    if url is None and not is_running(directory):
        raise Unavailable(
            f"The platform on {directory} is not running; this command needs it.",
            hint=f"Start it: tidemill up --data {directory}",
        )
    return AdminClient(url or _control_url(directory), admin_token(target))


def source(target: Target) -> "AdminClient | OfflinePlatform":
    """The platform if it runs, else its data, for a command that only reads."""
    if target.remote() is not None or is_running(target.directory()):
        return running(target)
    from tidemill.cli.offline import OfflinePlatform

    directory = target.directory()
    complain(f"the platform on {directory} is stopped; this is what its data says.", kind="note")
    if unloaded(directory):
        complain("it was killed: usage of its last moments is missing until it has been started again.", kind="note")
    return OfflinePlatform(directory)


def unloaded(directory: Path) -> bool:
    """Whether a gateway process has left a usage log behind, which the next start loads."""
    meter = directory / METER_DIRECTORY
    return meter.is_dir() and any(path.is_dir() for path in meter.iterdir())


def is_running(directory: Path) -> bool:
    """Whether a supervisor holds the directory's lock. Raises Unavailable when there is no such directory."""
    if not directory.is_dir():
        hint = "Has `tidemill up` run? Give its data directory with --data."
        raise Unavailable(f"There is no data directory {directory}.", hint=hint)
    try:
        fd = os.open(directory / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unavailable(f"{directory / LOCK_FILE} cannot be opened: {error.strerror}.") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def data_plane_url(target: Target, url: str | None) -> str:
    """Where tenants send requests: `url`, else that of the platform that runs here.

    Raises Unavailable, BadInput.
    """
    if url is not None:
        return url
    if target.remote() is not None:
        raise BadInput("The address of the data plane is not known.", hint="Give it with --url.")
    directory = target.directory()
    if not is_running(directory):
        raise Unavailable(f"The platform on {directory} is not running; this command needs it.", hint="Or give --url.")
    return _runtime(directory, "url")


def _control_url(directory: Path) -> str:
    return _runtime(directory, "control_url")


def _runtime(directory: Path, key: str) -> str:
    try:
        return str(json.loads((directory / RUNTIME_FILE).read_text())[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(
            f"The platform on {directory} is starting or stopping.", hint="Try again in a moment."
        ) from error


def admin_token(target: Target) -> str:
    """The admin token: TIDEMILL_ADMIN_TOKEN, or the file in the data directory. Raises Unavailable."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token:
        return token
    if target.remote() is not None and target.data is None:
        # The token of the platform here goes to no address elsewhere unless both were named.
        raise Unavailable(f"The admin token of that platform is not known; set {TOKEN_VARIABLE}.")
    path = target.directory() / TOKEN_FILE
    try:
        return path.read_text().strip()
    except OSError as error:
        hint = f"Set {TOKEN_VARIABLE}, or run this as the user who runs the platform."
        raise Unavailable(f"{path} cannot be read: {error.strerror}.", hint=hint) from error
