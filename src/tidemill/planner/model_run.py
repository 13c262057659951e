"""A model in the simulation: its replicas as one, its fillers, and what the policies are told of it."""

import math
import random
from collections import deque
from collections.abc import Sequence

import msgspec

from tidemill.planner.arrivals import ArrivalBin
from tidemill.planner.fleet_model import SimulatedLoad, SimulatedModel, StepOutcome, advance
from tidemill.tides.forecast import DemandSeries, forecast
from tidemill.tides.slack import ReplicaLoad, StepFit, adapted, filler_slots
from tidemill.tides.state import Demand, ModelView

FORECAST_S = 300.0
"""Length of a bin of history, and how often a forecast is made."""
FILLERS_A_STEP = 8.0
"""Filler requests that may enter a replica within a step of the simulation."""


class DemandStream(msgspec.Struct, frozen=True, kw_only=True):
    """A model, what is asked of it, and what was asked on the days before."""

    spec: SimulatedModel
    bins: Sequence[ArrivalBin]
    capacity: float = 0.0
    """Work a second that a replica does within the objective, measured; 0: by the formula."""
    before: Sequence[float] = ()
    """Work a second in bins of `FORECAST_S`."""
    min_replicas: int = 1
    max_replicas: int = 1000
    first_replicas: int = 1
    """Ready when the day begins."""


