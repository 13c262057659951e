"""Load generator: closed loops, paced arrivals, and many open streams. Prints one JSON object.

    python bench/loadgen.py closed  --url http://127.0.0.1:8080 --key sk-... --connections 64 --seconds 2
    python bench/loadgen.py closed  --url ... --connections 64 --seconds 2 --rate 500
    python bench/loadgen.py streams --url ... --streams 64 --chunks 300 --seconds 2

`--tree PID` also measures the processor time and memory of that process and its children over the
very same span. Each answer is checked (status, whole, [DONE] seen, no token missing); what failed
is counted under `failures`, and the exit status is 1 when anything did.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import uvloop

import proc
from load_client import Connection, Outcome, Tally, connect

OPENING_AT_ONCE = 32  # streams that may wait for their first event while the load is built up
WINDOW_AFTER_OPEN_S = 0.2
DRAIN_LIMIT_S = 20.0  # after the window, for streams to reach their end


class Target:
    """Where the load goes, and the one request that is sent again and again."""

    def __init__(self, args: argparse.Namespace) -> None:
        url = urlsplit(args.url)
        self.host, self.port = url.hostname or "127.0.0.1", url.port or 80
        self.stream = args.mode == "streams" or args.stream
        self.chunks: int = args.chunks
        body: dict[str, Any] = {
            "model": args.model,
            "messages": [{"role": "user", "content": " ".join(["tide"] * args.prompt_words)}],
            "max_tokens": self.chunks,
        }
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if args.mock:
            body["mock"] = json.loads(args.mock)
        data = json.dumps(body).encode()
        head = (
            f"POST {url.path.rstrip('/')}/v1/chat/completions HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n"
            f"authorization: Bearer {args.key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(data)}\r\n\r\n"
        )
        self.request = head.encode() + data


class Span:
    """The measured stretch of a run: processor time of the tree, events, wall time."""

    def __init__(self, root: int | None, tally: Tally) -> None:
        self._root = root
        self._tally = tally
        self._cpu_before = proc.cpu_times(root) if root else []
        self._events_before = tally.events
        self.began = time.perf_counter()
        self.ended = 0.0
        self.events = 0
        self._cpu: list[proc.ProcessTime] = []

    def end(self) -> None:
        self.ended = time.perf_counter()
        self.events = self._tally.events - self._events_before
        if self._root:
            self._cpu = proc.cpu_between(self._cpu_before, proc.cpu_times(self._root))

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def cpu(self) -> dict[str, Any] | None:
        if not self._root:
            return None
        each = [{"pid": p.pid, "command": p.command, "us": round(p.cpu_us, 1)} for p in self._cpu]
        return {"us": round(sum(p.cpu_us for p in self._cpu), 1), "processes": each}


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 4)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0), "count": len(ordered)}


class ClosedLoop:
    """C connections; each sends its next request when its last is answered, or, with a rate, when one
    arrives (Poisson, same seed each time, so that two runs see the same arrivals)."""

    def __init__(self, target: Target, args: argparse.Namespace) -> None:
        self._target = target
        self._args = args
        self._loop = asyncio.get_running_loop()
        self._tally = Tally()
        self._outcomes: list[Outcome] = []
        self._idle: deque[Connection] = deque()
        self._due: deque[float] = deque()  # arrivals that wait for a free connection
        self._in_flight = 0
        self._answered = 0
        self._stopping = False
        self._left: int | None = args.requests
        self._over = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        args = self._args
        for _ in range(args.connections):
            self._idle.append(await connect(self._target.host, self._target.port, self._tally))
        arrivals = asyncio.create_task(self._arrive(args.rate)) if args.rate else None
        span = Span(args.tree, self._tally)
        if not args.rate:
            for _ in range(args.connections):
                self._start(self._idle.popleft(), time.perf_counter())
        if args.requests is None:
            await asyncio.sleep(args.warmup)
            self._outcomes.clear()
            span = Span(args.tree, self._tally)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), args.seconds)
        span.end()
        self._stopping = True
        if arrivals:
            arrivals.cancel()
        until = time.perf_counter() + DRAIN_LIMIT_S
        while self._in_flight and time.perf_counter() < until:
            await asyncio.sleep(0.01)
        if self._in_flight:
            self._tally.failures["never answered"] += self._in_flight
        done = [o for o in self._outcomes if not o.problem and span.began <= o.done_at <= span.ended]
        result = _result("closed", span, self._tally, done)
        result["requests"] = len(done)
        result["answered"] = self._answered  # from the first to the last, warm-up too
        result["requests_per_s"] = round(len(done) / span.seconds, 1)
        result["waiting_at_end"] = len(self._due)
        return result

    def _start(self, connection: Connection, at: float) -> None:
        if self._left is not None:
            if self._left <= 0:
                self._over.set()
                return
            self._left -= 1
        self._in_flight += 1

        def finished(outcome: Outcome) -> None:
            self._in_flight -= 1
            self._answered += not outcome.problem
            self._outcomes.append(outcome)
            if not connection.usable:
                self._loop.create_task(self._replace())
            else:
                self._next(connection)

        connection.send(self._target.request, self._target.stream, at, finished)

    def _next(self, connection: Connection) -> None:
        if self._stopping:
            return
        if not self._args.rate:
            self._start(connection, time.perf_counter())
        elif self._due:
            self._start(connection, self._due.popleft())
        else:
            self._idle.append(connection)

    async def _replace(self) -> None:
        try:
            connection = await connect(self._target.host, self._target.port, self._tally)
        except OSError:
            self._tally.failures["connection refused"] += 1
            await asyncio.sleep(0.1)
            if not self._stopping:
                self._loop.create_task(self._replace())
            return
        self._next(connection)

    async def _arrive(self, rate: float) -> None:
        """Timers have a grain of a millisecond: what is due by now is sent together. Latency counts from
        here, also for those that find no free connection."""
        chance = random.Random(1)
        due = time.perf_counter()
        while True:
            now = time.perf_counter()
            while due <= now:
                due += chance.expovariate(rate)
                while self._idle and not self._idle[0].usable:
                    self._idle.popleft()
                    self._loop.create_task(self._replace())
                if self._idle:
                    self._start(self._idle.popleft(), now)
                else:
                    self._due.append(now)
            await asyncio.sleep(max(0.001, due - now))


async def run_streams(target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """Opens S streams, measures while all of them flow, lets each reach its end and checks it."""
    tally = Tally()
    outcomes: list[Outcome] = []
    ended: list[Outcome] = []
    connections: list[Connection] = []
    before = proc.memory(args.tree) if args.tree else None
    opening = time.perf_counter()
    while len(outcomes) < args.streams:
        if sum(not o.first_at and not o.done_at for o in outcomes[-4 * OPENING_AT_ONCE :]) >= OPENING_AT_ONCE:
            await asyncio.sleep(0.001)
            continue
        connection = await connect(target.host, target.port, tally)
        connections.append(connection)
        outcomes.append(connection.send(target.request, True, time.perf_counter(), ended.append))
    while any(not o.first_at and not o.done_at for o in outcomes):
        await asyncio.sleep(0.005)
    opened_s = time.perf_counter() - opening
    open_at_start = len(outcomes) - len(ended)
    await asyncio.sleep(WINDOW_AFTER_OPEN_S)
    span = Span(args.tree, tally)
    until = span.began + args.seconds
    while not ended and time.perf_counter() < until:
        await asyncio.sleep(0.005)
    span.end()
    during = proc.memory(args.tree) if args.tree else None
    until = time.perf_counter() + min(DRAIN_LIMIT_S, args.drain)
    while len(ended) < len(outcomes) and time.perf_counter() < until:
        await asyncio.sleep(0.02)
    cut = len(outcomes) - len(ended)
    checked = list(ended)
    short = sum(not o.problem and o.events < target.chunks for o in checked)
    if short:
        tally.failures["tokens missing"] += short
    failures = tally.failures.copy()
    for connection in connections:
        connection.close()
    tally.failures = failures  # closing what we cut off ourselves is no failure
    result = _result("streams", span, tally, checked)
    result |= {
        "streams": len(outcomes),
        "open_at_start": open_at_start,
        "opened_s": round(opened_s, 3),
        "complete": sum(not o.problem for o in checked) - short,
        "cut": cut,
        "ttft_ms": quantiles_ms([o.first_at - o.sent_at for o in outcomes if o.first_at]),
    }
    if before and during:
        result["memory"] = {
            "before": before._asdict(),
            "during": during._asdict(),
            "kib_per_stream": round((during.pss_kib - before.pss_kib) / max(1, open_at_start), 2),
        }
    return result


def _result(mode: str, span: Span, tally: Tally, done: Sequence[Outcome]) -> dict[str, Any]:
    first = [o.first_at - o.sent_at for o in done if o.first_at]
    return {
        "mode": mode,
        "seconds": round(span.seconds, 4),
        "events": span.events,
        "events_per_s": round(span.events / span.seconds, 1),
        "latency_ms": quantiles_ms([o.done_at - o.sent_at for o in done]),
        "ttft_ms": quantiles_ms(first),
        "failures": dict(tally.failures),
        "cpu": span.cpu(),
    }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    target = Target(args)
    if args.mode == "streams":
        return await run_streams(target, args)
    return await ClosedLoop(target, args).run()


def main() -> None:
    parser = argparse.ArgumentParser(description="load generator for OpenAI-compatible servers")
    parser.add_argument("mode", choices=["closed", "streams"])
    parser.add_argument("--url", required=True, help="without /v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--model", default="mock")
    parser.add_argument("--prompt-words", type=int, default=12)
    parser.add_argument("--chunks", type=int, default=16, help="max_tokens of each request")
    parser.add_argument("--mock", default="", help="JSON for the body's field `mock` (see mock_answers.py)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the measured span")
    parser.add_argument("--tree", type=int, help="measure this process and its children")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--requests", type=int, help="closed: send so many, without a warm-up")
    parser.add_argument("--rate", type=float, help="closed: requests per second, Poisson arrivals")
    parser.add_argument("--stream", action="store_true", help="closed: streamed requests")
    parser.add_argument("--warmup", type=float, default=0.3, help="closed: seconds before the measured span")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--drain", type=float, default=DRAIN_LIMIT_S, help="streams: seconds left to finish")
    args = parser.parse_args()
    proc.raise_open_files()
    result = uvloop.run(run(args))
    print(json.dumps(result))
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
