"""The mock engine's clock: streams in their batches, one token a beat, counted as they are written."""

import asyncio
from typing import Protocol

from mock_answers import Plan, usage_json, with_usage

PUMP_TOKENS = 64  # tokens in one write when the interval is 0


class Wire(Protocol):
    """What a stream needs of its connection."""

    paused: bool

    def write(self, data: bytes) -> None: ...
    def framed(self, data: bytes) -> bytes: ...
    def end(self, data: bytes, reason: str) -> None: ...
    def cut(self) -> None: ...


class Counters:
    """What was served since the start, the truth that a gateway's meter is held against."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.requests = 0
        self.running = 0
        self.aborted = 0  # the client hung up before the answer's end

    def text(self) -> bytes:
        """Prometheus text, under the names that vLLM uses."""
        label = '{engine="0",model_name="mock"}'
        rows = [
            ("vllm:prompt_tokens_total", "counter", label, self.prompt_tokens),
            ("vllm:generation_tokens_total", "counter", label, self.generation_tokens),
            ("vllm:prefix_cache_queries_total", "counter", label, self.prompt_tokens),
            ("vllm:prefix_cache_hits_total", "counter", label, self.cached_tokens),
            ("vllm:num_requests_running", "gauge", label, self.running),
            ("vllm:num_requests_waiting", "gauge", label, 0),
            ("mock_requests_total", "counter", "", self.requests),
            ("mock_aborted_total", "counter", "", self.aborted),
        ]
        lines = [f"# TYPE {name} {kind}\n{name}{labels} {value}\n" for name, kind, labels, value in rows]
        lines.append("# TYPE vllm:request_success_total counter\n")
        for reason, count in self.finished.items():
            labels = f'{{engine="0",finished_reason="{reason}",model_name="mock"}}'
            lines.append(f"vllm:request_success_total{labels} {count}\n")
        return "".join(lines).encode()


class Stream:
    """One streamed answer on its way."""

    def __init__(self, wire: Wire, clock: "Clock", counters: Counters, plan: Plan, ident: bytes) -> None:
        self._wire = wire
        self._clock = clock
        self._counters = counters
        self._plan = plan
        self._ident = ident
        self._token = ident.join(plan.token)
        self._frame = wire.framed(self._token)
        self._interval_s = (plan.behaviour.interval_ms or 0.0) / 1000
        self._sent = 0
        self.over = False

    def start(self) -> None:
        """The first token is reached: the role chunk leaves, and the beat starts."""
        if self.over:
            return
        plan = self._plan
        self._counters.prompt_tokens += plan.prompt_tokens
        self._counters.cached_tokens += plan.cached_tokens
        opening = self._ident.join(plan.opening)
        if opening:
            self._wire.write(self._wire.framed(self._counted(opening) if plan.usage_each_chunk else opening))
        if self._interval_s > 0:
            if self.step():
                self._clock.add(self, self._interval_s)
        else:
            self.pump()

    def step(self) -> bool:
        """Writes one token. False when no more steps are wanted."""
        if self.over:
            return False
        if self._wire.paused:  # the reader is slow: produce nothing that it does not take
            return True
        plan = self._plan
        if self._sent < plan.stops_after:
            self._sent += 1
            self._counters.generation_tokens += plan.choices
            if plan.usage_each_chunk:
                self._wire.write(self._wire.framed(self._counted(self._token)))
            else:
                self._wire.write(self._frame)
        if self._sent < plan.stops_after:
            return True
        self._stop()
        return False

    def pump(self) -> None:
        """Interval 0: as many tokens as the reader takes, several in one write."""
        if self.over or self._wire.paused:
            return
        plan = self._plan
        count = min(plan.stops_after - self._sent - 1, PUMP_TOKENS)
        if count > 0 and not plan.usage_each_chunk:
            self._sent += count
            self._counters.generation_tokens += count * plan.choices
            self._wire.write(self._frame * count)
        if self.step():
            self._clock.loop.call_soon(self.pump)

    def resume(self) -> None:
        """The reader takes bytes again."""
        if self._interval_s == 0:
            self._clock.loop.call_soon(self.pump)

    def _counted(self, events: bytes) -> bytes:
        plan = self._plan
        usage = usage_json(plan.prompt_tokens, self._sent * plan.choices, plan.cached_tokens)
        return with_usage(events, usage, b"\r\n" if plan.behaviour.crlf else b"\n")

    def _stop(self) -> None:
        plan, how = self._plan, self._plan.behaviour
        if how.die_after is not None and self._sent == max(0, how.die_after):
            self.over = True
            self._wire.cut()
        elif how.hang_after is not None and self._sent == how.hang_after:
            pass  # stays open, and counts as aborted when the client leaves
        elif how.error_after is not None and self._sent == how.error_after:
            self.over = True
            self._wire.end(plan.error_event + plan.done, "error")
        else:
            self.over = True
            self._wire.end(self._ident.join(plan.closing) + plan.done, plan.finish_reason)


class Ticker:
    """One timer for a batch of streams of equal interval. It keeps its beat on average."""

    def __init__(self, loop: asyncio.AbstractEventLoop, interval_s: float) -> None:
        self._loop = loop
        self._interval_s = interval_s
        self._due = 0.0
        self.streams: list[Stream] = []

    def add(self, stream: Stream) -> None:
        if not self.streams:
            self._due = self._loop.time() + self._interval_s
            self._loop.call_at(self._due, self._beat)
        self.streams.append(stream)

    def _beat(self) -> None:
        self.streams = [stream for stream in self.streams if stream.step()]
        if self.streams:
            self._due = max(self._due + self._interval_s, self._loop.time())  # late: no burst to catch up
            self._loop.call_at(self._due, self._beat)


class Clock:
    """All tickers. `batch` streams share one, as the sequences of an engine share a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop, batch: int) -> None:
        self.loop = loop
        self._batch = batch
        self._tickers: dict[float, list[Ticker]] = {}

    def add(self, stream: Stream, interval_s: float) -> None:
        """The stream's next token comes with the next beat of a ticker that has room."""
        group = self._tickers.setdefault(interval_s, [])
        for ticker in group:
            if len(ticker.streams) < self._batch:
                ticker.add(stream)
                return
        group.append(Ticker(self.loop, interval_s))
        group[-1].add(stream)
