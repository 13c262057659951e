"""One attempt at a job: its processes started, watched, asked to go, and how it ended.

Knows nothing of money or store.

A gang is one: when one of its processes fails or is lost, the others are ended too. A process is one for each node, or
with `per_device` one for each device; ranks count from 0 in the order of the devices.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import msgspec
import structlog

from tidemill.errors import TidemillError
from tidemill.fleet.backend import Backend, Device, Process, ProcessEnd, ProcessSpec
from tidemill.fleet.ranks import by_node, free_port, host_of
from tidemill.store.job_files import JobFiles
from tidemill.store.jobs import Attempt, Job, JobSpec
from tidemill.work.jobs import process as job_exec

EXEC = (sys.executable, "-I", "-S", str(Path(job_exec.__file__)))
GANG_GRACE_S = 5.0
"""What the others of a gang get to end in when one of them has failed."""

log = structlog.get_logger()


class StopCause(StrEnum):
    """Why an attempt is asked to go. A later one of these overrides an earlier one."""

    PREEMPT = "preempt"
    UNPAID = "unpaid"
    STOP = "stop"
    EXPIRE = "expire"
    CANCEL = "cancel"


_ORDER = list(StopCause)


class RunEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt ended."""

    elapsed_us: int
    """How long its processes ran, by the monotonic clock; 0 when they never did."""
    exit_code: int | None
    """Of the first process that failed, else 0; None: nothing ran, or it was lost."""
    by_itself: bool
    """No process was stopped from outside before it ended."""
    lost: str = ""
    """Which process was lost, not by its own doing; empty: none."""
    cannot: str = ""
    """Why it could not be started; empty: it was."""
    cause: StopCause | None = None
    """It was asked to go."""