class ServedModel:
    """A model in the simulation."""

    def __init__(self, stream: DemandStream, chance: random.Random, step_s: float) -> None:
        self.stream, self.spec = stream, stream.spec
        self.capacity = stream.capacity or self.spec.capacity()
        self.best_filler = self.spec.best_filler()
        self.load = SimulatedLoad()
        self.ready = 0
        self.lent = 0
        self.pending = ArrivalBin()
        self.now_rate = 0.0
        self.late = self.late_now = 0.0
        self.idle_s = 0.0
        self.demand = Demand()
        self.history = list(stream.before)
        self.bin_work = 0.0
        self.limit = 1.0
        self.since_fall_s = math.inf
        self.ttft_s = self.tpot_s = 0.0
        self.arrivals = 0.0
        self.fit = StepFit()
        self.recent: deque[float] = deque()
        self.asked = self.missed = 0.0
        self._chance = chance
        self._step_s = step_s

    def step(self, came: ArrivalBin, lines: bool, filler: bool) -> tuple[StepOutcome | None, float]:
        """Work for a step.

        Returns what one replica did, and how much of what all could do was used, in replicas.
        """
        dt, spec, load = self._step_s, self.spec, self.load
        work = spec.work(came)
        self.asked += came.requests
        self.bin_work += work
        self.now_rate += (work / dt - self.now_rate) * min(dt / 60, 1)
        self.arrivals += (came.requests / dt - self.arrivals) * min(dt / 20, 1)
        self.idle_s = 0.0 if came.requests > 0 else self.idle_s + dt
        if self.ready == 0:
            held = self.pending
            self.pending = ArrivalBin(
                held.requests + came.requests, held.prompt + came.prompt, held.output + came.output
            )
            self.missed += came.requests
            return None, 0.0
        waited = self.pending
        self.pending = ArrivalBin()
        self._adapt()
        load.fillers = self._fillers(lines, filler)
        each = ArrivalBin(
            (came.requests + waited.requests) / self.ready,
            (came.prompt + waited.prompt) / self.ready,
            (came.output + waited.output) / self.ready,
        )
        outcome = advance(load, spec, each, dt)
        self.missed += came.requests * outcome.late
        if came.requests > 0:
            self.late += (outcome.late - self.late) * min(dt / 300, 1)
            self.late_now += (outcome.late - self.late_now) * min(dt / 60, 1)
        self.ttft_s += (outcome.ttft_s - self.ttft_s) * min(dt / 10, 1)
        self.tpot_s += (outcome.step_s - self.tpot_s) * min(dt / 10, 1)
        used = (outcome.work - outcome.filler_work) / dt / self.capacity + outcome.filler_work / dt / self.best_filler
        return outcome, min(used, 1.0) * self.ready

    def _adapt(self) -> None:
        limit = adapted(self._seen(), self.spec.objective)
        self.since_fall_s = 0.0 if limit < self.limit else self.since_fall_s + self._step_s
        self.limit = limit

    def _fillers(self, lines: bool, filler: bool) -> float:
        load, spec = self.load, self.spec
        if not filler:
            return 0.0
        allowed = filler_slots(self._seen(), spec.objective) if lines else 0
        if allowed > load.fillers:
            return min(float(allowed), load.fillers + FILLERS_A_STEP)
        life = spec.filler_output * max(self.tpot_s, 1e-3)
        return max(float(allowed), load.fillers * math.exp(-self._step_s / life))

    def _seen(self) -> ReplicaLoad:
        load, spec = self.load, self.spec
        used = load.sequences * spec.interactive_kv + load.fillers * spec.filler_kv
        return ReplicaLoad(
            interactive=math.ceil(load.sequences - 0.5),
            filler=round(load.fillers),
            queued=int(load.queue / spec.prompt) if load.queue > spec.prompt else 0,
            slots=spec.slots,
            arrivals=self.arrivals / max(self.ready, 1),
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
            late=self.late_now,
            kv_free=max(spec.kv_tokens - used, 0.0),
            kv_per_filler=spec.filler_kv,
            kv_used=used,
            kv_per_interactive=spec.interactive_kv,
            prompt=spec.prompt,
            answer=spec.output,
            filler_prefill=spec.filler_prompt / spec.filler_output,
            limit=self.limit,
            since_fall_s=self.since_fall_s,
            steps=self.fit.fitted(),
        )

    def measure(self) -> None:
        """Take in what the engine and the clock say, as the live loop does each interval."""
        load, spec = self.load, self.spec
        if self.ready:
            prefill = self._chance.choice((0.0, spec.chunk / 4, spec.chunk))
            batch = max(load.sequences + load.fillers + self._chance.gauss(0, 2), 0)
            kv = load.sequences * spec.interactive_kv + load.fillers * spec.filler_kv
            took = spec.steps.seconds(prefill, batch, kv) * math.exp(self._chance.gauss(0, 0.03))
            self.fit.observe(prefill, batch, kv, took)

    def resize(self, ready: int) -> None:
        """So many replicas are ready: what is in hand is shared among them."""
        if ready != self.ready and ready > 0 and self.ready > 0:
            ratio = self.ready / ready
            self.load.sequences *= ratio
            self.load.queue *= ratio
            self.load.fillers *= ratio if ratio < 1 else 1.0
        elif ready == 0:
            self.load = SimulatedLoad()
        self.ready = ready

    def view(self, now: float, wants: bool) -> ModelView:
        stream, spec = self.stream, self.spec
        high = max(self.now_rate, self.demand.high)
        scale_down_s = 300.0
        self.recent.append(high)
        while len(self.recent) > 30:
            self.recent.popleft()
        soon = spec.objective.ttft_s / 2 * spec.chunk / max(self.tpot_s + spec.steps.prefill * spec.chunk, 1e-3)
        stuck = max(self.load.queue - soon, 0.0) / spec.prompt * self.ready
        return ModelView(
            name=spec.name,
            devices=spec.devices,
            min_replicas=stream.min_replicas,
            max_replicas=stream.max_replicas,
            objective=spec.objective,
            capacity=self.capacity,
            slots=spec.slots,
            demand=self.demand if wants else Demand(),
            now=self.now_rate,
            waiting=math.ceil(self.pending.requests + stuck) if self.pending.requests + stuck >= 1 else 0,
            late=self.late,
            idle_s=self.idle_s,
            scale_down_s=scale_down_s,
            peak=max(self.recent),
            startup_s=spec.startup_s,
        )

    def look_ahead(self, now: float) -> None:
        """A bin of history is full."""
        self.history.append(self.bin_work / FORECAST_S)
        self.bin_work = 0.0
        self.demand = forecast(DemandSeries(now, tuple(self.history), FORECAST_S), self.spec.startup_s + FORECAST_S)
