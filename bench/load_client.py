"""The load generator's client: keep-alive connections on asyncio protocols, each answer checked."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import cast

import httptools

EVENT = b"data: "
DONE = b"[DONE]"


class Outcome:
    """One request: when it was sent, what came back. Times are `time.perf_counter` seconds."""

    __slots__ = ("done_at", "events", "first_at", "problem", "saw_done", "sent_at")

    def __init__(self, sent_at: float) -> None:
        self.sent_at = sent_at
        self.first_at = 0.0  # the first event of a stream, or the first byte of a body
        self.done_at = 0.0
        self.events = 0
        self.saw_done = False
        self.problem = ""  # empty when all is well


class Tally:
    """What happened since the start; a measurement takes the difference of two readings."""

    def __init__(self) -> None:
        self.events = 0
        self.failures: Counter[str] = Counter()


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._outcome: Outcome | None = None
        self._finished: Callable[[Outcome], None] | None = None
        self._stream = False
        self._tail = b""

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, stream: bool, at: float, finished: Callable[[Outcome], None]) -> Outcome:
        """Sends; `finished` is called once, with the outcome that is returned here at once."""
        assert self._outcome is None and self._transport is not None
        self._outcome = outcome = Outcome(at)
        self._finished = finished
        self._stream = stream
        self._tail = b""
        self._transport.write(request)
        return outcome

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio calls these
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as wrong:
            self._end(f"not HTTP: {wrong}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end("connection lost")

    # httptools calls these
    def on_body(self, body: bytes) -> None:
        outcome = self._outcome
        if outcome is None:
            return
        if not self._stream:
            self._tail += body
            return
        if not outcome.first_at:
            outcome.first_at = time.perf_counter()
        text = self._tail + body
        count = text.count(EVENT)
        outcome.events += count
        self._tally.events += count
        if DONE in text:
            outcome.saw_done = True
        self._tail = text[1 - len(EVENT) :]

    def on_message_complete(self) -> None:
        outcome = self._outcome
        status = self._parser.get_status_code()
        keep_alive = self._parser.should_keep_alive()
        if outcome is None or status < 200:
            return
        problem = ""
        if status != 200:
            problem = f"status {status}"
        elif self._stream and not outcome.saw_done:
            problem = "no [DONE]"
        elif not self._stream and not (b'"choices"' in self._tail and b'"usage"' in self._tail):
            problem = "not an answer"
        if not keep_alive:
            self.close()
        self._end(problem)

    def _end(self, problem: str) -> None:
        outcome, finished = self._outcome, self._finished
        if outcome is None or finished is None:
            return
        self._outcome = self._finished = None
        outcome.done_at = time.perf_counter()
        outcome.problem = problem
        if problem:
            self._tally.failures[problem] += 1
        finished(outcome)


async def connect(host: str, port: int, tally: Tally) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(tally), host, port)
    return connection