class RunningAttempt:
    """A running attempt. Belongs to the event loop."""

    def __init__(
        self,
        backend: Backend,
        files: JobFiles,
        job: Job,
        attempt: Attempt,
        devices: Sequence[Device],
        *,
        idle_class: bool = False,
    ) -> None:
        """`idle_class`: it gets only what others leave of its CPU slots."""
        self.job = job
        self.attempt = attempt
        self.devices = tuple(devices)
        self._began_ns = time.monotonic_ns()
        """When its processes ran; before that, when it got its devices."""
        self._ended_ns: int | None = None
        self.cause: StopCause | None = None
        self.why = ""
        self.running = asyncio.Event()
        """Its processes run."""
        self._backend = backend
        self._files = files
        self._idle_class = idle_class
        self._processes: Sequence[Process] = ()
        self._asked = asyncio.Event()
        self._grace_s = job.spec.grace_s

    def elapsed_us(self) -> int:
        """Time since it began, microseconds; it stands still once its processes have ended."""
        until_ns = time.monotonic_ns() if self._ended_ns is None else self._ended_ns
        return (until_ns - self._began_ns) // 1000

    def request_stop(self, cause: StopCause, why: str, *, grace_s: float | None = None) -> bool:
        """Have it checkpoint and go. False when it was asked for as good a reason before."""
        if self.cause is not None and _ORDER.index(cause) <= _ORDER.index(self.cause):
            return False
        self.cause, self.why = cause, why
        if grace_s is not None:
            self._grace_s = min(self._grace_s, grace_s)
        self._asked.set()
        return True

    def kill(self) -> None:
        """End it now."""
        for process in self._processes:
            process.kill()

    async def live(self) -> RunEnd:
        """Start it, wait for its end, see to it when it was asked to go."""
        if self._asked.is_set():
            return self._end(())
        try:
            launches = await self._launches()
            self._processes = await self._backend.start(launches)
        except TidemillError as error:
            return self._end((), cannot=error.message)
        except (OSError, KeyError) as error:
            return self._end((), cannot=f"its directory cannot be created: {error}")
        self._began_ns = time.monotonic_ns()
        self.running.set()
        await asyncio.to_thread(self._note_pids)
        waits = [asyncio.ensure_future(process.wait()) for process in self._processes]
        asked = asyncio.ensure_future(self._asked.wait())
        stopping: list[asyncio.Future[ProcessEnd]] = []
        try:
            while not all(wait.done() for wait in waits):
                watched = [wait for wait in waits if not wait.done()]
                await asyncio.wait(watched if stopping else [*watched, asked], return_when=asyncio.FIRST_COMPLETED)
                if stopping:
                    continue
                if asked.done():
                    grace_s, name = self._grace_s, self.job.spec.signal
                elif self.job.spec.gang and any(_bad(wait.result()) for wait in waits if wait.done()):
                    grace_s, name = GANG_GRACE_S, "TERM"
                else:
                    continue
                stopping = [asyncio.ensure_future(process.stop(grace_s, name)) for process in self._processes]
        finally:
            asked.cancel()
        self._ended_ns = time.monotonic_ns()
        return self._end([wait.result() for wait in waits])

    def _note_pids(self) -> None:
        try:
            self._files.note_pids(self.job.job_id, self.attempt.attempt, [each.pid for each in self._processes])
        except OSError as error:
            log.warning("a job's processes cannot be recorded", job=self.job.job_id, reason=str(error))

    def _end(self, ends: Sequence[ProcessEnd], cannot: str = "") -> RunEnd:
        failed = [end for end in ends if _bad(end)]
        own = [end for end in failed if end.why == "exited"]
        lost = ""
        if failed and not own:
            gone = [end for end in failed if end.code is None or end.why == "killed"]
            if gone and self.cause is None:
                lost = gone[0].why
        codes = [end.code for end in (own or failed or ends)]
        return RunEnd(
            elapsed_us=self.elapsed_us() if ends else 0,
            exit_code=codes[0] if codes else None,
            by_itself=bool(ends) and all(end.why == "exited" for end in ends),
            lost=lost,
            cannot=cannot,
            cause=self.cause,
        )

    async def _launches(self) -> list[ProcessSpec]:
        spec, attempt = self.job.spec, self.attempt
        job_id = self.job.job_id
        await asyncio.to_thread(self._files.prepare, job_id, attempt.attempt)
        groups = ranks_of(self.devices, per_device=spec.per_device)
        nodes = await self._backend.nodes()
        work = self._files.work(job_id)
        common = {
            "TIDEMILL_JOB_ID": job_id,
            "TIDEMILL_JOB_NAME": self.job.name,
            "TIDEMILL_ATTEMPT": str(attempt.attempt),
            "TIDEMILL_CHECKPOINT_DIR": str(self._files.checkpoints(job_id).resolve()),
            "TIDEMILL_ARTIFACT_DIR": str(self._files.artifacts_of(job_id).resolve()),
            "TIDEMILL_WORLD_SIZE": str(len(groups)),
            "MASTER_ADDR": host_of(groups[0][0], nodes),
            "MASTER_PORT": str(free_port()),
            "HOME": str(work.resolve()),
            **{job_exec.GIVEN + name: value for name, value in spec.env.items()},
        }
        launches = []
        on_node: dict[str, int] = {}
        for rank, group in enumerate(groups):
            node = group[0].node
            local_rank = on_node[node] = on_node.get(node, -1) + 1
            env = {
                **common,
                "TIDEMILL_RANK": str(rank),
                "TIDEMILL_LOCAL_RANK": str(local_rank),
                "TIDEMILL_DEVICES": ",".join(device.id for device in group),
            }
            if all(device.kind == "cpu" for device in group):
                env.setdefault("OMP_NUM_THREADS", str(len(group)))
            launches.append(
                ProcessSpec(
                    name=f"{job_id}/{rank}",
                    argv=(*EXEC, _order(spec, self._files.user)),
                    env=env,
                    devices=group,
                    node=node,
                    cwd=Path(spec.workdir) if spec.workdir else work.resolve(),
                    log=self._files.log(job_id, attempt.attempt, rank).resolve(),
                    end_file=self._files.end_file(job_id, attempt.attempt, rank).resolve(),
                    idle_class=self._idle_class,
                    stop_signal=spec.signal,
                    orphan_grace_s=spec.grace_s,
                )
            )
        return launches


def ranks_of(devices: Sequence[Device], *, per_device: bool) -> list[tuple[Device, ...]]:
    """The devices of each process."""
    return [(device,) for device in devices] if per_device else by_node(devices)


def _order(spec: JobSpec, user: str | None) -> str:
    order = {"argv": spec.argv, "user": user}
    text = msgspec.json.encode(order).decode()
    # The backend fills these in; a job's command may have them for its own ends.
    return text.replace("{port}", "\\u007bport}").replace("{host}", "\\u007bhost}")


def _bad(end: ProcessEnd) -> bool:
    return end.code != 0
