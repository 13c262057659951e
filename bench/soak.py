"""`make soak`: a thousand streams open at once, for five minutes, and what becomes of the gateway's memory.

    .venv/bin/python bench/soak.py [--seconds 300] [--streams 1000] [--interval-ms 200] [--json FILE]

Half of the streams are open from the beginning to the end; the others end after 5 to 30 seconds, and another takes the
place of each. So both what a gateway keeps of an open stream, and what it keeps of one that has ended, would show as
growth. Every stream is checked as in the other benchmarks: whole, `[DONE]`, no token missing. The exit status is 1
when one is not, or when the memory is not steady.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop

import contestants
import peers
import proc
from load_client import Connection, Outcome, Tally, connect

OPENED_A_SECOND = 200
SHORT_S = (5.0, 30.0)
SPARE_S = 2.0  # a busy machine opens them more slowly, and all shall be open to the end of the measurement
WARM_UP_SHARE = 0.25
"""Of the time: until then buffers, caches and the allocator's pools reach their size."""
STEADY_BYTES_PER_STREAM = 4 * 1024
"""Growth from the first to the last fifth of the time after the warm-up; more is not steady. A stream
carries 1.2 MB of text in five minutes, so a gateway that keeps it is far beyond."""
TOKEN = " tide" * 160  # 800 bytes
DRAIN_S = 30.0


