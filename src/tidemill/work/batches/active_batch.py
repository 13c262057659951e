"""A batch that is worked on: which of its lines are done, which run, which wait."""

import asyncio
import heapq
import math
import os
from collections import deque
from datetime import datetime

from tidemill.store.batches import Batch, BatchStatus, LineCounts
from tidemill.tides.batch_order import BatchLineView, order
from tidemill.work.batches.attempt import SUSPECT_AFTER, LineDone, LineTries
from tidemill.work.batches.lines import LineIndex, decode_line
from tidemill.work.batches.results import LineFailure, ResultLine, Results, entry_id

_GIVEN_UP = {
    BatchStatus.EXPIRED: LineFailure(
        "batch_expired", "This request could not be executed before the completion window expired."
    ),
    BatchStatus.CANCELLED: LineFailure("batch_cancelled", "The batch was cancelled before this request was executed."),
}


class ActiveBatch:
    """The state of one batch that is worked on. A line is known by its place in the index."""

    def __init__(self, batch: Batch, index: LineIndex, input_fd: int, results: Results) -> None:
        self.batch = batch
        self.index = index
        self.results = results
        self.running: dict[int, asyncio.Task[None]] = {}
        self.unrecorded: dict[int, tuple[str, LineDone]] = {}
        """Results that the disk had no room for, each with the line's custom id."""
        self.noted = LineCounts()
        """The counts that the store knows."""
        self.outcome = BatchStatus.COMPLETED
        self.closing_since = 0.0
        """Loop time at which the batch was cancelled or expired: no line is begun any more."""
        self.finishing = False
        self.lock = asyncio.Lock()
        """Held while a thread works with its results, beside their recording."""
        self._input_fd = input_fd
        self._tries: dict[int, LineTries] = {}
        self._waiting: dict[str, deque[int]] = {model: deque() for model in index.models}
        self._later: dict[str, list[tuple[float, int]]] = {model: [] for model in index.models}
        self._suspects: dict[str, list[tuple[float, int]]] = {model: [] for model in index.models}
        """Lines that were lost with their engine, more than once: each is tried alone."""
        for place in in_order(index, batch.expires_at.timestamp()):
            if index.numbers[place] not in results.done:
                self._waiting[index.model(place)].append(place)

    @property
    def deadline(self) -> tuple[datetime, datetime, str]:
        """What the most urgent batch has least of."""
        return self.batch.expires_at, self.batch.created_at, self.batch.batch_id

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing more will be begun."""
        if self.running or self.unrecorded or self.finishing:
            return False
        if self.closing_since:
            return True
        return not any(any(lines.values()) for lines in (self._waiting, self._later, self._suspects))

    def left(self, model: str) -> int:
        """Lines of a model that have no result yet."""
        waiting = sum(len(lines[model]) for lines in (self._waiting, self._later, self._suspects) if model in lines)
        return waiting + sum(1 for place in self.running if self.index.model(place) == model)

    def close_as(self, outcome: BatchStatus, now: float) -> None:
        """Begin no more lines: the batch is cancelled, or its time is over."""
        if not self.closing_since and not self.finishing:
            self.closing_since = now
            self.outcome = outcome

    def next_place(self, model: str, now: float) -> int | None:
        """Take the next line for a model; None when none is to be begun now."""
        if self.closing_since or self.finishing:
            return None
        later = self._later.get(model)
        if later and later[0][0] <= now:
            return heapq.heappop(later)[1]
        waiting = self._waiting.get(model)
        return waiting.popleft() if waiting else None

    def next_suspect(self, model: str, now: float) -> int | None:
        """The next line to be tried alone; None when there is none now. It is taken by `take_suspect`."""
        suspects = self._suspects.get(model)
        if self.closing_since or self.finishing or not suspects or suspects[0][0] > now:
            return None
        return suspects[0][1]

    def take_suspect(self, model: str) -> None:
        heapq.heappop(self._suspects[model])

    def put_back(self, place: int, not_before: float) -> None:
        """Try a line again later."""
        lines = self._suspects if self.tries(place).lost >= SUSPECT_AFTER else self._later
        heapq.heappush(lines[self.index.model(place)], (not_before, place))

    def tries(self, place: int) -> LineTries:
        return self._tries.setdefault(place, LineTries())

    def read(self, place: int) -> bytes:
        """The line, from its file. Blocking."""
        return self.index.read(self._input_fd, place)

    def record(self, place: int, custom_id: str, done: LineDone) -> None:
        """Write a line's result down. Blocking for a moment. Raises OSError; then it is not written."""
        number = self.index.numbers[place]
        entry = ResultLine(entry_id(self.batch.batch_id, number), custom_id, done.response, done.failure)
        self.results.record(number, entry, done.usage)
        self._tries.pop(place, None)

    def give_up_rest(self) -> None:
        """Write down that the lines without a result were not executed.

        Blocking. Raises OSError; may be repeated.
        """
        if self.outcome is BatchStatus.EXPIRED and len(self.results.done) == len(self.index):
            self.outcome = BatchStatus.COMPLETED  # the last line was just in time
        failure = _GIVEN_UP.get(self.outcome)
        if failure is None:
            return
        for place, number in enumerate(self.index.numbers):
            if number not in self.results.done:
                self.record(place, decode_line(self.read(place))[0], LineDone(None, failure))

    def close(self) -> None:
        self.results.close()
        os.close(self._input_fd)


def in_order(index: LineIndex, deadline: float) -> list[int]:
    """The places of a batch's lines in the order to send them.

    As they come in the file, but those whose prompts begin alike one after the other, so that an engine computes the
    beginning once.
    """
    if not any(index.beginnings):
        return list(range(len(index)))
    lines = [BatchLineView(0.0, deadline, str(each) if each else "") for each in index.beginnings]
    return order(lines, 0.0, math.inf)
