"""The supervisor: `tidemill up`.

It starts the parts in order, keeps them alive, and stops them in order.
"""

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.metrics_core import Metric

from tidemill import __version__
from tidemill.app.batches import BatchProcess
from tidemill.app.bootstrap import FirstTenant, prepare_store
from tidemill.app.config.schema.platform import Config
from tidemill.app.control_server import ControlServer
from tidemill.app.datadir import DataDir, Runtime
from tidemill.app.fleet import Fleet
from tidemill.app.gateways import Gateways
from tidemill.app.jobs import job_controller, job_files, job_limits
from tidemill.app.meter_service import MeterService
from tidemill.app.metrics import BatchBacklog, PlatformMetrics, families, read_backlog
from tidemill.app.platform_state import PlatformState, ServedModelState, model_states, reachable
from tidemill.app.rolls import PlatformRolls
from tidemill.app.tide import Tide
from tidemill.errors import TidemillError, Unavailable
from tidemill.fleet.history import DemandHistory
from tidemill.fleet.roll import RollState
from tidemill.fleet.status import FleetStatus
from tidemill.meter.reconcile import ReconcileReport
from tidemill.store.engine import Store, open_store, store_url
from tidemill.store.job_files import JobFiles
from tidemill.store.job_submission import JobLimits
from tidemill.store.keys import digest_of
from tidemill.tides.state import Phase

METRICS_PATIENCE_S = 2.0
"""How long a page of metrics waits for the store."""

log = structlog.get_logger()

ControlApp = Callable[["Supervisor", str], Any]
"""Makes the control plane's ASGI application from the platform and the SHA-256 of the admin token."""
Progress = Callable[[str], None]


