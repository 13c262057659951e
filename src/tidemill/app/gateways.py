"""The gateway processes, as the supervisor keeps them: started, told what changes, restarted, drained."""

import asyncio
import itertools
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.jobs import tenant_rules
from tidemill.app.worker import GatewayCommand, GatewayReport, WorkerSpec
from tidemill.child_protocol import Child, start_child
from tidemill.errors import Conflict, Unavailable
from tidemill.gateway.endpoints.batches import BatchRules
from tidemill.gateway.endpoints.files import FileRules
from tidemill.gateway.metrics import MetricsSnapshot, ProcessGauges
from tidemill.gateway.protocols.responses.store import ResponseStoreRules
from tidemill.gateway.routing.demand import DemandReport
from tidemill.gateway.routing.models import ModelSpec
from tidemill.gateway.routing.shared_state import create_board

ANNOUNCE_WITHIN_S = 2.0
"""How long a change waits for the gateways to take it over; one that is busy takes it over a second later anyway."""
RESTART_AFTER_S = 0.5
FIRST_STARTS = 3
"""A gateway process that has never listened is given up after so many attempts."""

log = structlog.get_logger()


class GatewayProcess:
    """One gateway worker, started again whenever its process ends."""

    def __init__(self, index: int, owner: "Gateways") -> None:
        self.index = index
        self.listening = False
        self.load = GatewayReport(say="load")
        """Its requests in flight and those that wait."""
        self.figures = MetricsSnapshot()
        """What its present process has counted."""
        self.gauges = ProcessGauges()
        self.worker_id = ""
        self.restarts = 0
        self.all_finished = True
        self._owner = owner
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self.first_start: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.alive else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_alive())
        self._task.add_done_callback(self._given_up)

    def _given_up(self, task: asyncio.Task[None]) -> None:
        """A fault that nobody has foreseen must not leave the start waiting for ever."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.first_start.done():
            self.first_start.set_exception(error)
        elif error is not None:
            log.error("a gateway process no longer answers", worker=self.index, exc_info=error)

    async def refresh(self, ticket: int) -> None:
        """Have it take over the store's state; returns when it has."""
        if self._child is None or not self.listening:
            return
        done = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        self.tell(GatewayCommand(do="refresh", ticket=ticket))
        try:
            async with asyncio.timeout(ANNOUNCE_WITHIN_S):
                await done
        except TimeoutError:
            log.warning("a gateway process is slow to take over a change", worker=self.index)
        finally:
            self._waiting.pop(ticket, None)

    def tell(self, command: GatewayCommand) -> None:
        if self._child is not None:
            self._child.tell(command)

    async def stop(self, grace_s: float) -> None:
        """Let its open requests finish for `grace_s` seconds, then end it."""
        self._owner.stopping = True
        self.tell(GatewayCommand(do="stop", grace_s=grace_s))
        if self._child is not None:
            try:
                async with asyncio.timeout(grace_s + 10.0):
                    await self._child.wait()
            except TimeoutError:
                log.error("a gateway process does not stop; it is killed", worker=self.index)
                self._child.kill()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_alive(self) -> None:
        starts = 0
        while not self._owner.stopping:
            starts += 1
            self.restarts = starts - 1
            try:
                code = await self._run_once()
            except OSError as error:  # no process or no log file to be had, for now
                code = error.errno or 1
            self.listening = False
            self.load = GatewayReport(say="load")
            self._owner.heard(self.index, None)
            self._owner.past.add(self.figures)
            self.figures, self.gauges = MetricsSnapshot(), ProcessGauges()
            self._owner.add_up_load()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result(None)
            self._owner.ended()
            if self._owner.stopping:
                return
            if starts >= FIRST_STARTS and not self.first_start.done():
                logs = self._owner.data.path / "logs"
                self.first_start.set_exception(
                    Unavailable(
                        f"The gateway did not start (exit code {code}).", hint=f"See {logs}/gateway-{self.index}.log."
                    )
                )
                return
            log.error("a gateway process has died; it is started again", worker=self.index, code=code)
            await asyncio.sleep(RESTART_AFTER_S)

    async def _run_once(self) -> int:
        spec = self._owner.worker_spec(self.index)
        self.worker_id = spec.worker_id
        name = f"gateway-{self.index}"
        child = await start_child(
            name, "tidemill.app.worker", [], self._owner.data.log_file(name), env=self._owner.environment
        )
        self._child = child
        if self._owner.stopping:  # meanwhile; `stop` has spoken to the one before
            await child.end()
            return 0
        child.tell(spec)
        async for report in child.reports(GatewayReport):
            self._hear(report)
        return await child.wait()

    def _hear(self, report: GatewayReport) -> None:
        match report.say:
            case "listening":
                self.listening = True
                self.tell(GatewayCommand(do="models", models=self._owner.specs()))
                if not self.first_start.done():
                    self.first_start.set_result(None)
            case "failed":
                if not self.first_start.done():
                    self.first_start.set_exception(
                        Conflict(
                            f"Cannot listen on port {self._owner.port}: {report.message}.",
                            hint="Stop the program that uses it, or choose another port with --port.",
                        )
                    )
            case "refreshed":
                waiting = self._waiting.get(report.ticket)
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)
            case "stopped":
                self.all_finished = report.all_finished
            case "figures":
                self.figures = report.figures or MetricsSnapshot()
                self.gauges = report.gauges or ProcessGauges()
            case "load":
                self.load = report
                self._owner.heard(self.index, report.load)
                self._owner.add_up_load()


