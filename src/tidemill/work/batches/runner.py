"""The batch runner: lines of batches go through the platform's own data plane.

As many at a time as there is slack.

The data plane meters and bills a line as it does any request, under a request id that is the line's own. What is
recorded of a line, and when it is run again, is written down in docs/batch.md.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import msgspec
import structlog

from tidemill.clock import PROCESS_CLOCK
from tidemill.errors import Unavailable
from tidemill.store.batches import Batch, BatchStatus
from tidemill.tides.state import BacklogView
from tidemill.work.batches.active_batch import ActiveBatch
from tidemill.work.batches.attempt import (
    BROKE,
    LONGEST_WAIT_S,
    LineCall,
    LineDone,
    NoAnswer,
    RetryLater,
    SendLine,
    judge,
    judge_lost,
    refused,
)
from tidemill.work.batches.backlog import backlogs
from tidemill.work.batches.lifecycle import Lifecycle
from tidemill.work.batches.lines import decode_line
from tidemill.work.batches.results import request_id
from tidemill.work.batches.slack import Slack

log = structlog.get_logger()

LOOK_EVERY_S = 0.5
"""How often the store is asked for new batches, and told how far the others have come."""
SYNC_EVERY_S = 1.0
MAX_ACTIVE = 128
ACTIVE_PER_MODEL = 16
"""Active batches, each with its index in memory: 5 MB for 50,000 lines. The others wait, once they are validated."""
AT_A_TIME = 2
"""Batches that are validated or put away at a time."""
BATCH_FINISH_S = 600.0
"""How long lines in flight may go on once their batch was cancelled or has expired."""
SWEEP_EVERY_S = 30.0
ORPHANS_EVERY_S = 3600.0
CAREFUL_LINES = 16
"""So many lines of a tenant run one after the other once its balance did not cover one: what lines in flight together
hold may be far more than they will cost."""
HOLD_S = 30.0
"""How long a batch rests that could not be worked on for a fault of the platform."""

_decode_stream = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class TenantPause(msgspec.Struct):
    """A tenant's lines for a model rest: they were refused for a while."""

    until: float = 0.0
    refusals: int = 0


