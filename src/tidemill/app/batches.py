"""The batch runner, as the supervisor keeps it.

Started, told what changes, restarted, stopped before the gateways.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from tidemill.app.batch_worker import RunnerCommand, RunnerModel, RunnerReport, RunnerSpec
from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.gateways import file_rules
from tidemill.child_protocol import Child, start_child
from tidemill.gateway.routing.models import ModelSpec
from tidemill.tides.state import BacklogView

_RESTART_AFTER_S = (0.5, 1.0, 2.0, 5.0)
_STEADY_AFTER_S = 60.0
UPSTREAM_PARALLEL = 8
"""Lines at a time at an upstream, when the configuration does not say."""

log = structlog.get_logger()


class BatchProcess:
    """The one batch runner of this platform, started again whenever its process ends."""

    def __init__(
        self,
        config: Config,
        config_dir: Path,
        data: DataDir,
        *,
        gateway_url: str,
        store_url: str,
        token: str,
        specs: Callable[[], list[ModelSpec]],
    ) -> None:
        self._config = config
        self._config_dir = config_dir
        self._data = data
        self._gateway_url = gateway_url
        self._store_url = store_url
        self._token = token
        self._specs = specs
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._waiting: dict[str, int] = {}
        self._allowed: dict[str, int] = {}
        self.backlogs: tuple[BacklogView, ...] = ()
        """The work that is left in batches."""
        self.on_backlog: Callable[[], None] = lambda: None
        """Called when batches have come or are done."""

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None and self._child.alive else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_alive())

    def announce_models(self) -> None:
        self._tell(RunnerCommand(do="models", models=self._models()))

    def note_load(self, active: Mapping[str, int], queued: Mapping[str, int]) -> None:
        """Requests in flight at all gateways, by model, and interactive ones that are queued there.

        Those in flight that an engine has no slot for wait, too; they are not of batches, which get half at most.
        """
        waiting = {}
        for spec in self._specs():
            count = queued.get(spec.name, 0)
            if spec.slots is not None:
                slots = spec.slots * sum(replica.ready for replica in spec.replicas if not replica.batch_only)
                count += max(active.get(spec.name, 0) - slots, 0)
            if count:
                waiting[spec.name] = count
        if waiting != self._waiting:
            self._waiting = waiting
            self._tell(RunnerCommand(do="load", waiting=waiting))

    def allow(self, slots: Mapping[str, int]) -> None:
        """How many lines may be in flight at a time, for the models that the tide decides on."""
        if slots != self._allowed:
            self._allowed = dict(slots)
            self._tell(RunnerCommand(do="slots", slots=self._allowed))

    async def stop(self, grace_s: float) -> None:
        """Begin no more lines, let those in flight end for `grace_s` seconds. While the gateways still run."""
        self._stopping = True
        self._tell(RunnerCommand(do="stop", grace_s=grace_s))
        if self._child is not None:
            try:
                async with asyncio.timeout(grace_s + 10.0):
                    await self._child.wait()
            except TimeoutError:
                log.error("the batch runner does not stop; it is killed")
                self._child.kill()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_alive(self) -> None:
        failures = 0
        loop = asyncio.get_running_loop()
        while not self._stopping:
            began = loop.time()
            try:
                code = await self._run_once()
            except OSError as error:  # no process or no log file to be had, for now
                code = error.errno or 1
            if self._stopping:
                return
            failures = 0 if loop.time() - began > _STEADY_AFTER_S else failures
            wait = _RESTART_AFTER_S[min(failures, len(_RESTART_AFTER_S) - 1)]
            failures += 1
            log.error("the batch runner has died; it is started again", code=code, restart_in_s=wait)
            await asyncio.sleep(wait)

    async def _run_once(self) -> int:
        child = await start_child("batches", "tidemill.app.batch_worker", [], self._data.log_file("batches"))
        self._child = child
        if self._stopping:  # meanwhile; `stop` has spoken to the one before
            await child.end()
            return 0
        spec = RunnerSpec(
            store_url=self._store_url,
            files=file_rules(self._config, self._config_dir, self._data),
            max_lines=self._config.batch.max_lines,
            max_line_bytes=self._config.gateway.max_body_mib * 2**20,
            gateway_url=self._gateway_url,
            token=self._token,
            models=self._models(),
        )
        child.tell(spec)
        self._tell(RunnerCommand(do="load", waiting=self._waiting))
        self._tell(RunnerCommand(do="slots", slots=self._allowed))
        async for report in child.reports(RunnerReport):
            self._hear(report)
        return await child.wait()

    def _hear(self, report: RunnerReport) -> None:
        models = [backlog.model for backlog in self.backlogs]
        self.backlogs = report.backlogs
        if models != [backlog.model for backlog in self.backlogs]:
            self.on_backlog()

    def _models(self) -> list[RunnerModel]:
        found = []
        for spec in self._specs():
            config = self._config.models[spec.name]
            parallel = config.batch_parallel
            if parallel is None:
                slots = None if spec.slots is None else max(spec.slots // 2, 1) * len(spec.replicas)
                parallel = UPSTREAM_PARALLEL if slots is None else slots
            found.append(RunnerModel(spec.name, spec.aliases, parallel))
        return found

    def _tell(self, command: RunnerCommand) -> None:
        if self._child is not None:
            self._child.tell(command)
