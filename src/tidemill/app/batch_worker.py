"""The batch runner's process, started and spoken to by the supervisor.

Run as `python -m tidemill.app.batch_worker`.

The supervisor writes JSON lines to its standard input: first a `RunnerSpec`, then `RunnerCommand`s. The end of
standard input is the supervisor's death; what is in flight may then end for a moment, and the process goes too.
"""

import asyncio
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import structlog
import uvloop
from sqlalchemy import make_url

from tidemill.app.logs import configure_logs
from tidemill.child_protocol import Commands, finish_within, report
from tidemill.gateway.auth.internal_token import InvalidInternalToken
from tidemill.gateway.endpoints.files import FileRules
from tidemill.http.client import ConnectionPool, EngineAddress, EngineConnection, EngineLost
from tidemill.store.blobs import BlobStore
from tidemill.store.engine import open_store
from tidemill.tides.state import BacklogView
from tidemill.work.batches.attempt import LineAnswer, LineCall, NoAnswer
from tidemill.work.batches.lifecycle import Lifecycle
from tidemill.work.batches.lines import LineRules
from tidemill.work.batches.runner import BatchRunner
from tidemill.work.batches.slack import TideSlack

_ORPHAN_GRACE_S = 4.0
"""How long lines in flight may go on after the supervisor was killed; the gateways live a second longer."""
LINE_TIMEOUT_S = 3600.0
"""How long the data plane may take for a line; its own limits on engines are shorter."""
_MAX_ANSWER_BYTES = 65 * 1024 * 1024
_SWEEP_S = 1.0
_REPORT_S = 0.5
"""How often the supervisor is told of the work that is left, while it changes."""

log = structlog.get_logger()


class RunnerModel(msgspec.Struct, frozen=True):
    """A model, as the runner needs to know it."""

    name: str
    names: tuple[str, ...]
    """All names that it can be asked for by."""
    parallel: int
    """Lines at a time."""


class RunnerSpec(msgspec.Struct, kw_only=True):
    """All that the runner is told when it starts."""

    store_url: str
    files: FileRules
    max_lines: int
    max_line_bytes: int
    gateway_url: str
    """Where the data plane listens, without `/v1`."""
    token: str
    """See `gateway.auth.internal_token`."""
    models: list[RunnerModel]


class RunnerCommand(msgspec.Struct, kw_only=True):
    """What the supervisor says later on."""

    do: Literal["models", "load", "slots", "stop"]
    models: list[RunnerModel] = []
    waiting: dict[str, int] = {}
    """Interactive requests that wait, by model."""
    slots: dict[str, int] = {}
    """Lines that may be in flight at a time, by model, where the tide decides on that (`work.batches.slack.TideSlack`).
    """
    grace_s: float = 0.0


class RunnerReport(msgspec.Struct, kw_only=True):
    """What the runner tells the supervisor."""

    backlogs: tuple[BacklogView, ...]
    """The work that is left."""