class BatchRunner:
    """Works on the batches of one site. There is one runner for a site (its process holds a lock)."""

    def __init__(
        self, lifecycle: Lifecycle, send: SendLine, slack: Slack, names: Callable[[], Mapping[str, str]]
    ) -> None:
        self._lifecycle = lifecycle
        self._send = send
        self._slack = slack
        self._names = names
        self._active: dict[str, ActiveBatch] = {}
        self._busy: dict[str, asyncio.Task[None]] = {}
        """Batches that are being opened or sealed."""
        self._few = asyncio.Semaphore(AT_A_TIME)
        self._held: dict[str, float] = {}
        """Batches that rest, and until when."""
        self._running: Counter[str] = Counter()
        """Lines in flight, by model."""
        self._alone: set[str] = set()
        """Models that a line is tried alone on."""
        self._pauses: dict[tuple[str, str], TenantPause] = {}
        """By tenant and model."""
        self._careful: dict[str, int] = {}
        """Tenants whose balance is scarce, and after how many lines more they are believed to have one again."""
        self._wake = asyncio.Event()
        self._look_again = asyncio.Event()
        self._sweep_orphans_at = 0.0
        self._unheld: list[Batch] = []
        """Batches that are validated and wait until there is room for them."""
        self._full = False
        """The disk has refused a result: no line is begun until it is recorded."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set. What runs then goes on; see `close`."""
        chores = [
            asyncio.create_task(_every(LOOK_EVERY_S, self._look, self._look_again)),
            asyncio.create_task(_every(SYNC_EVERY_S, self._sync)),
            asyncio.create_task(_every(SWEEP_EVERY_S, self._sweep)),
        ]
        stopped = asyncio.create_task(stop.wait())
        while not stop.is_set():
            self._dispatch()
            waking = asyncio.create_task(self._wake.wait())
            await asyncio.wait([waking, stopped], timeout=LOOK_EVERY_S / 2, return_when=asyncio.FIRST_COMPLETED)
            waking.cancel()
            self._wake.clear()
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)

    async def close(self, grace_s: float) -> None:
        """Let lines in flight end for `grace_s` seconds and record them; the others will be run again."""
        lines = [task for active in self._active.values() for task in active.running.values()]
        if lines:
            await asyncio.wait(lines, timeout=grace_s)
        for task in lines:
            task.cancel()
        await asyncio.gather(*lines, *self._busy.values(), return_exceptions=True)
        for active in self._active.values():
            try:
                active.results.sync()
                self._lifecycle.note(active)
            except (OSError, Unavailable) as error:
                log.warning("a batch is left as it is on disk", batch=active.batch.batch_id, reason=str(error))
            active.close()

    def cut_off(self) -> None:
        """Have `close` wait no longer for lines in flight."""
        for active in self._active.values():
            for task in active.running.values():
                task.cancel()

    def wake(self) -> None:
        """The slack has changed: look for lines to begin."""
        self._wake.set()

    def backlogs(self) -> list[BacklogView]:
        """The work that is left, by model, the most urgent first."""
        return backlogs(self._active.values(), self._unheld)

    # What is to be done

    async def _look(self) -> None:
        """Find new batches, cancelled and expired ones; tell the store how far the others are."""
        loop = asyncio.get_running_loop()
        found = await asyncio.to_thread(self._lifecycle.open)
        self._unheld = [batch for batch in found if batch.batch_id not in self._active]
        for batch in found:
            active = self._active.get(batch.batch_id)
            if active is None:
                rests = batch.batch_id in self._busy or self._held.get(batch.batch_id, 0.0) > loop.time()
                if not rests and (batch.in_progress_at is None or self._may_take(batch)):
                    self._begin(batch.batch_id, self._take(batch))
            elif batch.status is BatchStatus.CANCELLING:
                active.close_as(BatchStatus.CANCELLED, loop.time())
        for active in list(self._active.values()):
            if active.batch.expires_at.timestamp() <= PROCESS_CLOCK.seconds():
                active.close_as(BatchStatus.EXPIRED, loop.time())
            if active.closing_since and loop.time() - active.closing_since > BATCH_FINISH_S:
                for task in active.running.values():
                    task.cancel()
            async with active.lock:
                if not active.finishing:
                    await asyncio.to_thread(self._lifecycle.note, active)

    def _dispatch(self) -> None:
        """Begin as many lines as there are slots for, the most urgent batch's first.

        End batches that are done.
        """
        now = asyncio.get_running_loop().time()
        batches = sorted(self._active.values(), key=lambda active: active.deadline)
        if not self._full:
            for model in sorted({model for active in batches for model in active.index.models}):
                self._fill(model, batches, now)
        for active in batches:
            if active.idle and self._held.get(active.batch.batch_id, 0.0) <= now:
                active.finishing = True
                self._begin(active.batch.batch_id, self._put_away(active))

    def _fill(self, model: str, batches: list[ActiveBatch], now: float) -> None:
        free = self._slack.slots(model) - self._running[model]
        if free <= 0 or model in self._alone:
            return
        batches = [active for active in batches if not self._paused(active.batch.tenant_id, model, now)]
        for active in batches:
            suspect = active.next_suspect(model, now)
            if suspect is not None:
                if not self._running[model]:  # else wait until those in flight have ended
                    active.take_suspect(model)
                    self._alone.add(model)
                    self._start(active, suspect, model)
                return
        for active in batches:
            tenant_id = active.batch.tenant_id
            while free > 0 and not (tenant_id in self._careful and self._in_flight(tenant_id)):
                place = active.next_place(model, now)
                if place is None:
                    break
                free -= 1
                self._start(active, place, model)

    def _start(self, active: ActiveBatch, place: int, model: str) -> None:
        self._running[model] += 1
        active.running[place] = asyncio.create_task(self._work_on(active, place, model))

    # A line

    async def _work_on(self, active: ActiveBatch, place: int, model: str) -> None:
        now = asyncio.get_running_loop().time
        try:
            custom_id, verdict = await self._attempt(active, place)
            if isinstance(verdict, RetryLater):
                active.put_back(place, now() + verdict.after_s)
                if verdict.pause:
                    self._pause(active.batch.tenant_id, model, verdict.after_s)
            else:
                self._succeeded(active.batch.tenant_id, model)
                self._record(active, place, custom_id, verdict)
        except asyncio.CancelledError:
            active.put_back(place, now())
            raise
        except Exception:
            log.exception("a line of a batch failed inside Tidemill", batch=active.batch.batch_id, place=place)
            active.put_back(place, now() + HOLD_S)
        finally:
            del active.running[place]
            self._running[model] -= 1
            if not self._running[model]:
                self._alone.discard(model)
            self._wake.set()

    async def _attempt(self, active: ActiveBatch, place: int) -> tuple[str, RetryLater | LineDone]:
        custom_id, url, body = decode_line(await asyncio.to_thread(active.read, place))
        batch, tries = active.batch, active.tries(place)
        named = request_id(batch.batch_id, active.index.numbers[place])
        if bytes(_decode_stream(body).get("stream", b"false")) == b"true":
            return custom_id, refused("Streaming is not supported in batches. Leave out 'stream'.", named, "stream")
        call = LineCall(path=url, body=bytes(body), tenant_id=batch.tenant_id, key_id=batch.key_id, request_id=named)
        try:
            answer = await self._send(call)
        except NoAnswer as lost:
            return custom_id, judge_lost(lost, tries)
        if answer.status == BROKE:
            self._careful[batch.tenant_id] = CAREFUL_LINES
        return custom_id, judge(answer, named, tries, alone=self._in_flight(batch.tenant_id) == 1)

    def _record(self, active: ActiveBatch, place: int, custom_id: str, done: LineDone) -> None:
        try:
            active.record(place, custom_id, done)
        except OSError as error:
            self._full = True
            active.unrecorded[place] = (custom_id, done)
            log.error("a result cannot be recorded; no line is started until it is", reason=error.strerror)

    def _succeeded(self, tenant_id: str, model: str) -> None:
        """The data plane has not turned a line away."""
        self._pauses.pop((tenant_id, model), None)
        if tenant_id in self._careful:
            self._careful[tenant_id] -= 1
            if not self._careful[tenant_id]:
                del self._careful[tenant_id]

    def _pause(self, tenant_id: str, model: str, after_s: float) -> None:
        pause = self._pauses.setdefault((tenant_id, model), TenantPause())
        now = asyncio.get_running_loop().time()
        if pause.until <= now:  # else it is one of those that were refused together
            pause.refusals += 1
            pause.until = now + min(max(after_s, 0.25 * 2**pause.refusals), LONGEST_WAIT_S)

    def _paused(self, tenant_id: str, model: str, now: float) -> bool:
        pause = self._pauses.get((tenant_id, model))
        return pause is not None and pause.until > now

    def _in_flight(self, tenant_id: str) -> int:
        return sum(len(active.running) for active in self._active.values() if active.batch.tenant_id == tenant_id)

    # Batches and chores

    async def _take(self, batch: Batch) -> None:
        async with self._few:
            active = await asyncio.to_thread(self._lifecycle.take, batch, self._names())
        if active is not None and self._may_take(active.batch):
            self._active[batch.batch_id] = active
        elif active is not None:
            active.close()

    def _may_take(self, batch: Batch) -> bool:
        """There is room for one more active batch. One that is to end at once always has it."""
        if batch.outcome is not None or batch.status is BatchStatus.CANCELLING:
            return True
        if batch.expires_at.timestamp() <= PROCESS_CLOCK.seconds():
            return True
        alike = sum(active.batch.model == batch.model for active in self._active.values())
        return len(self._active) < MAX_ACTIVE and alike < ACTIVE_PER_MODEL

    async def _put_away(self, active: ActiveBatch) -> None:
        try:
            async with self._few, active.lock:
                await asyncio.to_thread(self._lifecycle.put_away, active)
        except BaseException:
            active.finishing = False
            raise
        del self._active[active.batch.batch_id]
        self._look_again.set()

    def _begin(self, batch_id: str, doing: Coroutine[Any, Any, None]) -> None:
        self._busy[batch_id] = asyncio.create_task(self._guarded(batch_id, doing))

    async def _guarded(self, batch_id: str, doing: Coroutine[Any, Any, None]) -> None:
        """What goes wrong with one batch is no other's business; it rests, and is tried again."""
        try:
            await doing
            self._held.pop(batch_id, None)
        except Exception as error:
            rest_s = 1.0 if isinstance(error, Unavailable) else HOLD_S
            self._held[batch_id] = asyncio.get_running_loop().time() + rest_s
            log.exception("a batch cannot continue for now", batch=batch_id)
        finally:
            del self._busy[batch_id]
            self._wake.set()

    async def _sync(self) -> None:
        """Put results on disk, also those that it had no room for."""
        still_full = False
        for active in list(self._active.values()):
            for place, (custom_id, done) in list(active.unrecorded.items()):
                try:
                    active.record(place, custom_id, done)
                except OSError:
                    still_full = True
                    break
                del active.unrecorded[place]
            async with active.lock:
                if not active.finishing:
                    await asyncio.to_thread(active.results.sync)
        self._full = still_full
        self._wake.set()

    async def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        orphans = now >= self._sweep_orphans_at
        await asyncio.to_thread(self._lifecycle.sweep, orphans=orphans)
        if orphans:
            self._sweep_orphans_at = now + ORPHANS_EVERY_S


async def _every(seconds: float, chore: Callable[[], Awaitable[None]], sooner: asyncio.Event | None = None) -> None:
    sooner = sooner or asyncio.Event()
    while True:
        sooner.clear()
        try:
            await chore()
        except Unavailable as error:
            log.warning("the store does not answer; batches go on where they can", reason=str(error))
            await asyncio.sleep(1.0)
        except Exception:
            log.exception("a chore of the batch runner failed")
            await asyncio.sleep(1.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await sooner.wait()
