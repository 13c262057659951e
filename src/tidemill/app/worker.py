"""A gateway process: `python -m tidemill.app.worker`, started and spoken to by the supervisor.

The supervisor writes JSON lines to its standard input: first a `WorkerSpec`, then `GatewayCommand`s. The end of
standard input is the supervisor's death; the process then lets open requests finish for a moment and goes too.
"""

import asyncio
import contextlib
import fcntl
import gc
import os
import resource
import signal
import struct
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec
import structlog
import uvloop
from sqlalchemy import make_url

from tidemill.app.logs import configure_logs
from tidemill.child_protocol import Commands, finish_within, report
from tidemill.errors import Unavailable
from tidemill.gateway.admission.admission import Admission
from tidemill.gateway.admission.fair_queue import FairQueues
from tidemill.gateway.admission.limit_leases import BEAT_S, LimitLeases
from tidemill.gateway.admission.rate_limits import RateLimits
from tidemill.gateway.auth.authenticator import Authenticator
from tidemill.gateway.auth.internal_token import InternalAuth
from tidemill.gateway.auth.key_policy import networks_of
from tidemill.gateway.endpoints.app import OPERATIONS, GatewayApp, RequestIds
from tidemill.gateway.endpoints.batches import BatchEndpoints, BatchRules
from tidemill.gateway.endpoints.files import FileEndpoints, FileRules, open_blobs
from tidemill.gateway.endpoints.jobs import JobEndpoints, JobRules
from tidemill.gateway.metrics import MetricsSnapshot, ProcessGauges, process_gauges
from tidemill.gateway.protocols.responses.store import ResponseStore, ResponseStoreRules
from tidemill.gateway.proxy.inflight import GatewayMeter
from tidemill.gateway.routing.demand import DemandReport
from tidemill.gateway.routing.models import ModelRoutes, ModelSpec
from tidemill.gateway.routing.shared_state import SharedReplicaState
from tidemill.http.server import HttpServer
from tidemill.meter.balance_leases import BalanceLeases
from tidemill.meter.live import LiveTable
from tidemill.meter.loader import LIVE_FILE, claim_directory
from tidemill.meter.log import UsageLog
from tidemill.store.engine import open_store

SWEEP_S = 0.25
RESERVED_FILES = 128
"""Open files that a gateway process needs for itself: the usage log, the store, files of tenants."""
METRICS_EVERY_S = 1.0
SWEEP_RESPONSES_S = 600.0
REPORT_S = 0.1
"""How often the supervisor is told of the load, while it changes: so often the tide decides on filler."""
ORPHAN_GRACE_S = 5.0
"""How long open requests may go on after the supervisor was killed."""

RESPONSES_GRACE_S = 5.0
"""How long a stop waits for kept responses to be written."""

log = structlog.get_logger()


class WorkerSpec(msgspec.Struct, kw_only=True):
    """All that a gateway process is told when it starts."""

    worker_id: str
    index: int = 0
    workers: int = 1
    """How many gateway processes this platform has, and which of them this is: bounds of models are shared out."""
    zone: str = "UTC"
    """The operator's time zone, which bounds the days of budgets."""
    trusted_proxies: tuple[str, ...] = ()
    meter_dir: str
    store_url: str
    host: str
    port: int
    reuse_port: bool
    max_body_bytes: int
    max_connections: int
    write_timeout_s: float
    models: list[ModelSpec]
    files: FileRules
    batch: BatchRules
    jobs: JobRules | None = None
    internal_token: str
    """See `gateway.auth.internal_token`."""
    board: str | None = None
    """See `gateway.routing.shared_state`."""
    responses: ResponseStoreRules = ResponseStoreRules()
    charge_header: bool = False
    """Answers say what they cost."""


class GatewayCommand(msgspec.Struct, kw_only=True):
    """What the supervisor asks for later on."""

    do: Literal["models", "refresh", "stop"]
    models: list[ModelSpec] = []
    grace_s: float = 0.0
    ticket: int = 0


class GatewayReport(msgspec.Struct, kw_only=True):
    """What the gateway process tells the supervisor."""

    say: Literal["listening", "failed", "refreshed", "stopped", "load", "figures"]
    ticket: int = 0
    message: str = ""
    all_finished: bool = True
    active: dict[str, int] = {}
    """Requests in flight, by model."""
    waiting: dict[str, int] = {}
    """Interactive requests that wait for their turn, or for a replica, by model, where any do."""
    load: DemandReport | None = None
    figures: MetricsSnapshot | None = None
    gauges: ProcessGauges | None = None
    """For `/metrics`, once a second."""