class LoopbackSender:
    """The way of a line into the platform's own data plane (`work.batches.attempt.SendLine`)."""

    def __init__(self, url: str, token: str, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = ConnectionPool(EngineAddress(url), loop)
        self._authorization = b"Authorization: Tidemill %b\r\n" % token.encode()

    async def __call__(self, call: LineCall) -> LineAnswer:
        headers = b"%bx-tidemill-tenant: %b\r\nx-tidemill-key: %b\r\nx-tidemill-request: %b\r\n" % (
            self._authorization,
            call.tenant_id.encode(),
            call.key_id.encode(),
            call.request_id.encode(),
        )
        line = _OnTheLine()
        try:
            connection = await self._pool.request(
                call.path.encode(), call.body, LINE_TIMEOUT_S, owner=line, headers=headers
            )
            try:
                body = await connection.body(_MAX_ANSWER_BYTES)
            finally:
                connection.release()
        except EngineLost as lost:
            raise NoAnswer(str(lost), sent=lost.sent) from lost
        except BaseException:
            if line.connection is not None:
                line.connection.abort()
            raise
        if connection.status == 401 and InvalidInternalToken.code.encode() in body:
            raise NoAnswer(
                "The data plane does not know this runner.", sent=False
            )  # one of them is of an earlier start
        return LineAnswer(connection.status, body, _seconds(connection.headers.get(b"retry-after", b"")))

    def sweep(self, now: float) -> None:
        self._pool.sweep(now)


class _OnTheLine:
    """See `http.client.AnswerOwner`."""

    def __init__(self) -> None:
        self.connection: EngineConnection | None = None
        self.given_up = False


def _seconds(text: bytes) -> float:
    return float(text) if text.isdigit() and len(text) < 6 else 0.0


class RunnerModels:
    """What the supervisor has said of the models."""

    def __init__(self, models: list[RunnerModel]) -> None:
        self.slack = TideSlack()
        self.names: dict[str, str] = {}
        self.learn(models)

    def learn(self, models: list[RunnerModel]) -> None:
        self.names = {name: model.name for model in models for name in (*model.names, model.name)}
        self.slack.parallel = {model.name: model.parallel for model in models}


async def work(spec: RunnerSpec, commands: Commands) -> None:
    """Run batches until the supervisor says stop or is gone."""
    loop = asyncio.get_running_loop()
    store = open_store(make_url(spec.store_url))
    blobs = await asyncio.to_thread(BlobStore, Path(spec.files.directory))
    rules = LineRules(max_lines=spec.max_lines, max_line_bytes=spec.max_line_bytes)
    lock = await _locked(Path(spec.files.directory) / "runner.lock")
    known = RunnerModels(spec.models)
    send = LoopbackSender(spec.gateway_url, spec.token, loop)
    lifecycle = Lifecycle(store, blobs, rules, keep_s=spec.files.keep_s)
    runner = BatchRunner(lifecycle, send, known.slack, lambda: known.names)
    stop = asyncio.Event()
    running = asyncio.create_task(runner.run(stop))
    chores = [asyncio.create_task(chore) for chore in (_sweep(send), _tell_backlogs(runner))]
    grace_s = await _obey(commands, known, runner.wake)
    stop.set()
    await running
    await _close(runner, commands, grace_s)
    for chore in chores:
        chore.cancel()
    os.close(lock)


async def _obey(commands: Commands, known: RunnerModels, more: Callable[[], None]) -> float:
    """Carry out the supervisor's commands; returns the grace period when it is time to stop.

    `more`: to be called when more lines may be begun.
    """
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    stopped = asyncio.create_task(stop.wait())
    while True:
        command = await commands.next(RunnerCommand, until=stopped)
        if command is None:
            return _ORPHAN_GRACE_S
        match command.do:
            case "models":
                known.learn(command.models)
            case "load":
                known.slack.waiting = command.waiting
            case "slots":
                known.slack.allowed = command.slots
                more()
            case "stop":
                return command.grace_s


async def _close(runner: BatchRunner, commands: Commands, grace_s: float) -> None:
    """Let lines in flight end for `grace_s` seconds.

    It is less when the supervisor says stop once more or dies.
    """
    closing = asyncio.create_task(runner.close(grace_s))
    await finish_within(closing, commands, RunnerCommand, orphan_grace_s=_ORPHAN_GRACE_S)
    if not closing.done():
        runner.cut_off()
    await closing


async def _locked(path: Path) -> int:
    """Wait until no other runner works on the site, and keep others off."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(0.2)
        else:
            return fd


async def _tell_backlogs(runner: BatchRunner) -> None:
    told: RunnerReport | None = None
    while True:
        backlogs = RunnerReport(backlogs=tuple(runner.backlogs()))
        if backlogs != told:
            told = backlogs
            report(backlogs)
        await asyncio.sleep(_REPORT_S)


async def _sweep(send: LoopbackSender) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        send.sweep(asyncio.get_running_loop().time())


async def _main() -> None:
    commands = await Commands.open()
    spec = await commands.next(RunnerSpec)
    if spec is not None:
        await work(spec, commands)


def main() -> None:
    configure_logs()
    uvloop.run(_main())
    os._exit(0)  # a thread that still waits for a store that does not answer must not keep the process


if __name__ == "__main__":
    main()
