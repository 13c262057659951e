"""How fast a simulated replica is, and how its requests fare.

A replica does steps of continuous batching; a step takes `a + b * prefill tokens + c * sequences + d * KV tokens`
seconds. Replicas of a model are alike and requests are spread evenly over them, so those that are ready are simulated
as one, by their mean; tokens, sequences and queues are real numbers ("fluid"). Within a step of the simulation (a few
seconds) requests come at random: the wait for the first token has the tail of an M/M/1 queue at the replica's share
of prefill time. What that leaves out: the variance between replicas, and between prompts beyond the mean of a step.
"""

import math
from collections.abc import Sequence

import msgspec

from tidemill.planner.arrivals import ArrivalBin
from tidemill.tides.routing import POLICY
from tidemill.tides.slack import StepTime
from tidemill.tides.state import Objective


class SimulatedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a simulated fleet."""

    name: str
    devices: int
    steps: StepTime
    objective: Objective
    slots: int
    """Sequences that a replica works on at a time."""
    kv_tokens: float
    """Tokens that fit into its cache."""
    startup_s: float
    prompt: float
    """Mean tokens of an interactive prompt."""
    output: float
    """Mean tokens of an interactive answer."""
    filler_prompt: float = 2600.0
    filler_output: float = 200.0
    """Of a line of a batch."""
    chunk: float = 4096.0
    """Tokens of prefill that fit into a step."""

    def work(self, bin: ArrivalBin) -> float:
        return bin.prompt + POLICY.decode_weight * bin.output

    @property
    def filler_work(self) -> float:
        """Tokens of work in a line."""
        return self.filler_prompt + POLICY.decode_weight * self.filler_output

    @property
    def filler_kv(self) -> float:
        return self.filler_prompt + self.filler_output / 2

    @property
    def interactive_kv(self) -> float:
        return self.prompt + self.output / 2

    def capacity(self) -> float:
        """Work a second that one replica does within the objective, on interactive requests alone.

        Were they to come evenly.
        """
        low, high = 0.0, 1e4
        for _ in range(60):
            middle = (low + high) / 2
            if self._holds(middle):
                low = middle
            else:
                high = middle
        return low * (self.prompt + POLICY.decode_weight * self.output)

    def _step_s(self, rate: float) -> float:
        """Seconds of a step when so many requests a second come; inf when they are too many."""
        left = 1 - self.steps.prefill * rate * self.prompt
        left -= (self.steps.batch + self.steps.kv * self.interactive_kv) * rate * self.output
        return self.steps.base / left if left > 0 else math.inf

    def _holds(self, rate: float) -> bool:
        step = self._step_s(rate)
        if step > self.objective.tpot_s or rate * self.output * step > self.slots:
            return False
        late = late_share(rate * self.prompt, self.chunk / (step + self.steps.prefill * self.chunk), 0.0, step, self)
        return late <= 1 - self.objective.percentile

    def best_filler(self) -> float:
        """Work a second of a replica that serves nothing but batches."""
        count = min(self.slots, self.kv_tokens / self.filler_kv)
        return count / self.filler_seconds(0.0, count) * self.filler_work / self.filler_output

    def filler_seconds(self, sequences: float, fillers: float) -> float:
        """Seconds of a step with interactive sequences and fillers, the fillers' own prefill included."""
        steps = self.steps
        return (
            steps.base
            + (steps.batch + steps.kv * self.interactive_kv) * sequences
            + (steps.batch + steps.kv * self.filler_kv) * fillers
            + steps.prefill * fillers * self.filler_prompt / self.filler_output
        )

    def measured(self, bins: Sequence[ArrivalBin], dt_s: float) -> float:
        """Work a second that a replica does within the objective when requests come as in these bins.

        The fewest replicas that keep it are tried out, as a load test would.
        """
        low, high = 1, 4096
        while low < high:
            middle = (low + high) // 2
            if self._kept(bins, dt_s, middle) >= self.objective.percentile:
                high = middle
            else:
                low = middle + 1
        return sum(self.work(each) for each in bins) / (len(bins) * dt_s) / low

    def _kept(self, bins: Sequence[ArrivalBin], dt_s: float, replicas: int) -> float:
        load, late, asked = SimulatedLoad(), 0.0, 0.0
        for each in bins:
            share = ArrivalBin(each.requests / replicas, each.prompt / replicas, each.output / replicas)
            late += advance(load, self, share, dt_s).late * each.requests
            asked += each.requests
        return 1 - late / max(asked, 1e-9)


