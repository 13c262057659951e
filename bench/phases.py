"""The stretches of load that a contestant goes through, and what each of them measures."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import proc

Values = dict[str, float]
REQUEST_TOKENS = 16
LATE_SHARE_S = 0.05  # arrivals of so long a time still waiting at the end: the rate was not kept
QUIET_SHARE = 0.05  # of one processor: below it, work that was put off is taken as done
QUIET_STEP_S = 0.2
QUIET_LIMIT_S = 8.0
SHORTEST_SPAN_S = 0.25  # a shorter one of streams measures nothing
LONG_PROMPT_WORDS = 128_000  # 640 KB of JSON
HEAVY_STREAMS = 8  # instead of 64, for a contestant that is heavy


@dataclass(frozen=True)
class Sizes:
    """How long each stretch takes, in seconds."""

    streams_s: float = 2.0
    one_connection_s: float = 1.0
    saturated_s: float = 1.5
    paced_s: float = 1.5
    long_prompt_s: float = 1.0


FULL = Sizes()
QUICK = Sizes(streams_s=1.2, one_connection_s=0.6, saturated_s=0.8, paced_s=0.8, long_prompt_s=0.6)


@dataclass
class Live:
    """A contestant that is up. `server` is None for the direct way to the mock engine."""

    name: str
    server: proc.Server | None
    port: int
    mock_port: int
    key: str
    sizes: Sizes
    heavy: bool = False
    worker: str = ""
    ready_s: float | None = None
    rate: float = 0.0  # requests per second when saturated, in this round

    def load(self, mode: str, direct: bool = False, **options: float) -> dict[str, Any]:
        """One run of the load generator, at the contestant or straight at the mock engine.

        Raises RuntimeError when it gives no result.
        """
        port = self.mock_port if direct else self.port
        command = [sys.executable, str(peers.BENCH / "loadgen.py"), mode]
        command += ["--url", f"http://127.0.0.1:{port}", "--key", self.key]
        if self.server is not None and not direct:
            command += ["--tree", str(self.server.pid)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        try:
            result: dict[str, Any] = json.loads(told.stdout)
        except json.JSONDecodeError:
            raise RuntimeError(f"load generator: {told.stderr.strip()[-500:]}") from None
        return result

    def interval_ms(self, interval_ms: float) -> None:
        """How fast the mock engine streams from now on."""
        body = json.dumps({"interval_ms": interval_ms}).encode()
        status, answer = proc.http_post(self.mock_port, "/mock", body)
        if status != 200:
            raise RuntimeError(f"mock engine: {answer.decode()}")


class Findings:
    """What one round found for one contestant."""

    def __init__(self) -> None:
        self.values: Values = {}
        self.failures: dict[str, int] = {}
        self.notes: list[str] = []
        self.raw: dict[str, Any] = {}

    def take(self, phase: str, result: dict[str, Any]) -> None:
        self.raw[phase] = result
        for kind, count in result["failures"].items():
            self.failures[kind] = self.failures.get(kind, 0) + count


def warm_up(live: Live, found: Findings) -> None:
    live.interval_ms(0)
    connections = 8 if live.heavy else 64
    found.take("warm-up", live.load("closed", connections=connections, seconds=0.4, warmup=0))
    found.take("warm-up streams", live.load("streams", streams=8, chunks=REQUEST_TOKENS, seconds=0.1))


def streams(live: Live, found: Findings, label: str, count: int, interval_ms: float, opening_s: float) -> None:
    """Processor time a chunk, and memory a stream, while `count` streams flow."""
    live.interval_ms(interval_ms)
    seconds = live.sizes.streams_s
    if live.heavy:
        count, opening_s = HEAVY_STREAMS, 2.0
        found.notes.append(f"{label} streams: measured with {count}, it is too slow for {label}")
    chunks = int((seconds + 0.3 + opening_s) * 1000 / interval_ms)
    result = live.load("streams", streams=count, chunks=chunks, seconds=seconds)
    live.interval_ms(0)
    found.take(label, result)
    if result["cut"]:
        found.notes.append(
            f"{label} streams: {result['cut']} of {count} streams not at their end 20 s after the measurement"
        )
    if result["cpu"] is None:
        return
    found.values.setdefault("base_mib", result["memory"]["before"]["pss_kib"] / 1024)
    if result["seconds"] < min(SHORTEST_SPAN_S, seconds) or not result["events"]:
        found.notes.append(
            f"{label} streams: opening {count} streams took {result['opened_s']:.1f} s, too long to measure"
        )
        return
    found.values[f"chunk_us_{label}"] = result["cpu"]["us"] / result["events"]
    worker = _worker_us(live, result["cpu"])
    if worker is not None:
        found.values[f"worker_chunk_us_{label}"] = worker / result["events"]
    offered = count * 1000 / interval_ms
    if result["events_per_s"] < 0.9 * offered:
        found.notes.append(
            f"{label} streams: kept up with {result['events_per_s']:,.0f} of {offered:,.0f} chunks a second"
        )


def many_streams(live: Live, found: Findings) -> None:
    if live.heavy:
        found.notes.append("1,000 streams: left out, too slow")
        return
    streams(live, found, "1000", 1000, 100.0, 2.0)
    if "memory" in found.raw["1000"]:
        found.values["kib_per_stream"] = found.raw["1000"]["memory"]["kib_per_stream"]


def fast_streams(live: Live, found: Findings) -> None:
    streams(live, found, "64", 64, 10.0, 0.5)


def one_connection(live: Live, found: Findings) -> None:
    result = live.load("closed", connections=1, seconds=live.sizes.one_connection_s)
    found.take("1 connection", result)
    _latency(found, "one", result)
    if result["cpu"] and result["requests"]:
        found.values["request_us_one"] = result["cpu"]["us"] / result["requests"]


def saturated(live: Live, found: Findings) -> None:
    """64 connections, each with its next request at once. Processor time counts until the contestant is
    quiet again, so that work put off (a log drained into a database) is in the figure too."""
    root = live.server.pid if live.server else None
    before = proc.cpu_times(root) if root else []
    result = live.load("closed", connections=64, seconds=live.sizes.saturated_s)
    found.take("64 connections", result)
    _latency(found, "many", result)
    live.rate = result["requests_per_s"]
    found.values["requests_per_s"] = live.rate
    if root is None or not result["answered"]:
        return
    quiet, after = _wait_quiet(root)
    if not quiet:
        found.notes.append(f"64 connections: still working {QUIET_LIMIT_S:g} s after the load ended")
    used = proc.cpu_between(before, after)
    found.values["request_us"] = sum(p.cpu_us for p in used) / result["answered"]
    found.values["requests_per_s_per_core"] = 1e6 / found.values["request_us"]
    if live.worker:
        mine = sum(p.cpu_us for p in used if live.worker in p.command)
        found.values["worker_request_us"] = mine / result["answered"]


def half_saturated(live: Live, found: Findings) -> None:
    """Poisson arrivals at half the rate just found; then the same arrivals straight to the mock engine."""
    if live.server is None or not live.rate:
        return
    seconds, rate = live.sizes.paced_s, live.rate / 2
    result = live.load("closed", connections=64, seconds=seconds, rate=rate)
    straight = live.load("closed", direct=True, connections=64, seconds=seconds, rate=rate)
    found.take("half of saturation", result)
    if result["waiting_at_end"] > LATE_SHARE_S * rate:
        late = f"{result['requests_per_s']:,.0f} of {rate:,.0f} requests a second kept up with"
        found.notes.append(f"half of saturation: {late}; the latency is that of a queue")
    found.raw["half of saturation, direct"] = straight
    if result["cpu"] and result["requests"]:
        found.values["request_us_half"] = result["cpu"]["us"] / result["requests"]
    if result["latency_ms"] and straight["latency_ms"]:
        for quantile in ("p50", "p99"):
            added = result["latency_ms"][quantile] - straight["latency_ms"][quantile]
            found.values[f"added_{quantile}_half"] = added


def scaling(one: Live, two: Live, found: Findings) -> None:
    """The same saturated load at one gateway process and at two, one directly after the other. On a machine whose
    cores the load and the mock engine use as well, the rates say little; processor time a request says what two
    processes do to each other: if it stays, two free cores do twice the work."""
    rates, cpu = [], []
    for live in (one, two):
        own = Findings()
        saturated(live, own)
        for kind, count in own.failures.items():
            found.failures[kind] = found.failures.get(kind, 0) + count
        if "request_us" not in own.values:
            found.notes.append("2 workers: no figures")
            return
        rates.append(own.values["requests_per_s"])
        cpu.append(own.values["request_us"])
        found.raw[f"workers {len(rates)}"] = own.raw["64 connections"]
    found.values["workers_rate"] = rates[1] / rates[0]
    found.values["workers_cpu"] = cpu[1] / cpu[0]
    found.values["workers_free_cores"] = 2 * cpu[0] / cpu[1]


def long_prompts(live: Live, found: Findings) -> None:
    seconds = live.sizes.long_prompt_s
    result = live.load("closed", connections=4, seconds=seconds, prompt_words=LONG_PROMPT_WORDS, chunks=1)
    found.take("long prompts", result)
    if result["cpu"] and result["requests"]:
        found.values["long_request_us"] = result["cpu"]["us"] / result["requests"]


PHASES: list[tuple[str, Callable[[Live, Findings], None]]] = [
    ("warming up", warm_up),
    ("1,000 streams at 10/s", many_streams),
    ("64 streams at 100/s", fast_streams),
    ("1 connection", one_connection),
    ("64 connections", saturated),
    ("half of saturation", half_saturated),
    ("long prompts", long_prompts),
]


def _latency(found: Findings, label: str, result: dict[str, Any]) -> None:
    if result["latency_ms"]:
        for quantile in ("p50", "p99"):
            found.values[f"latency_{quantile}_{label}"] = result["latency_ms"][quantile]


def _worker_us(live: Live, cpu: dict[str, Any]) -> float | None:
    if not live.worker:
        return None
    return float(sum(p["us"] for p in cpu["processes"] if live.worker in p["command"]))


def _wait_quiet(root: int) -> tuple[bool, list[proc.ProcessTime]]:
    until = time.perf_counter() + QUIET_LIMIT_S
    last = proc.cpu_times(root)
    while time.perf_counter() < until:
        time.sleep(QUIET_STEP_S)
        now = proc.cpu_times(root)
        if sum(p.cpu_us for p in proc.cpu_between(last, now)) < QUIET_SHARE * QUIET_STEP_S * 1e6:
            return True, now
        last = now
    return False, last
