"""The tide on this platform: what the fleet's controller plans with.

It is made of what the gateways report, what is remembered and what waits. And how many lines of batches may run at each
moment.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime

import msgspec
import structlog

from tidemill.app.batches import BatchProcess
from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.platform import Config
from tidemill.app.fleet import Fleet, objective_of
from tidemill.errors import NotFound
from tidemill.fleet.backend import Node
from tidemill.fleet.controller import LIVING, FleetController, JobSource
from tidemill.fleet.history import DemandHistory
from tidemill.fleet.recipe import Recipe
from tidemill.fleet.replica import Replica, ReplicaLoadSample
from tidemill.fleet.static_placement import share_of_slots
from tidemill.fleet.status import FleetStatus, fleet_status
from tidemill.fleet.traffic import CapacityMeter, ModelTraffic
from tidemill.gateway.routing.demand import DemandReport
from tidemill.store.drains import drain, read_drained, undrain
from tidemill.store.engine import Store
from tidemill.tides.slack import ReplicaLoad, adapted, filler_slots
from tidemill.tides.state import BacklogView, Demand, ModelView

_TICK_S = 0.2
"""How often the lines of batches that may run are counted anew, while there are any."""
ADAPT_S = 1.0
"""How often experience moves the limit of lines inside a replica (`tides.slack.adapted`)."""
FIRST_STARTUP_S = 30.0
"""What a replica is taken to need until it is ready, before the first was seen to be."""
BESIDE_WORK = 20_000.0
"""Lines that are less work than this, in tokens of prefill, are not worth an engine of their own beside the others."""
BESIDE_LINGER_S = 10.0
"""So long after its last line an engine for lines is kept: a batch often follows another."""
LINES_UNKNOWN = 32
"""Lines at a time at a replica that is lent to batches and does not say how many it works on."""

log = structlog.get_logger()


class ModelTide:
    """What is known of one model with engines of our own."""

    def __init__(self, name: str, config: ModelConfig, recipe: Recipe, measures: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.name = name
        self.config = config
        self.recipe = recipe
        self.objective = objective_of(config)
        self.traffic = ModelTraffic(now, percentile=self.objective.percentile)
        self.meter = CapacityMeter(measures.get("capacity", 0.0), percentile=self.objective.percentile)
        self.startup_s = measures.get("startup_s", FIRST_STARTUP_S)
        self.seen_startup = "startup_s" in measures
        self.limits: dict[str, float] = {}
        """What experience allows of lines inside each replica."""
        self.fell_at: dict[str, float] = {}
        """When that fell last, monotonic."""
        self.lines_until = 0.0
        """It is taken to have lines until then, monotonic."""

    @property
    def elastic(self) -> bool:
        return self.recipe.min_replicas != self.recipe.max_replicas

    @property
    def colocated(self) -> bool:
        """Lines run in a replica beside each ordinary one."""
        filler = self.config.filler
        return filler == "beside" or (filler is None and self.recipe.control.batches_beside)


class Tide:
    """Plans this platform's fleet; what `fleet.controller.FleetView` asks for."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        batches: BatchProcess,
        jobs: JobSource,
        store: Store,
        *,
        history: DemandHistory,
        rolling: Callable[[], Collection[str]],
    ) -> None:
        """`rolling`: models that are being rolled to another version.

        Who rolls them decides on their replicas.
        """
        self._config = config
        self._fleet = fleet
        self._batches = batches
        self._store = store
        self._history = history
        self._rolling = rolling
        self._models: dict[str, ModelTide] = {}
        self._loads: dict[int, DemandReport] = {}
        """What each gateway process has in flight."""
        self._waiting: Mapping[str, int] = {}
        self._done: Counter[str] = Counter()
        """Work that replicas have done since the last tick."""
        self._drained: dict[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._adapt_at = 0.0
        self.controller = FleetController(self, fleet.replicas, jobs)

    async def open(self) -> None:
        """Read what is remembered. Raises Unavailable."""
        recipes = self._fleet.replicas.recipes
        await self._history.open(recipes)
        with self._store.read() as connection:
            self._drained = read_drained(connection)
        measures = self._history.measures
        self._models = {
            name: ModelTide(name, self._config.models[name], recipe, measures.get(name, {}))
            for name, recipe in recipes.items()
        }

    def start(self) -> None:
        """Begin to plan. From here on no one else starts replicas."""
        self._fleet.replicas.leave_to_plans()
        self._batches.on_backlog = self.controller.poke
        self._tasks = [
            asyncio.create_task(chore) for chore in (self.controller.run(), self._history.run(), self._keep_ticking())
        ]

    async def stop(self) -> None:
        """Plan no more; what runs stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What the gateways report

    def note_load(self, process: int, load: DemandReport | None) -> None:
        """A gateway process has reported, or has died (None)."""
        now = time.monotonic()
        if load is None:
            self._loads.pop(process, None)
        else:
            self._loads[process] = load
            for name, seen in load.seen.items():
                model = self._models.get(name)
                if model is not None:
                    model.traffic.heard(seen.arrivals, seen.work, seen.ended, seen.late, now)
                    model.traffic.sampled(seen.ttft, seen.tpot, now)
                    model.meter.ended(seen.ended, seen.late)
            for replica, used in load.replicas.items():
                self._done[replica] += used.done
        self._fleet.replicas.note_use(self._uses())

    def note_waiting(self, waiting: Mapping[str, int]) -> None:
        """Interactive requests that wait in the gateways, by model.

        The first for one without a replica starts one.
        """
        before, self._waiting = self._waiting, dict(waiting)
        if any(name not in before and not self._ready(name) for name in self._waiting if name in self._models):
            self.controller.poke()

    def _uses(self) -> dict[str, ReplicaLoadSample]:
        uses: dict[str, ReplicaLoadSample] = {}
        for load in self._loads.values():
            for replica, used in load.replicas.items():
                before = uses.get(replica, ReplicaLoadSample())
                uses[replica] = ReplicaLoadSample(before.people + used.people, before.filler + used.filler)
        return uses

    def _ready(self, model: str) -> list[Replica]:
        return [each for each in self._fleet.replicas.of(model) if each.ready and not each.batch_only]

    # What the controller asks for (`fleet.controller.FleetView`)

    def nodes(self) -> Sequence[Node]:
        return self._fleet.replicas.nodes

    def drained(self) -> Mapping[str, str]:
        return self._drained

    def backlogs(self) -> Sequence[BacklogView]:
        return self._batches.backlogs

    def colocated_models(self) -> Collection[str]:
        now = time.monotonic()
        work = {each.model: sum(part for part, _ in each.parts) for each in self._batches.backlogs}
        wanted = set()
        for name, model in self._models.items():
            left, running = work.get(name, 0.0), now < model.lines_until
            if left >= BESIDE_WORK or (running and left > 0):
                model.lines_until = now + BESIDE_LINGER_S
            if model.colocated and now < model.lines_until:
                wanted.add(name)
        return wanted

    def learn_startup(self, model: str, seconds: float) -> None:
        known = self._models.get(model)
        if known is None:
            return
        # The longer one counts at once, the shorter one little by little: a replica that is late is worse.
        known.startup_s = max(seconds, 0.7 * known.startup_s + 0.3 * seconds) if known.seen_startup else seconds
        known.seen_startup = True
        self._history.measure(model, "startup_s", known.startup_s)

    def models(self, now: float) -> Sequence[ModelView]:
        return [self._view(model, now) for model in self._models.values()]

    def _view(self, model: ModelTide, now: float) -> ModelView:
        recipe, traffic, config = model.recipe, model.traffic, model.config
        waiting = self._waiting.get(model.name, 0)
        mine = [each for each in self._fleet.replicas.of(model.name) if not each.batch_only]
        if waiting or any(each.use.people for each in mine):
            traffic.busy(now)
        rate = traffic.rate(now)
        demand = Demand()
        if model.elastic:
            demand = self._history.demand(model.name, model.startup_s)
        low, high = recipe.min_replicas, recipe.max_replicas
        devices, kinds = recipe.devices, recipe.kinds
        if devices is None:
            devices = len(share_of_slots(recipe, 0, self.nodes())) or 1
            kinds = ("cpu",)
        if recipe.shares or model.name in self._rolling():
            # Several that share the slots are no matter of planning, and a model that is rolled has its own plan.
            low = high = sum(1 for each in mine if each.devices and each.view().phase in LIVING)
        return ModelView(
            name=model.name,
            devices=devices,
            kinds=kinds,
            spans=recipe.spans,
            min_replicas=low,
            max_replicas=high,
            objective=model.objective,
            capacity=model.meter.capacity,
            slots=config.slots,
            demand=demand,
            now=rate,
            waiting=waiting,
            late=traffic.late(now),
            idle_s=traffic.idle_s(now),
            scale_down_s=config.scale_down_seconds,
            peak=traffic.peak(max(rate, demand.high), now, config.scale_down_seconds),
            startup_s=model.startup_s,
            priority=config.priority,
            sleepers=config.sleepers,
        )

    # Lines of batches

    async def _keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self.tick(time.monotonic())
            except Exception:
                log.exception("the room for lines of batches could not be counted")

    def tick(self, now: float) -> None:
        """Measure what replicas do, and say how many lines may run."""
        done, self._done = self._done, Counter()
        adapt = now >= self._adapt_at
        if adapt:
            self._adapt_at = now + ADAPT_S
        allowed = {}
        for name, model in self._models.items():
            replicas = self._fleet.replicas.of(name)
            for replica in replicas:
                if not replica.batch_only and replica.ready:
                    in_flight = replica.use.people + replica.use.filler
                    model.meter.served(replica.name, in_flight, done[replica.name], now)
            if model.meter.close_window(now):
                self._history.measure(name, "capacity", model.meter.capacity)
            allowed[name] = self._slots(model, replicas, now, adapt=adapt)
        self._batches.allow(allowed)

    def _slots(self, model: ModelTide, replicas: Sequence[Replica], now: float, *, adapt: bool) -> int:
        """How many lines may be in flight at a model, in all.

        At replicas that are lent to batches where there are any (lines go nowhere else then), else inside the others as
        far as their slack allows.
        """
        slots, most = model.config.slots, model.config.batch_parallel
        lent = [each for each in replicas if each.batch_only and each.ready]
        if lent:
            lines = ReplicaLoad(slots=slots or LINES_UNKNOWN, batch_only=True)
            total = len(lent) * filler_slots(lines, model.objective)
            return total if most is None else min(total, most)
        ready = [each for each in replicas if not each.batch_only and each.ready]
        if not ready:
            return 0
        if most is None:
            most = max(slots // 2, 1) * len(ready) if slots is not None else LINES_UNKNOWN * len(ready)
        traffic = model.traffic
        waiting, arrivals = self._waiting.get(model.name, 0), traffic.arrivals(now)
        ttft_s, tpot_s, late = traffic.ttft_s(now), traffic.tpot_s(now), traffic.late(now)
        total = 0
        for replica in ready:
            load = ReplicaLoad(
                interactive=replica.use.people,
                filler=replica.use.filler,
                queued=waiting,
                slots=slots,
                arrivals=arrivals / len(ready),
                ttft_s=ttft_s,
                tpot_s=tpot_s,
                late=late,
                limit=model.limits.get(replica.name, 1.0),
                since_fall_s=now - model.fell_at.get(replica.name, -math.inf),
            )
            if adapt:
                limit = adapted(load, model.objective)
                if limit < load.limit:
                    model.fell_at[replica.name] = now
                load = msgspec.structs.replace(load, limit=limit)
                model.limits[replica.name] = limit
            total += filler_slots(load, model.objective)
        return min(total, most)

    # What operators ask for

    def status(self) -> FleetStatus:
        """How the fleet stands, as of the last plan."""
        replicas = list(self._fleet.replicas.replicas.values())
        return fleet_status(self.nodes(), replicas, self._drained, self.controller.last)

    async def drain(self, name: str, why: str) -> None:
        """Take a node or a device out: nothing new starts there, and what runs there moves. Raises NotFound."""
        self._check(name)

        def write() -> None:
            with self._store.write() as connection:
                drain(connection, name, why, datetime.now(UTC))

        await asyncio.to_thread(write)
        self._drained[name] = why
        self.controller.poke()

    async def undrain(self, name: str) -> None:
        """Put it back. Raises NotFound when it was not taken out."""

        def write() -> bool:
            with self._store.write() as connection:
                return undrain(connection, name)

        known = await asyncio.to_thread(write)
        self._drained.pop(name, None)
        if not known:
            raise NotFound(f"{name!r} is not drained.", hint="See `tidemill fleet devices`.")
        self.controller.poke()

    def _check(self, name: str) -> None:
        known = [each for node in self.nodes() for each in (node.name, *(device.id for device in node.devices))]
        if name not in known:
            raise NotFound(f"There is no node or device {name!r}.", hint=f"Known: {', '.join(known[:20])}.")
