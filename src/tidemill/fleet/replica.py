"""One replica: an engine's processes, one incarnation after the other, and why it is in its phase.

starting -> warming -> ready -> draining -> gone
    ^         ^ '--------'      '-> asleep -> warming, or gone
    '---------'----------' (it has died, hangs or does not start: again, after growing waits)
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from tidemill.clock import PROCESS_CLOCK
from tidemill.engines.capabilities import template_lacks
from tidemill.engines.prometheus import counter_sum
from tidemill.fleet.backend import Backend, CannotStart, Device, Process
from tidemill.fleet.engine_processes import EngineProcesses, ending_in_words
from tidemill.fleet.ranks import by_node
from tidemill.fleet.recipe import Recipe, WeightsVersion
from tidemill.tides.state import Phase, ReplicaView

_RESTART_AFTER_S = (0.2, 1.0, 5.0, 15.0, 60.0)
"""Waits before an engine that keeps dying is started again."""
STEADY_AFTER_S = 60.0
"""An engine that lived this long starts anew with the shortest wait."""
HEALTH_EVERY_S = 2.0
POLL_S = 0.05
"""How often one that starts is asked whether it is ready, in its first seconds."""
SLOW_POLL_S = 0.5
STOP_GRACE_S = 5.0
DOZE_S = 120.0
"""What an engine gets to take its weights out of its devices in, seconds, and to put them there again."""
COLOCATED_PATIENCE = 30.0
"""One that gets what another leaves may be silent for so many times longer."""
SETTLE_S = 0.5
"""A replica that drains is idle when it was so for this long after the gateways have heard of it."""
NOWHERE = "http://127.0.0.1:1/v1"
"""The address of a replica that has none yet."""

log = structlog.get_logger()

Get = Callable[[str, bytes, float], Awaitable[bytes | None]]
"""GET a page: base URL, path, time limit in seconds; None when it is not answered with 200 in time."""
Post = Callable[[str, bytes, float], Awaitable[bool]]
"""The same for telling an engine something; whether it was answered with 200 in time."""


class PhaseChange(msgspec.Struct, frozen=True):
    """One change of a replica's phase."""

    at: float
    """Unix time, seconds."""
    replica: str
    phase: Phase
    why: str


class ReplicaLoadSample(msgspec.Struct, frozen=True):
    """What the gateways have in flight at a replica."""

    people: int = 0
    filler: int = 0