async def serve(spec: WorkerSpec, commands: Commands) -> None:
    """Run the data plane until the supervisor says stop or is gone."""
    loop = asyncio.get_running_loop()
    store = open_store(make_url(spec.store_url))
    executor = ThreadPoolExecutor(2, thread_name_prefix="store")
    directory, _lock = claim_directory(Path(spec.meter_dir), spec.worker_id)
    meter = GatewayMeter(
        UsageLog(directory, loop),
        LiveTable(directory / LIVE_FILE),
        BalanceLeases(store, spec.worker_id, executor),
        tells_charge=spec.charge_header,
    )
    proxies = networks_of(spec.trusted_proxies)
    authenticator = Authenticator(store, executor, InternalAuth(spec.internal_token), proxies=proxies)
    board = SharedReplicaState(Path(spec.board), spec.index, spec.workers) if spec.board is not None else None
    routes = ModelRoutes(loop, board, spec.workers)
    queues = FairQueues(spec.index, spec.workers, time.monotonic)
    for each in (routes, queues):
        each.update(spec.models)
    # With a thread of its own: a request that waits for permits must not wait for something else's transaction.
    limits = RateLimits(
        LimitLeases(store, spec.worker_id, ThreadPoolExecutor(1, thread_name_prefix="limits")), spec.zone
    )
    authenticator.on_news = limits.update
    admission = Admission(meter.leasing, limits, queues)
    clerks = ThreadPoolExecutor(4, thread_name_prefix="files")
    files = FileEndpoints(authenticator, store, await asyncio.to_thread(open_blobs, spec.files), spec.files, clerks)
    batches = BatchEndpoints(authenticator, store, spec.batch, clerks, operations=OPERATIONS)
    jobs = JobEndpoints(authenticator, store, spec.jobs, clerks).routes if spec.jobs is not None else {}
    response_store = ResponseStore(store, spec.responses)
    gateway = GatewayApp(
        authenticator,
        routes,
        meter,
        started_at=int(time.time()),
        admission=admission,
        response_store=response_store if response_store.open else None,
        more={**files.routes, **batches.routes, **jobs},
    )
    server = HttpServer(
        gateway,
        RequestIds(),
        loop=loop,
        max_body_bytes=spec.max_body_bytes,
        write_timeout_s=spec.write_timeout_s,
        streamed=FileEndpoints.streamed,
        lets_in=gateway.lets_in,
        max_connections=min(spec.max_connections, _room_for_connections()),
    )
    await authenticator.renew()
    try:
        await server.listen(spec.host, spec.port, reuse_port=spec.reuse_port)
    except OSError as error:
        report(GatewayReport(say="failed", message=error.strerror or str(error)))
        return
    # What is alive now lives for ever; the collector need not look at it again, and need not look often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    report(GatewayReport(say="listening"))
    stop = asyncio.Event()
    chores = [
        asyncio.create_task(chore)
        for chore in (
            _sweep(routes),
            _report_load(routes, queues),
            _keep_house(authenticator, meter),
            _watch_disk(meter, stop),
            _keep_limit_leases(limits.shares),
            _report_metrics(meter, routes, queues),
            *([_sweep_responses(response_store)] if spec.index == 0 else []),
        )
    ]
    grace_s = await _obey(commands, authenticator, routes, queues, meter, stop)
    finished = await _let_finish(server, commands, grace_s)
    if not finished:
        await server.cut_off()
    for chore in chores:
        chore.cancel()
    await response_store.close(within_s=RESPONSES_GRACE_S)
    await limits.shares.give_back()
    await meter.leasing.return_idle(all_of_it=True)
    meter.log.close()
    report(figures_of(meter, routes, queues))
    report(GatewayReport(say="stopped", all_finished=finished))
    executor.shutdown(wait=False)
    clerks.shutdown(wait=False)


def _room_for_connections() -> int:
    """How many clients the open files that are allowed have room for.

    Each may need one more, toward an engine.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max((files - RESERVED_FILES) // 2, 1)


async def _obey(
    commands: Commands,
    authenticator: Authenticator,
    routes: ModelRoutes,
    queues: FairQueues,
    meter: GatewayMeter,
    stop: asyncio.Event,
) -> float:
    """Carry out the supervisor's commands; returns the grace period when it is time to stop."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    stopped = asyncio.create_task(stop.wait())
    while True:
        command = await commands.next(GatewayCommand, until=stopped)
        if command is None:
            return ORPHAN_GRACE_S
        match command.do:
            case "models":
                routes.update(command.models)
                queues.update(command.models)
            case "refresh":
                meter.leasing.refresh()
                await authenticator.renew()
                report(GatewayReport(say="refreshed", ticket=command.ticket))
            case "stop":
                return command.grace_s