class Supervisor:
    """The running platform; what the control plane knows as `control.platform.Platform`."""

    def __init__(
        self,
        config: Config,
        *,
        config_dir: Path,
        data_dir: Path,
        port: int,
        control_port: int,
        workers: int,
        control_app: ControlApp,
        progress: Progress,
    ) -> None:
        self.config = config
        self.data = DataDir(data_dir)
        self.port = port
        self.control_port = control_port
        self._config_dir = config_dir
        self._workers = workers
        self._control_app = control_app
        self._progress = progress
        self._store: Store | None = None
        self._stop = asyncio.Event()
        self._state = "starting"
        self._started_at = datetime.now(UTC)
        self._internal_token = secrets.token_urlsafe(32)
        """See `gateway.auth.internal_token`: made anew at each start, stored nowhere."""
        self.first_tenant: FirstTenant | None = None

    # What the control plane asks for

    @property
    def store(self) -> Store:
        if self._store is None:
            raise Unavailable("The platform is starting.")
        return self._store

    @property
    def zone(self) -> str:
        return self.config.timezone

    @property
    def currency(self) -> str:
        return self.config.currency

    @property
    def issuer(self) -> str:
        return self.config.issuer

    @property
    def url(self) -> str:
        return f"http://{reachable(self.config.host)}:{self.port}/v1"

    @property
    def control_url(self) -> str:
        return f"http://{reachable(self.config.control_host)}:{self.control_port}"

    async def drain_usage(self) -> None:
        """All that was settled until now is in the store afterwards, as far as it can be loaded."""
        await self._metering.drain_usage()

    async def reconcile(self) -> ReconcileReport:
        """Sample the engines' counters now and compare them with all records."""
        return await self._metering.reconcile()

    async def announce(self) -> None:
        """The gateways have loaded what the store holds now."""
        await self._gateways.refresh()

    def models(self) -> list[ServedModelState]:
        return model_states(self._fleet.specs(), self.config.models)

    def status(self) -> PlatformState:
        processes = self._gateways.processes
        return PlatformState(
            version=__version__,
            state=self._state,
            started_at=self._started_at,
            gateway_url=self.url,
            workers_ready=sum(process.listening for process in processes),
            workers_total=len(processes),
        )

    @property
    def job_limits(self) -> JobLimits:
        return job_limits(self.config, self._job_files)

    @property
    def job_files(self) -> JobFiles:
        return self._job_files

    def wake_jobs(self) -> None:
        """Jobs, queues or reservations have changed in the store."""
        self.jobs.wake()

    def roll(self, model: str, path: str, version: str) -> RollState:
        """See `control.platform`."""
        return self._rolling.begin(model, path, version)

    def rolls(self) -> list[RollState]:
        return self._rolling.states()

    def fleet(self) -> FleetStatus:
        return self._tide.status()

    async def drain(self, name: str, why: str) -> None:
        await self._tide.drain(name, why)

    async def undrain(self, name: str) -> None:
        await self._tide.undrain(name)

    @property
    def metrics_open(self) -> bool:
        return self.config.metrics.open

    async def metrics(self) -> list[Metric]:
        """The figures of `/metrics`, as of now. Those that only the store has are left out while it is away."""
        try:
            async with asyncio.timeout(METRICS_PATIENCE_S):
                backlog = await asyncio.to_thread(self._read_backlog)
        except (TidemillError, TimeoutError):
            backlog = None
        processes = self._gateways.processes
        loader = self._metering.loader
        return list(
            families(
                PlatformMetrics(
                    figures=self._gateways.figures(),
                    gauges=[process.gauges for process in processes],
                    gateways_ready=sum(process.listening for process in processes),
                    gateway_restarts=sum(process.restarts for process in processes),
                    specs=self._fleet.specs(),
                    engine_restarts={name: max(engine.starts - 1, 0) for name, engine in self._fleet.local.items()},
                    stored=loader.stored,
                    recovered=loader.recovered,
                    waiting=sum(
                        max(process.figures.records - loader.read.get(process.worker_id, 0), 0) for process in processes
                    ),
                    lag_s=max(time.monotonic() - loader.complete_at, 0.0),
                    started_at=self._started_at.timestamp(),
                    backlog=backlog,
                )
            )
        )

    def _read_backlog(self) -> BatchBacklog:
        with self.store.read() as connection:
            return read_backlog(connection)

    # Start, stop

    async def run(self, ready: Callable[["Supervisor"], None]) -> bool:
        """Start everything, call `ready`, run until a signal, stop in order.

        True when all open requests finished.

        Raises TidemillError when it cannot start; then nothing is left running.
        """
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, self._on_signal)
        self.data.open()
        finished = True
        try:
            await self._start()
            if not self._stop.is_set():
                ready(self)
                await self._stop.wait()
        finally:
            finished = await self._shut_down()
        return finished

    def _on_signal(self) -> None:
        self._stop.set()

    async def _start(self) -> None:
        self._progress("opening the store")
        url = store_url(self.config.store.url, self.data.path.resolve())
        store = open_store(url)
        self._store = store
        self.data.note_store(url)
        self.first_tenant = await asyncio.to_thread(
            prepare_store, store, self.config, lambda key: self.data.write("first-key", key + "\n")
        )
        self._metering = MeterService(store, self.data, zone=self.config.timezone, progress=self._progress)
        await self._metering.recover()
        if store.is_sqlite:
            await asyncio.to_thread(self._metering.loader.release_strays)
        self._fleet = Fleet(self.config, self._config_dir, self.data, self._models_changed)
        self._metering.watch(self._fleet)
        self._rolling = PlatformRolls(self.config, self.data, self._fleet.replicas)
        self._rolling.restore()
        self._job_files = await asyncio.to_thread(job_files, self.config, self._config_dir, self.data)
        self.jobs = job_controller(self.config, store, self._fleet.backend, self._job_files)
        self.jobs.shared = self._fleet.replicas.shared
        self._fleet.replicas.held_elsewhere = lambda: {device for job in self.jobs.views() for device in job.on}
        self._gateways = Gateways(
            self.config,
            self._config_dir,
            self.data,
            port=self.port,
            workers=self._workers,
            store_url=url.render_as_string(hide_password=False),
            internal_token=self._internal_token,
            specs=self._fleet.specs,
            ended=self._gateway_ended,
            load_changed=self._load_changed,
        )
        self._batches = BatchProcess(
            self.config,
            self._config_dir,
            self.data,
            gateway_url=self.url.removesuffix("/v1"),
            store_url=url.render_as_string(hide_password=False),
            token=self._internal_token,
            specs=self._fleet.specs,
        )
        self._tide = Tide(
            self.config,
            self._fleet,
            self._batches,
            self.jobs,
            store,
            history=DemandHistory(store),
            rolling=lambda: {state.model for state in self.rolls() if state.under_way},
        )
        await self._tide.open()
        self._progress("starting the engines and the gateway")
        await self._fleet.start()
        await self.jobs.open()
        app = self._control_app(self, digest_of(self.data.admin_token()))
        self._control = ControlServer(app, self.config.control_host, self.control_port)
        await self._control.start()
        self._gateways.heard = self._tide.note_load
        await self._gateways.start()
        self._tide.start()
        self.data.announce(Runtime(pid=os.getpid(), url=self.url, control_url=self.control_url))
        self._metering.start()
        await self._await_engines()
        self._batches.start()
        self._state = "ready"

    async def _await_engines(self) -> None:
        """Wait for the engines of our own; one that cannot start does not hold up the others for ever."""
        said = ""
        while not self._stop.is_set():
            starting = (Phase.STARTING, Phase.WARMING)
            waiting = [engine for engine in self._fleet.local.values() if engine.phase in starting]
            if not waiting:
                return
            if all(engine.stuck for engine in waiting):
                names = ", ".join(engine.name for engine in waiting)
                self._progress(f"these engines do not start, see {self.data.path / 'logs'}: {names}")
                return
            text = "loading " + ", ".join(dict.fromkeys(engine.name.rpartition("/")[0] for engine in waiting))
            if text != said:
                self._progress(text)
                said = text
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._stop.wait()

    async def _shut_down(self) -> bool:
        finished = True
        if hasattr(self, "_gateways"):
            if self._state == "ready":
                self._progress("stopping: open requests may finish (Ctrl-C again cuts them off)")
            self._state = "draining"
            self._stop.clear()
            await self._rolling.close()
            if hasattr(self, "_tide"):
                await self._tide.stop()
            grace = self.config.gateway.drain_seconds
            stopping = asyncio.create_task(self._stop_serving(grace))
            impatient = asyncio.create_task(self._stop.wait())
            await asyncio.wait([stopping, impatient], return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                await self._stop_serving(0.0)
            impatient.cancel()
            finished = await stopping
        if hasattr(self, "_metering"):
            await self._metering.stop()
        if hasattr(self, "_fleet"):
            with suppress(TidemillError):
                await self._metering.sample()
            await self._fleet.stop()
        if hasattr(self, "_control"):
            await self._control.stop()
        if hasattr(self, "_metering"):
            await self._metering.close()
        if self._store is not None:
            self._store.close()
        self.data.close()
        return finished

    async def _stop_serving(self, grace_s: float) -> bool:
        """Without grace, jobs are ended at once too; with it they get their own."""
        if grace_s == 0:
            self.jobs.abort()
        finished, _, _ = await asyncio.gather(
            self._gateways.stop(grace_s), self._batches.stop(grace_s), self.jobs.close(self.config.jobs.stop_seconds)
        )
        return finished

    def _models_changed(self) -> None:
        if hasattr(self, "_gateways"):
            self._gateways.announce_models()
            self._batches.announce_models()

    def _load_changed(self, active: Mapping[str, int], waiting: Mapping[str, int]) -> None:
        self._batches.note_load(active, waiting)
        self._tide.note_waiting(waiting)

    def _gateway_ended(self) -> None:
        """Nothing to do at once: the loader finds the directory of the dead process unlocked and finishes it."""
