"""What an earlier process of the platform has left of a job.

How its attempt ended, and for how long it had run.

After a kill of the platform alone, the shims see to the end of their commands within the jobs' grace and write it down.
After a kill of everything, or the loss of the machine, nobody has: then the attempt counts up to its last reading.
"""

import asyncio
import time
from datetime import timedelta
from pathlib import Path

import msgspec
import structlog

from tidemill.fleet.backend import ProcessEnd
from tidemill.store.device_meters import open_meters
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_transitions import put_back
from tidemill.store.jobs import Attempt, Job, list_attempts
from tidemill.work.jobs.attempt_store import SLACK_S, AttemptStore
from tidemill.work.jobs.launch import RunEnd, StopCause
from tidemill.work.store_threads import StoreThreads

WITHOUT_PROCESS_S = 3.0
"""How long an end is waited for when no process of the attempt is alive any more."""

KILLED = "the platform was killed"

log = structlog.get_logger()
_MICROSECOND = timedelta(microseconds=1)


class JobRecovery:
    """One unfinished job that was found with devices."""

    def __init__(self, store: Store, files: JobFiles, ledger: AttemptStore, job: Job) -> None:
        self._store = store
        self._files = files
        self._ledger = ledger
        self._job = job
        self._attempt: Attempt | None = None
        self._billed_us = 0
        self._metered = True

    def attempt(self) -> Attempt | None:
        """The attempt that was cut off. Blocking."""
        with self._store.read() as connection:
            last = [each for each in list_attempts(connection, self._job.job_id) if each.ended_at is None]
            if not last:
                return None
            self._attempt = last[-1]
            meters = open_meters(connection, job_id=self._job.job_id, attempt=self._attempt.attempt)
        began = self._attempt.started_at or self._attempt.taken_at
        self._metered = bool(meters)
        self._billed_us = max(((meter.billed_until - began) // _MICROSECOND for meter in meters), default=0)
        return self._attempt

    async def wait(self, threads: StoreThreads) -> RunEnd | None:
        """How the attempt ended, once it has; None when there was none."""
        attempt = self._attempt
        if attempt is None:
            return None
        give_up = time.monotonic() + self._job.spec.grace_s + SLACK_S
        alone_since: float | None = None
        while True:
            ends, alive = await threads.do(self._look, attempt)
            if all(end is not None for end in ends):
                break
            now = time.monotonic()
            alone_since = None if alive else (now if alone_since is None else alone_since)
            if now > give_up or (alone_since is not None and now - alone_since > WITHOUT_PROCESS_S):
                break
            await asyncio.sleep(0.2)
        found = [end for end in ends if end is not None]
        return self._end(attempt, found, whole=len(found) == len(ends))

    def put_back(self) -> None:
        """It had not begun: it waits again. Blocking."""
        with self._store.write() as connection:
            put_back(connection, self._job.job_id)

    def _look(self, attempt: Attempt) -> tuple[list[ProcessEnd | None], bool]:
        job_id = self._job.job_id
        ends = [read_end(self._files.end_file(job_id, attempt.attempt, rank)) for rank in range(attempt.ranks)]
        return ends, self._files.any_alive(job_id, attempt.attempt)

    def _end(self, attempt: Attempt, ends: list[ProcessEnd], *, whole: bool) -> RunEnd:
        failed = [end for end in ends if end.code != 0]
        by_itself = whole and all(end.why == "exited" for end in ends)
        graceful = whole and all(end.why in ("exited", "stopped") for end in ends)
        return RunEnd(
            elapsed_us=self._elapsed_us(attempt, ends),
            exit_code=(failed or ends)[0].code if whole else None,
            by_itself=by_itself,
            lost="" if graceful else KILLED,
            cause=StopCause.STOP if graceful and not by_itself else None,
        )

    def _elapsed_us(self, attempt: Attempt, ends: list[ProcessEnd]) -> int:
        """For how long it ran: as its end says, within what can be believed.

        It ran at least until its last reading. After that the platform lived for at most another tick, and the job for
        its grace: a clock that jumped meanwhile may say what it will. On a reservation, no money depends on it.
        """
        began = attempt.started_at
        if began is None:
            return 0
        latest_us = self._billed_us + round(self._ledger.hold_s(self._job) * 1e6)
        said_us = max((round((end.at - began.timestamp()) * 1e6) for end in ends), default=self._billed_us)
        return min(max(said_us, self._billed_us), latest_us) if self._metered else max(said_us, 0)


def read_end(path: Path) -> ProcessEnd | None:
    """How a process ended, if its shim has written it down."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ProcessEnd)
    except (OSError, msgspec.DecodeError):
        return None
