"""The number of batch requests that a replica can take beside its interactive ones.

Three bounds, the least counts. *Room*: places and KV cache, less what the interactive requests of the next moment will
want. *Prediction*: the time of a step is `a + b * prefill + c * batch + d * kv`, fitted as steps are measured; so many
fillers that a step stays within the objective per token (HyGen, arXiv 2501.14808). *Experience*: a limit that rises by
one while the measured latencies keep away from the objective and falls by half when they come near it (as ConServe,
arXiv 2410.01228, does in the engine, here from outside; additive increase, multiplicative decrease after Chiu and
Jain, 1989). Deadlines of batches are no input: they ask for replicas in the plan, never for somebody's latency here.
"""

import math

import msgspec

from tidemill.tides.state import Objective


class StepTime(msgspec.Struct, frozen=True):
    """Seconds of one step of an engine.

    `base + prefill * tokens + batch * sequences + kv * tokens in cache`.
    """

    base: float = 0.0
    prefill: float = 0.0
    batch: float = 0.0
    kv: float = 0.0

    def seconds(self, prefill: float, batch: float, kv: float) -> float:
        return self.base + self.prefill * prefill + self.batch * batch + self.kv * kv


class ReplicaLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The load of a replica at this moment."""

    interactive: int = 0
    """Interactive requests in flight."""
    filler: int = 0
    queued: int = 0
    """Interactive requests that wait for it."""
    slots: int | None = None
    """Requests that it works on at a time."""
    arrivals: float = 0.0
    """Interactive requests a second, lately."""
    ttft_s: float | None = None
    """Of interactive requests lately, at the objective's percentile; None: there were none."""
    tpot_s: float | None = None
    late: float = 0.0
    """Share of the interactive requests of the last minute that missed the objective."""
    kv_free: float | None = None
    """Tokens that its KV cache has room for; None: the engine doesn't say."""
    kv_per_filler: float = 4096.0
    """Tokens of KV cache that a filler request takes, prompt and answer."""
    kv_used: float = 0.0
    """Tokens in the cache now."""
    kv_per_interactive: float = 2048.0
    prompt: float = 0.0
    """Tokens of an interactive request's prompt; 0: not known."""
    answer: float = 0.0
    """Tokens of its answer."""
    filler_prefill: float = 0.0
    """Tokens of prefill that a filler request takes for each token that it decodes: its prompt by its answer."""
    limit: float = 1.0
    """What experience allows, see `adapted`."""
    since_fall_s: float = math.inf
    """Seconds since the limit fell last: what is measured needs a while to show it."""
    steps: StepTime | None = None
    """None: not enough steps were measured."""
    batch_only: bool = False
    """No interactive request comes here."""


class SlackRules(msgspec.Struct, frozen=True, kw_only=True):
    """How close to the objective filler requests may push a replica."""

    margin: float = 0.8
    """Share of the objective that a step may take with filler requests in, where the prompts to come are not known."""
    near: float = 0.7
    """Up to this share of the objective, the limit rises."""
    spare: float = 0.2
    """Share of the requests that may miss the objective, that may do so before the limit falls: the rest is left to
    what interactive requests do to each other."""
    over: float = 0.8
    """Above this share of the objective, it falls."""
    fall: float = 0.5
    """What remains of the limit when the objective is near."""
    back_off: float = 0.75
    """What remains of it when only the spare is used up."""
    settle_s: float = 30.0
    """It falls again only after so long: what was measured before it fell is in the averages for a while."""
    burst: float = 2.0
    """Interactive prompts are expected to come at their rate and so many standard deviations more."""
    most: int = 256
    """Filler requests in a replica that doesn't say how many it can work on."""
    unknown_slots: int = 8
    reserve_s: float = 1.0
    """Places are kept for the interactive requests of so long."""
    reserve: int = 1
    """And so many more, while interactive requests come at all."""


SLACK = SlackRules()