class Gateways:
    """All gateway processes of this platform."""

    def __init__(
        self,
        config: Config,
        config_dir: Path,
        data: DataDir,
        *,
        port: int,
        workers: int,
        store_url: str,
        internal_token: str,
        specs: Callable[[], list[ModelSpec]],
        ended: Callable[[], None],
        load_changed: Callable[[Mapping[str, int], Mapping[str, int]], None],
    ) -> None:
        self.data = data
        self.port = port
        self.specs = specs
        self.ended = ended
        self._load_changed = load_changed
        self.heard: Callable[[int, DemandReport | None], None] = lambda process, load: None
        """Called with the report of a gateway process to the tide; None: the process has died."""
        self._internal_token = internal_token
        self.stopping = False
        self.past = MetricsSnapshot()
        """What processes that have ended had counted."""
        self._config = config
        self._config_dir = config_dir
        self._store_url = store_url
        self._tickets = itertools.count(1)
        self._board: Path | None = None
        # The gateways look prompts up by Python's hash, and tell each other what they found
        # (gateway.routing.shared_state).
        self.environment = {"PYTHONHASHSEED": str(1 + secrets.randbelow(2**32 - 1))}
        self.processes = [GatewayProcess(index, self) for index in range(workers)]

    def worker_spec(self, index: int) -> WorkerSpec:
        """What a gateway process is told at its start.

        Each process has an id and a meter directory of its own.
        """
        gateway = self._config.gateway
        return WorkerSpec(
            worker_id=f"gw{index}-{secrets.token_hex(6)}",
            index=index,
            workers=len(self.processes),
            zone=self._config.timezone,
            trusted_proxies=gateway.trusted_proxies,
            meter_dir=str(self.data.meter.resolve()),
            store_url=self._store_url,
            host=self._config.host,
            port=self.port,
            reuse_port=len(self.processes) > 1,
            max_body_bytes=gateway.max_body_mib * 1024 * 1024,
            max_connections=gateway.max_connections,
            write_timeout_s=gateway.write_timeout_seconds,
            models=self.specs(),
            files=file_rules(self._config, self._config_dir, self.data),
            batch=BatchRules(tenant_open=self._config.batch.tenant_open),
            jobs=tenant_rules(self._config, self._config_dir, self.data),
            internal_token=self._internal_token,
            board=str(self._board) if self._board is not None else None,
            charge_header=gateway.charge_header,
            responses=ResponseStoreRules(
                keep_s=round(self._config.responses.keep_days * 86_400),
                by_default=self._config.responses.store_default,
            ),
        )

    async def start(self) -> None:
        """Start all; returns when they listen. Raises Conflict when the port is taken."""
        if len(self.processes) > 1:
            path = self.data.path.resolve() / "board"
            try:
                create_board(path, len(self.processes))
                self._board = path
            except OSError as error:
                log.warning("the gateways do not share what they know of replicas", reason=error.strerror)
        for process in self.processes:
            process.start()
        await asyncio.gather(*(process.first_start for process in self.processes))

    def announce_models(self) -> None:
        command = GatewayCommand(do="models", models=self.specs())
        for process in self.processes:
            if process.listening:
                process.tell(command)

    def add_up_load(self) -> None:
        active: Counter[str] = Counter()
        waiting: Counter[str] = Counter()
        for process in self.processes:
            active.update(process.load.active)
            waiting.update(process.load.waiting)
        self._load_changed(active, waiting)

    def figures(self) -> MetricsSnapshot:
        """What all of them have counted in all their lives."""
        total = MetricsSnapshot()
        total.add(self.past)
        for process in self.processes:
            total.add(process.figures)
        return total

    async def refresh(self) -> None:
        ticket = next(self._tickets)
        await asyncio.gather(*(process.refresh(ticket) for process in self.processes))

    async def stop(self, grace_s: float) -> bool:
        """Drain and end all; True when every open request finished."""
        self.stopping = True
        await asyncio.gather(*(process.stop(grace_s) for process in self.processes))
        return all(process.all_finished for process in self.processes)


def file_rules(config: Config, config_dir: Path, data: DataDir) -> FileRules:
    """The limits of files, for the processes that keep them."""
    files = config.files
    directory = data.path / "files" if files.path is None else config_dir / Path(files.path).expanduser()
    return FileRules(
        directory=str(directory.resolve()),
        max_file_bytes=files.max_file_mib * 2**20,
        tenant_bytes=files.tenant_mib * 2**20,
        tenant_files=files.tenant_files,
        keep_s=int(files.keep_days * 86_400),
        reserve_bytes=files.reserve_mib * 2**20,
    )
