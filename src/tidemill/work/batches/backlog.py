"""How much work the unfinished batches still are, by model and deadline.

What the fleet is planned for.
"""

from collections import defaultdict
from collections.abc import Iterable

from tidemill.engines.sse import BYTES_PER_TOKEN
from tidemill.store.batches import Batch, BatchStatus
from tidemill.tides.routing import POLICY, work_of
from tidemill.tides.state import BacklogView
from tidemill.work.batches.active_batch import ActiveBatch

MIN_DONE = 8
"""Lines that have to be done before their mean tells what the others will take."""
MAX_BACKLOG_PARTS = 64
"""Batches of one model that are told apart; what is due later is added to the last."""
UNKNOWN_LINE = work_of(512, 0, POLICY.expected_output)
"""A line of a batch of which nothing is known yet."""


def backlogs(batches: Iterable[ActiveBatch], waiting: Iterable[Batch]) -> list[BacklogView]:
    """What is left to do, the most urgent first. `waiting`: batches that are validated and not active yet."""
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for active in batches:
        if active.closing_since or active.finishing:
            continue
        each = line_work(active)
        for model in active.index.models:
            left = active.left(model)
            if left:
                parts[model].append((left * each, active.batch.expires_at.timestamp()))
    for batch in waiting:
        left = batch.total - batch.counts.completed - batch.counts.failed
        if batch.model is not None and batch.status is BatchStatus.IN_PROGRESS and left > 0:
            work = left * float(UNKNOWN_LINE.prefill + UNKNOWN_LINE.decode)
            parts[batch.model].append((work, batch.expires_at.timestamp()))
    return [BacklogView(model=model, parts=_most_urgent(parts[model])) for model in sorted(parts)]


def line_work(active: ActiveBatch) -> float:
    """The work of one line of a batch, tokens of prefill: the mean of those that are done.

    Before there are enough, by the bytes of the file.
    """
    counts = active.results.counts
    if counts.completed >= MIN_DONE and counts.input_tokens + counts.output_tokens > 0:
        work = counts.input_tokens - counts.cached_tokens + POLICY.decode_weight * counts.output_tokens
        return work / counts.completed
    prompt = active.index.mean_length // BYTES_PER_TOKEN
    work_each = work_of(prompt, 0, POLICY.expected_output)
    return float(work_each.prefill + work_each.decode)


def _most_urgent(parts: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    parts.sort(key=lambda part: part[1])
    if len(parts) <= MAX_BACKLOG_PARTS:
        return tuple(parts)
    rest = parts[MAX_BACKLOG_PARTS - 1 :]
    return (*parts[: MAX_BACKLOG_PARTS - 1], (sum(work for work, _ in rest), rest[0][1]))