class Replica:
    """An engine that serves a model on certain devices."""

    def __init__(
        self,
        index: int,
        recipe: Recipe,
        *,
        backend: Backend,
        get: Get,
        post: Post,
        logs: Path,
        note: Callable[["Replica", PhaseChange], None],
        batch_only: bool = False,
        colocated: bool = False,
        version: WeightsVersion | None = None,
    ) -> None:
        self.name = f"{recipe.model}/{index}"
        self.index = index
        self.model = recipe.model
        self.recipe = recipe
        self.version = version or recipe.version
        self.devices: tuple[Device, ...] = ()
        self.batch_only = batch_only
        self.colocated = colocated
        """It runs in the idle class, on devices that another one holds."""
        self.phase = Phase.STARTING
        self.since = PROCESS_CLOCK.seconds()
        self.why = "the platform starts"
        self.surge = False
        """It takes another one's place soon: until then it holds its devices, and counts for nothing else."""
        self.use = ReplicaLoadSample()
        self.incarnation = ""
        self.base_url = NOWHERE
        self.starts = 0
        self.failures = 0
        """Incarnations in a row that have ended before they were steady."""
        self.last_failure = ""
        """Why the last of them has."""
        self.lacks: tuple[str, ...] = ()
        """See `gateway.routing.models.ModelSpec.lacks`."""
        self.ready_after_s: float | None = None
        """What the last start took, seconds."""
        self._get = get
        self._post = post
        self._note = note
        log_file = logs / f"engine-{self.name.replace('/', '-')}.log"
        self._processes = EngineProcesses(self.name, recipe, backend, log_file, idle_class=colocated)
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._burying: asyncio.Task[None] | None = None
        self._dozing: asyncio.Task[None] | None = None
        """It is being put to sleep, or woken."""

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY

    @property
    def pid(self) -> int | None:
        return self._processes.pid

    @property
    def root(self) -> str:
        """Where its engine listens, without the path of its API."""
        return self.base_url.removesuffix("/v1")

    @property
    def stuck(self) -> bool:
        """It does not start, for a reason that waiting will hardly change."""
        starts = self.phase in (Phase.STARTING, Phase.WARMING) and self._dozing is None
        return starts and (self.starts > 2 or self.failures > 2)

    def view(self) -> ReplicaView:
        return ReplicaView(
            id=self.name,
            model=self.model,
            devices=tuple(device.id for device in self.devices),
            phase=Phase.DRAINING if self.surge else self.phase,
            in_flight=self.use.people,
            filler=self.use.filler,
            since=self.since,
            batch_only=self.batch_only,
            version=self.version.name,
            colocated=self.colocated,
            shared=self.recipe.shares,
            dozing=self._dozing is not None and self.phase is Phase.DRAINING,
        )

    def begin(self, devices: Sequence[Device], why: str, *, after: "asyncio.Task[None] | None" = None) -> None:
        """Start it on these devices and keep it alive; when `after` is done, which has them until then."""
        self.devices = tuple(devices)
        self.move(Phase.STARTING, why)
        self._task = asyncio.create_task(self._keep_alive(after))

    def move(self, phase: Phase, why: str) -> None:
        """Note where it is now, and why."""
        if phase is not self.phase:
            self.since = PROCESS_CLOCK.seconds()
        self.phase, self.why = phase, why
        self._note(self, PhaseChange(PROCESS_CLOCK.seconds(), self.name, phase, why))

    def end(self, why: str, *, on_drained: "OnDrained | None" = None) -> asyncio.Task[None]:
        """Drain it and then end it; returns at once. See `OnDrained`."""
        if self._ending is None:
            served = self.ready or self._dozing is not None or self.phase is Phase.ASLEEP
            if self._dozing is not None:
                self._dozing.cancel()
            if self.phase is Phase.ASLEEP:
                self.devices = ()  # others may have them by now
            self._ending = asyncio.create_task(self._drain_and_end(why, served, on_drained))
            self.move(Phase.DRAINING, why)
        return self._ending

    def sleep(self, why: str, *, on_drained: "OnDrained | None" = None) -> None:
        """Drain it, then have it take its weights out of its devices; one that cannot is ended.

        Returns at once.
        """
        if self.ready and self._ending is None:
            self.move(Phase.DRAINING, why)
            self._dozing = asyncio.create_task(self._doze(why, on_drained))

    def wake(self, why: str) -> None:
        """Have it put its weights into its devices again; one that cannot is started anew there.

        Returns at once.
        """
        if self.phase is Phase.ASLEEP and self._ending is None:
            self.move(Phase.WARMING, f"it wakes: {why}")
            self._dozing = asyncio.create_task(self._wake())

    async def _doze(self, why: str, on_drained: "OnDrained | None") -> None:
        idle = await self._until_idle()
        asleep = idle and await self._post(self.root, self.recipe.control.sleep.encode(), DOZE_S)
        self._dozing = None
        if asleep:
            self.batch_only = False  # it wakes for people
            self.move(Phase.ASLEEP, why)
            return
        log.warning("a replica cannot be put to sleep; it is ended", replica=self.name)
        why = f"{why}; it could not be put to sleep"
        self._ending = asyncio.create_task(self._end(why, on_drained, idle=idle))
        self.move(Phase.DRAINING, why)

    async def _wake(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        woken = await self._post(self.root, self.recipe.control.wake.encode(), DOZE_S)
        self._dozing = None
        if woken:
            self.move(Phase.READY, f"it woke in {loop.time() - began:.1f} s")
        else:
            log.warning("a replica does not wake; it is restarted", replica=self.name)
            self._processes.kill()

    async def close(self) -> None:
        """End it now: the platform stops."""
        if self._dozing is not None:
            self._dozing.cancel()
        if self._ending is not None:
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        await self._stop_process()

    def lost(self, why: str) -> None:
        """A node of it is gone, and it with that.

        What is left on others is ended before their devices are free.
        """
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if self._dozing is not None:
            self._dozing.cancel()
        if self.phase is Phase.GONE or self._burying is not None:
            return
        log.error("a replica is lost", replica=self.name, reason=why)
        if len(by_node(self.devices)) > 1:
            self.move(Phase.DRAINING, why)
            self._burying = asyncio.create_task(self._bury(why))
        else:
            self.move(Phase.GONE, why)

    async def _bury(self, why: str) -> None:
        await self._processes.kill_all()
        if self.phase is not Phase.GONE:
            self.move(Phase.GONE, why)

    # One incarnation after the other

    async def _keep_alive(self, after: "asyncio.Task[None] | None") -> None:
        if after is not None:
            await asyncio.wait([after])
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            why = await self._run_once()
            if self._dozing is not None:
                self._dozing.cancel()
                self._dozing = None
            if why is None or self._ending is not None:
                return  # its node is lost, or it was to end anyway
            if self.phase in (Phase.ASLEEP, Phase.DRAINING):
                self.move(Phase.GONE, f"{why}; its devices are in use by others")
                return
            if loop.time() - began > STEADY_AFTER_S:
                self.failures = 0
            wait = _RESTART_AFTER_S[min(self.failures, len(_RESTART_AFTER_S) - 1)]
            self.failures += 1
            self.last_failure = why
            log.warning("engine ended", replica=self.name, incarnation=self.incarnation, reason=why, restart_in_s=wait)
            self.move(Phase.STARTING, f"{why}; it is started again in {wait:g} s")
            await asyncio.sleep(wait)

    async def _run_once(self) -> str | None:
        """Why it has ended; None when it is gone with its node."""
        self.starts += 1
        self.incarnation = secrets.token_hex(4)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            process = await self._processes.start(self.devices, self.version)
        except CannotStart as error:
            return str(error).rstrip(".")
        except OSError as error:
            return f"it cannot be started: {error.strerror}"
        host = f"[{process.host}]" if ":" in process.host else process.host
        self.base_url = f"http://{host}:{process.port}/v1"
        self.move(Phase.WARMING, "it loads its weights")
        watch = asyncio.create_task(self._watch(process, began))
        try:
            ended = await self._processes.first_end()
        finally:
            watch.cancel()
        if ended.code is None:
            self.lost(ended.why or "its node is lost")
            return None
        verdict = watch.result() if watch.done() and not watch.cancelled() else None
        return verdict or ending_in_words(ended)

    async def _watch(self, process: Process, began: float) -> str:
        """Say when it is ready, and kill it when it hangs. Returns why it was killed."""
        loop = asyncio.get_running_loop()
        health = self.recipe.control.ready.encode()
        while await self._get(self.root, health, HEALTH_EVERY_S) is None:
            if loop.time() - began > self.recipe.start_s:
                process.kill()
                return f"it was not ready within {self.recipe.start_s:g} s"
            await asyncio.sleep(POLL_S if loop.time() - began < 15.0 else SLOW_POLL_S)
        if template := self.recipe.control.template:
            self.lacks = template_lacks(await self._get(self.root, template.encode(), HEALTH_EVERY_S) or b"")
        self.ready_after_s = loop.time() - began
        if self._ending is None:
            self.move(Phase.READY, f"it was ready {self.ready_after_s:.1f} s after its start")
        log.info("engine ready", replica=self.name, incarnation=self.incarnation, pid=process.pid)
        answered = loop.time()
        patience_s = self.recipe.health_s * (COLOCATED_PATIENCE if self.colocated else 1)
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            # Not asked while it goes to sleep or wakes: SGLang's health page generates a token, and there it must not.
            if self._dozing is not None or await self._get(self.root, health, HEALTH_EVERY_S) is not None:
                answered = loop.time()
            elif loop.time() - answered > patience_s:
                log.error("engine hangs; it is killed and started again", replica=self.name, pid=process.pid)
                process.kill()
                return f"it hung: no answer for {patience_s:g} s"

    # Its end

    async def _drain_and_end(self, why: str, served: bool, on_drained: "OnDrained | None") -> None:
        if served:
            await self._end(why, on_drained, idle=await self._until_idle())
        else:
            await self._end(why, None, idle=True)

    async def _end(self, why: str, on_drained: "OnDrained | None", *, idle: bool) -> None:
        if not idle:
            log.warning("a replica is ended with requests in flight", replica=self.name, use=self.use)
            why = f"{why}; requests that had not ended in {self.recipe.drain_s:g} s were cut off"
        if on_drained is not None:
            try:
                await on_drained(self)
            except Exception:
                log.exception("a replica's last figures are lost", replica=self.name)
        await self._stop_process()
        if self.phase is not Phase.GONE:  # its node may have been lost meanwhile
            self.move(Phase.GONE, why)

    async def _stop_process(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._processes.stop(STOP_GRACE_S)

    async def _until_idle(self) -> bool:
        """Wait until nothing is in flight here, at most as long as it may drain; whether that came."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.recipe.drain_s
        idle_since: float | None = None
        while loop.time() < until:
            if await self._busy():
                idle_since = None
            elif idle_since is None:
                idle_since = loop.time()
            elif loop.time() - idle_since >= SETTLE_S:
                return True
            await asyncio.sleep(0.1)
        return False

    async def _busy(self) -> bool:
        if self.use != ReplicaLoadSample():
            return True
        if self.pid is None:
            return False
        control = self.recipe.control
        page = await self._get(self.root, control.metrics.encode(), HEALTH_EVERY_S)
        if page is None:
            return True  # one that is too busy to say so, until its time is up
        text = page.decode(errors="replace")
        return any(counter_sum(text, name) for name in (control.running, control.waiting) if name)


OnDrained = Callable[[Replica], Awaitable[None]]
"""Called when a replica is idle, before its end."""