class SimulatedLoad(msgspec.Struct):
    """What one (the mean) replica has in hand."""

    sequences: float = 0.0
    """Interactive ones that are answered."""
    queue: float = 0.0
    """Tokens of interactive prompts that wait."""
    fillers: float = 0.0


class StepOutcome(msgspec.Struct, frozen=True, gc=False):
    """What a replica did in a step of the simulation."""

    step_s: float
    ttft_s: float
    """At the objective's percentile."""
    late: float
    """Share of the requests that came and missed the objective."""
    prefill_share: float
    filler_work: float
    """Work done on batches, tokens."""
    work: float
    """Work done in all, tokens."""


def late_share(prefill_rate: float, most: float, queue: float, step_s: float, spec: SimulatedModel) -> float:
    """Share of requests whose first token comes too late.

    The queue before them, their own prefill, and the random wait behind others (M/M/1: share * exp(-time * (1 - share)
    / service time)).
    """
    service = spec.prompt / most
    left = spec.objective.ttft_s - queue / most - service - step_s
    if left <= 0:
        return 1.0
    share = min(prefill_rate / most, 0.999)
    return share * math.exp(-left * (1 - share) / service)


def ttft_at(
    percentile: float, prefill_rate: float, most: float, queue: float, step_s: float, spec: SimulatedModel
) -> float:
    """Seconds to the first token at a percentile, by the same queue."""
    service = spec.prompt / most
    share = min(prefill_rate / most, 0.999)
    tail = 1 - percentile
    wait = service / (1 - share) * math.log(share / tail) if share > tail else 0.0
    return queue / most + service + step_s + wait


def advance(load: SimulatedLoad, spec: SimulatedModel, came: ArrivalBin, dt_s: float) -> StepOutcome:
    """Let a replica work for `dt_s` seconds in which these requests come to it. Changes `load`."""
    steps = spec.steps
    fillers = load.fillers
    filler_prefill = fillers * spec.filler_prompt / spec.filler_output
    alone = spec.filler_seconds(load.sequences, fillers)
    chunk = max(spec.chunk - filler_prefill, spec.chunk / 4)  # interactive prompts go first
    waiting = load.queue + came.prompt
    before = load.queue
    fit = 1 - steps.prefill * waiting / dt_s
    step = alone / fit if fit > 0 else math.inf
    if step * waiting / dt_s > chunk:
        step = alone + steps.prefill * chunk
        done = min(chunk * dt_s / step, waiting)
    else:
        done = waiting
    load.queue = waiting - done
    most = chunk / (alone + steps.prefill * chunk)
    prompt = came.prompt / came.requests if came.requests > 0 else spec.prompt
    output = came.output / came.requests if came.requests > 0 else spec.output
    joined = done / max(prompt, 1.0)
    room = max(spec.slots - fillers - load.sequences, 0.0)
    if joined > room:  # no place: the prompts wait
        load.queue += (joined - room) * prompt
        joined = room
    # Sequences come evenly over the step and last for `life` seconds each: ds/dt = joined / dt - s / life.
    life = max(output, 1.0) * step
    steady = joined / dt_s * life
    after = steady + (load.sequences - steady) * math.exp(-dt_s / life)
    decoded = max(load.sequences + joined - after, 0.0) * max(output, 1.0)
    load.sequences = max(after, 0.0)
    late = 0.0
    if came.requests > 0:
        rate = came.prompt / dt_s
        first = late_share(rate, most, before, step, spec)
        last = late_share(rate, most, load.queue, step, spec)
        late = 1.0 if step > spec.objective.tpot_s else (first + last) / 2
    lines = fillers * dt_s / step / spec.filler_output
    filler_work = lines * spec.filler_work
    return StepOutcome(
        step,
        ttft_at(spec.objective.percentile, came.prompt / dt_s, most, max(before, load.queue), step, spec),
        late,
        min(steps.prefill * done / dt_s, 1.0),
        filler_work,
        filler_work + done + POLICY.decode_weight * decoded,
    )