async def _let_finish(server: HttpServer, commands: Commands, grace_s: float) -> bool:
    """Let open requests finish for `grace_s` seconds; True when all of them did.

    It is less when the supervisor says stop once more or dies.
    """
    stopping = asyncio.create_task(server.stop(grace_s))
    await finish_within(stopping, commands, GatewayCommand, orphan_grace_s=ORPHAN_GRACE_S)
    stopping.cancel()
    return server.working == 0


async def _sweep(routes: ModelRoutes) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SWEEP_S)
        routes.sweep(loop.time())


async def _report_load(routes: ModelRoutes, queues: FairQueues) -> None:
    """Tell the supervisor of the load when it has changed.

    It is told at once when somebody waits for a model at zero.
    """
    wanted = asyncio.Event()
    routes.activator.on_wanted = wanted.set
    told: GatewayReport | None = None
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_S):
                await wanted.wait()
        wanted.clear()
        active = {name: route.active for name, route in routes.by_name.items()}
        waiting = routes.activator.waiting
        for name, people in queues.people_waiting().items():
            waiting[name] = waiting.get(name, 0) + people
        load = GatewayReport(say="load", active=active, waiting=waiting, load=routes.take_load())
        if load != told:
            told = load
            report(load)


async def _sweep_responses(response_store: ResponseStore) -> None:
    """Forget responses that are too old; one process does it for all."""
    while True:
        try:
            await response_store.sweep()
        except Unavailable:
            log.warning("responses that are too old cannot be deleted now: the store does not answer")
        except Exception:
            log.exception("responses that are too old cannot be deleted")
        await asyncio.sleep(SWEEP_RESPONSES_S)


async def _report_metrics(meter: GatewayMeter, routes: ModelRoutes, queues: FairQueues) -> None:
    """Once a second, where anything has changed: what `/metrics` shows of this process."""
    told = b""
    while True:
        await asyncio.sleep(METRICS_EVERY_S)
        figures = figures_of(meter, routes, queues)
        encoded = msgspec.json.encode(figures)
        if encoded != told and _heard():
            told = encoded
            report(figures)


def figures_of(meter: GatewayMeter, routes: ModelRoutes, queues: FairQueues) -> GatewayReport:
    """What this process has counted, and how it stands."""
    figures = meter.metrics.figures(meter.leasing, meter.log)
    return GatewayReport(say="figures", figures=figures, gauges=process_gauges(routes, queues.queued()))


def _heard() -> bool:
    """The supervisor has read what it was told; one that hangs must not stop this process at a full pipe."""
    try:
        (unread,) = struct.unpack("i", fcntl.ioctl(1, termios.FIONREAD, b"\0" * 4))
    except OSError:
        return True  # it is gone, which is noticed elsewhere, or it is no pipe
    return not unread


async def _keep_limit_leases(shares: LimitLeases) -> None:
    """Once a second: report what was taken of limits, and give back what is not needed."""
    while True:
        await asyncio.sleep(BEAT_S)
        await shares.beat()


async def _keep_house(authenticator: Authenticator, meter: GatewayMeter) -> None:
    """Once a second, take news from the store, and give idle leases back to it.

    Not while it is away: they are needed then.
    """
    while True:
        await asyncio.sleep(1.0)
        try:
            await authenticator.renew()
            if authenticator.answering:
                await meter.leasing.return_idle()
        except Exception:
            log.exception("housekeeping failed")


async def _watch_disk(meter: GatewayMeter, stop: asyncio.Event) -> None:
    """Once a second, also while the store hangs: the live table to disk.

    An end when the usage log has failed.
    """
    while True:
        await asyncio.sleep(1.0)
        if meter.log.failure is not None and not stop.is_set():
            log.error("the usage log cannot be written; this gateway process ends", reason=str(meter.log.failure))
            stop.set()
        try:
            await asyncio.to_thread(meter.live.flush)
        except Exception:
            log.exception("the live table cannot be written to disk")


async def _main() -> None:
    commands = await Commands.open()
    spec = await commands.next(WorkerSpec)
    if spec is not None:
        await serve(spec, commands)


def main() -> None:
    configure_logs()
    sys.setswitchinterval(0.001)  # the log's thread must not wait 5 ms for a busy event loop
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a stream takes two, and many systems begin with 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(_main())
    os._exit(0)  # a thread that still waits for a store that does not answer must not keep the process


if __name__ == "__main__":
    main()