def filler_slots(load: ReplicaLoad, objective: Objective, rules: SlackRules = SLACK) -> int:
    """The number of filler requests that may be in flight in a replica now, including current ones.

    Fewer than are there means that none may enter.
    """
    slots = load.slots if load.slots is not None else rules.unknown_slots
    if load.batch_only:
        return min(slots if load.slots is not None else rules.most, _by_cache(load, 0.0))
    if load.queued > 0:
        return 0
    coming = load.arrivals * rules.reserve_s
    kept = math.ceil(coming) + rules.reserve if load.interactive or load.arrivals > 0 else 0
    kept = min(kept, max(slots // 2, 1))
    room = slots - load.interactive - kept
    room = min(room, _by_cache(load, (coming + rules.reserve) * load.kv_per_interactive if kept else 0.0))
    if load.interactive or load.arrivals > 0:
        room = min(room, int(load.limit), _by_steps(load, objective, rules))
    return max(room, 0)


def _by_cache(load: ReplicaLoad, kept: float) -> int:
    if load.kv_free is None:
        return 1 << 30
    return load.filler + max(math.floor((load.kv_free - kept) / max(load.kv_per_filler, 1.0)), 0)


def _by_steps(load: ReplicaLoad, objective: Objective, rules: SlackRules) -> int:
    """Fillers that fit into a step within the objective per token.

    With all of them decoding and the prompts of a burst between. An answer feels the mean step over the time that it
    takes: so long a burst counts.
    """
    if load.steps is None:
        return 1 << 30
    others = load.kv_used - load.filler * load.kv_per_filler
    alone = load.steps.seconds(0, load.interactive, max(others, 0.0))
    each = load.steps.batch + load.steps.kv * load.kv_per_filler + load.steps.prefill * load.filler_prefill
    over_s = max(load.answer * objective.tpot_s, 0.1)
    coming = load.arrivals + rules.burst * math.sqrt(load.arrivals / over_s)
    prefill = min(load.steps.prefill * coming * load.prompt, 1.0)  # share of the time
    left = objective.tpot_s * (1 - prefill if load.prompt > 0 else rules.margin) - alone
    if left <= 0:
        return 0
    return math.floor(left / each) if each > 0 else 1 << 30


def adapted(load: ReplicaLoad, objective: Objective, rules: SlackRules = SLACK) -> float:
    """The limit after one more interval of experience (about as long as a few requests take)."""
    used = 0.0
    if load.ttft_s is not None:
        used = load.ttft_s / objective.ttft_s
    if load.tpot_s is not None:
        used = max(used, load.tpot_s / objective.tpot_s)
    top = float(load.slots if load.slots is not None else rules.most)
    near = used > rules.over or load.queued > 0
    if near or load.late > rules.spare * (1 - objective.percentile):
        if load.since_fall_s < rules.settle_s:
            return min(load.limit, top)
        return max(min(load.limit, max(load.filler, 1)) * (rules.fall if near else rules.back_off), 0.5)
    if used <= rules.near and load.filler >= math.floor(load.limit):  # what was not tried, was not shown to be harmless
        return min(load.limit + 1.0, top)
    return min(load.limit, top)


class StepFit:
    """Fits `StepTime` to measured steps: recursive least squares that forgets slowly."""

    __slots__ = ("_cov", "_keep", "_theta", "seen")
    _SCALE = (1.0, 1e-3, 1e-1, 1e-5)
    """Brings the four inputs to about the same size."""

    def __init__(self, keep: float = 0.999) -> None:
        self._keep = keep
        self._theta = [0.0] * 4
        self._cov = [[1e4 if row == column else 0.0 for column in range(4)] for row in range(4)]
        self.seen = 0

    def observe(self, prefill: float, batch: float, kv: float, seconds: float) -> None:
        """One measured step: tokens of prefill in it, sequences, tokens in their caches, and how long it took."""
        x = [value * scale for value, scale in zip((1.0, prefill, batch, kv), self._SCALE, strict=True)]
        toward = [sum(row[column] * x[column] for column in range(4)) for row in self._cov]
        spread = self._keep + sum(x[index] * toward[index] for index in range(4))
        gain = [value / spread for value in toward]
        error = seconds - sum(self._theta[index] * x[index] for index in range(4))
        for row in range(4):
            self._theta[row] += gain[row] * error
        for row in range(4):
            for column in range(4):
                self._cov[row][column] = min(
                    max((self._cov[row][column] - gain[row] * toward[column]) / self._keep, -1e6), 1e6
                )
        self.seen += 1

    def fitted(self, enough: int = 32) -> StepTime | None:
        """The fitted step time, without negative terms; None before `enough` steps."""
        if self.seen < enough:
            return None
        base, prefill, batch, kv = (
            max(value * scale, 0.0) for value, scale in zip(self._theta, self._SCALE, strict=True)
        )
        return StepTime(base, prefill, batch, kv)