class Soak:
    """The streams, and the memory of the gateway beside them."""

    def __init__(self, port: int, key: str, root: int, args: argparse.Namespace) -> None:
        self._port, self._key, self._root = port, key, root
        self._streams: int = args.streams
        self._seconds: float = args.seconds
        self._interval_s: float = args.interval_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._chance = random.Random(1)
        self._stopping = False
        self._ends_at = 0.0
        self._open: dict[Outcome, int] = {}
        """The streams that flow, and how many tokens each shall have."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.tally = Tally()
        self.ended = 0
        self.samples: list[dict[str, float]] = []

    async def run(self) -> None:
        began = time.perf_counter()
        self._ends_at = began + 2 * self._streams / OPENED_A_SECOND + SPARE_S + self._seconds
        for number in range(self._streams):
            await self._begin(whole_time=number % 2 == 0)
            await asyncio.sleep(max(0.0, began + number / OPENED_A_SECOND - time.perf_counter()))
        began = time.perf_counter()
        while (at := time.perf_counter() - began) < self._seconds:
            memory = await asyncio.to_thread(self._memory)
            self.samples.append({"at_s": round(at, 1), "open": len(self._open), **memory})
            _say(self.samples[-1], self.tally.events, self.ended)
            await asyncio.sleep(max(1.0, self._seconds / 60))
        self._stopping = True
        until = time.perf_counter() + DRAIN_S
        while self._open and time.perf_counter() < until:
            await asyncio.sleep(0.1)
        self.tally.failures["not at their end"] += len(self._open)

    async def _begin(self, *, whole_time: bool) -> None:
        length_s = self._ends_at - time.perf_counter()
        if not whole_time:
            length_s = min(length_s, self._chance.uniform(*SHORT_S))
        chunks = max(1, int(length_s / self._interval_s))
        connection = await connect("127.0.0.1", self._port, self.tally)

        def finished(outcome: Outcome) -> None:
            short = self._open.pop(outcome) > outcome.events
            self.tally.failures["tokens missing"] += short and not outcome.problem
            self.ended += 1
            self._next(connection)

        outcome = connection.send(self._request(chunks), True, time.perf_counter(), finished)
        self._open[outcome] = chunks

    def _next(self, connection: Connection) -> None:
        connection.close()
        if not self._stopping and time.perf_counter() < self._ends_at - 1.0:
            task = self._loop.create_task(self._begin(whole_time=False))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _request(self, chunks: int) -> bytes:
        body = {
            "model": "mock",
            "messages": [{"role": "user", "content": "tide " * 12}],
            "max_tokens": chunks,
            "stream": True,
            "mock": {"token": TOKEN, "interval_ms": self._interval_s * 1000},
        }
        data = json.dumps(body).encode()
        head = f"POST {contestants.CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self._key}\r\n"
        return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data

    def _memory(self) -> dict[str, float]:
        """PSS in MiB: of the gateway processes, and of all of the platform."""
        found = {pid: proc.memory_of(pid) for pid in proc.tree(self._root)}
        gateways = sum(pss for pid, (_, pss) in found.items() if contestants.Tidemill.worker in proc.command_of(pid))
        return {"gateway_mib": gateways / 1024, "all_mib": sum(pss for _, pss in found.values()) / 1024}


def verdict(samples: list[dict[str, float]], streams: int) -> dict[str, Any]:
    """How the memory has grown after the warm-up: medians of the last fifth against the first."""
    settled = samples[int(len(samples) * WARM_UP_SHARE) :]
    fifth = max(1, len(settled) // 5)
    found: dict[str, Any] = {}
    for name in ("gateway_mib", "all_mib"):
        first, last = (statistics.median(each[name] for each in part) for part in (settled[:fifth], settled[-fifth:]))
        found[name] = {"first": round(first, 2), "last": round(last, 2)}
        found[name]["bytes_per_stream"] = round((last - first) * 2**20 / streams)
    found["steady"] = found["gateway_mib"]["bytes_per_stream"] <= STEADY_BYTES_PER_STREAM
    return found


def _say(sample: dict[str, float], events: int, ended: int) -> None:
    print(
        f"{sample['at_s']:7.1f} s  {sample['open']:5.0f} open  {ended:7,d} ended  {events:10,d} tokens"
        f"  gateway {sample['gateway_mib']:7.2f} MiB  all {sample['all_mib']:7.2f} MiB",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="many streams for a long time, and the gateway's memory")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--interval-ms", type=float, default=200.0, help="between the tokens of a stream")
    parser.add_argument("--workers", type=int, default=1, help="gateway processes")
    parser.add_argument("--json", action="store_true", help="all figures, as one JSON object on standard output")
    args = parser.parse_args()
    proc.raise_open_files()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that every server is stopped
    peers.CACHE.mkdir(exist_ok=True)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", dir=peers.CACHE)))
        mock_port, port = proc.free_port(), proc.free_port()
        engine = [sys.executable, str(peers.BENCH / "mock_engine.py"), "--port", str(mock_port)]
        stack.enter_context(proc.Server(engine, home / "mock.log"))
        tidemill = contestants.Tidemill(lambda text: None, ["--workers", str(args.workers)])
        tidemill.prepare()
        server = stack.enter_context(tidemill.launch(home, mock_port, port))
        proc.wait_answering(
            server, port, contestants.CHAT, contestants.PROBE, tidemill.key(home), tidemill.ready_limit_s
        )

        async def run() -> Soak:
            soak = Soak(port, tidemill.read_key(home), server.pid, args)
            await soak.run()
            return soak

        soak = uvloop.run(run())
    found = verdict(soak.samples, args.streams)
    failures = {kind: count for kind, count in soak.tally.failures.items() if count}
    if args.json:
        result = {"streams": args.streams, "ended": soak.ended, "tokens": soak.tally.events, "failures": failures}
        print(json.dumps({**result, **found, "samples": soak.samples}))
    gateway = found["gateway_mib"]
    print(
        f"{'steady' if found['steady'] else 'NOT STEADY'}: the gateway's memory went from {gateway['first']:.2f} to"
        f" {gateway['last']:.2f} MiB, {gateway['bytes_per_stream']:+,d} bytes a stream; {soak.ended:,d} streams ended,"
        f" {sum(failures.values())} wrong {failures or ''}",
        file=sys.stderr,
    )
    sys.exit(bool(failures) or not found["steady"])


if __name__ == "__main__":
    main()
