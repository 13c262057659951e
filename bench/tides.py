"""`make bench-tides`: what people feel of a batch, with and without the tide, on the embedded engine, live.

    .venv/bin/python bench/tides.py [--seconds 90] [--rate 1.2] [--rounds 1] [--json FILE]

Three stretches with the same arrivals (Azure's conversation trace, scaled in time and length, fixed seed): (a) people
alone; (b) people and a batch, both just sent; (c) the same batch through the Batch API, with the tide. Lines have the
lengths of Vidur's summarisation trace. Then (d): a flood takes a core back from a job that may be interrupted.

Each core has a replica of its own with one thread: llama.cpp's threads wait for one another by spinning, so that two
of them on cores that somebody else uses as well do next to nothing. Lines run in the idle class on the same cores.

*fill* is the processor time that the engines used, of what was there for them (theirs and what was idle): what the
gateway, this load generator and others on the machine took is not counted as idle.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import proc
from tides_load import Ask, Client, Timing, body_of, flood, send_always, send_flood, summaries

MODEL = "smol"
DECODE_WEIGHT = 5
"""Tokens of prefill that one of an answer weighs (`tidemill.tides.routing.RoutingPolicy`)."""
WARM_UP_S = 12.0
"""Of a stretch with a batch: until its engine is there and lines are in flight. Not measured."""
CONFIG = """
[models.smol]
engine = "llamacpp"
parallel = 4
context = 2048
devices = 1
{more}

[models.smol.objective]
ttft_seconds = 1.0
tpot_seconds = 0.1

[prices.smol]
input = "1.00"
output = "2.00"

[device_prices.cpu]
hour = "0.04"

[first_tenant]
credit = "1000"
"""


class Stretch(NamedTuple):
    """What was measured."""

    name: str
    timings: list[Timing]
    failures: int
    seconds: float
    batch_prompt: int
    batch_output: int
    fill: float
    others: float
    """Share of the machine that others took: above a little, the figures are not to be trusted."""

    @property
    def batch_work(self) -> float:
        """A second, in tokens of prefill."""
        return (self.batch_prompt + DECODE_WEIGHT * self.batch_output) / self.seconds


class Platform:
    """A `tidemill up` of the bench's own."""

    def __init__(self, home: Path, more: str) -> None:
        home.mkdir()
        (home / "tidemill.toml").write_text(CONFIG.format(more=more))
        self.home = home
        self.port, self.control_port = proc.free_port(), proc.free_port()
        command = [sys.executable, "-m", "tidemill", "up", "--config", str(home / "tidemill.toml")]
        command += ["--data", str(home / "data"), "--port", str(self.port), "--control-port", str(self.control_port)]
        self.server = proc.Server(command, home / "log", cwd=home)

    def __enter__(self) -> "Platform":
        probe = json.dumps(body_of(Ask(0, 8, 2, "hello"), MODEL, stream=False)).encode()
        key = self.home / "data" / "first-key"
        try:
            proc.wait_answering(self.server, self.port, "/v1/chat/completions", probe, key, 120.0)
        except BaseException:
            self.server.stop()
            raise
        self.key = key.read_text().strip()
        self.token = (self.home / "data" / "admin-token").read_text().strip()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(30.0)

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """The admin API."""
        return _call(f"http://127.0.0.1:{self.control_port}/api/v1{path}", method, self.token, body)

    def tenant_api(self, method: str, path: str, body: Any = None) -> Any:
        return _call(f"http://127.0.0.1:{self.port}/v1{path}", method, self.key, body)

    def upload(self, lines: Sequence[Ask]) -> str:
        """A batch of these lines; gives its id."""
        text = "".join(
            json.dumps(
                {
                    "custom_id": f"l{index}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body_of(line, MODEL, stream=False),
                }
            )
            + "\n"
            for index, line in enumerate(lines)
        )
        edge = "tidemillbench"
        form = f'--{edge}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        form += f'--{edge}\r\ncontent-disposition: form-data; name="file"; filename="b.jsonl"\r\n\r\n'
        form += f"{text}\r\n--{edge}--\r\n"
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/files",
            form.encode(),
            {"authorization": f"Bearer {self.key}", "content-type": f"multipart/form-data; boundary={edge}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            file = json.load(answer)["id"]
        wish = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return str(self.tenant_api("POST", "/batches", wish)["id"])

    def batch_usage(self, batch: str) -> tuple[int, int]:
        """Tokens of prompts and answers so far."""
        usage = self.tenant_api("GET", f"/batches/{batch}").get("usage") or {}
        return int(usage.get("input_tokens", 0)), int(usage.get("output_tokens", 0))

    def engine_cpu_s(self) -> float:
        """Processor time of the engines so far."""
        return sum(each.cpu_us for each in proc.cpu_times(self.server.pid) if "llamacpp_child" in each.command) / 1e6


def _call(url: str, method: str, token: str, body: Any) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


class Watch:
    """Processor time between two moments: of the engines, of everybody, and idle."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._engines = platform.engine_cpu_s()
        self._ours = sum(each.cpu_us for each in proc.cpu_times(os.getpid())) / 1e6
        self._machine = proc.machine_time()

    def read(self) -> tuple[float, float]:
        """Fill, and the share that others on the machine took."""
        machine = proc.machine_time().since(self._machine)
        cores = len(os.sched_getaffinity(0))
        engines = self._platform.engine_cpu_s() - self._engines
        ours = sum(each.cpu_us for each in proc.cpu_times(os.getpid())) / 1e6 - self._ours
        idle = max(cores * machine.wall - machine.busy - machine.stolen, 0.0)
        others = max(machine.busy - ours, 0.0) + machine.stolen
        return engines / max(engines + idle, 1e-9), others / (cores * machine.wall)


async def people_alone(platform: Platform, asks: Sequence[Ask], seconds: float) -> Stretch:
    client = Client(platform.port, platform.key, MODEL)
    watch, began = Watch(platform), time.perf_counter()
    timings = await send_flood(asks, client.ask)
    fill, others = watch.read()
    return Stretch("a: people alone", timings, len(client.failures), time.perf_counter() - began, 0, 0, fill, others)


async def both_sent(platform: Platform, asks: Sequence[Ask], lines: Sequence[Ask], at_a_time: int) -> Stretch:
    people, batch = (Client(platform.port, platform.key, MODEL) for _ in range(2))
    answered: list[Timing] = []

    async def line(ask: Ask) -> Timing | None:
        timing = await batch.ask(ask)
        if timing is not None:
            answered.append(timing)
        return timing

    sending = asyncio.create_task(send_always(lines, line, at_a_time))
    await asyncio.sleep(WARM_UP_S)
    answered.clear()
    watch, began = Watch(platform), time.perf_counter()
    timings = await send_flood(asks, people.ask)
    seconds = time.perf_counter() - began
    fill, others = watch.read()
    prompt, output = sum(each.prompt for each in answered), sum(each.output for each in answered)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    return Stretch("b: both just sent", timings, len(people.failures), seconds, prompt, output, fill, others)


async def with_the_tide(platform: Platform, asks: Sequence[Ask], lines: Sequence[Ask]) -> Stretch:
    client = Client(platform.port, platform.key, MODEL)
    batch = await asyncio.to_thread(platform.upload, lines)
    await asyncio.sleep(WARM_UP_S)
    before = await asyncio.to_thread(platform.batch_usage, batch)
    watch, began = Watch(platform), time.perf_counter()
    timings = await send_flood(asks, client.ask)
    after = await asyncio.to_thread(platform.batch_usage, batch)
    seconds = time.perf_counter() - began
    fill, others = watch.read()
    await asyncio.to_thread(platform.tenant_api, "POST", f"/batches/{batch}/cancel")
    prompt, output = after[0] - before[0], after[1] - before[1]
    return Stretch("c: with the tide", timings, len(client.failures), seconds, prompt, output, fill, others)


async def flood_takes_back(platform: Platform, grace_s: int) -> float:
    """Seconds from a flood's first request until the job has given its core back."""
    spin = (
        "import signal,sys,time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nwhile True: sum(range(10000))"
    )
    wish = {"tenant": "demo", "command": [sys.executable, "-c", spin], "devices": 1, "preemptible": True}
    made = await asyncio.to_thread(platform.api, "POST", "/jobs", {**wish, "grace": f"{grace_s}s"})
    name = f"job {made['id']}"
    for _ in range(600):
        if name in await asyncio.to_thread(_holders, platform):
            break
        await asyncio.sleep(0.1)
    else:
        raise RuntimeError(f"the job did not start: {await asyncio.to_thread(platform.api, 'GET', '/fleet/why')}")
    client = Client(platform.port, platform.key, MODEL)
    began = time.perf_counter()
    asks = [Ask(0.02 * index, 100, 48, f"{index} " + "tide " * 90) for index in range(60)]
    sending = asyncio.create_task(send_flood(asks, client.ask))
    took = float("nan")
    while time.perf_counter() - began < 120.0:
        if name not in await asyncio.to_thread(_holders, platform):
            took = time.perf_counter() - began
            break
        await asyncio.sleep(0.05)
    await sending
    return took


def _holders(platform: Platform) -> set[str]:
    return {device["holder"] for device in platform.api("GET", "/fleet")["devices"]}


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def print_table(console: Console, stretches: Sequence[Stretch]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "",
        "requests",
        "TTFT p50",
        "p95",
        "p99 ms",
        "TPOT p50",
        "p95",
        "p99 ms",
        "batch tok/s in",
        "out",
        "fill",
    ):
        table.add_column(title, justify="left" if not title else "right")
    for each in stretches:
        ttft = [timing.ttft_s * 1000 for timing in each.timings]
        tpot = [timing.tpot_s * 1000 for timing in each.timings if timing.tpot_s is not None]
        failed = f" ({each.failures} failed)" if each.failures else ""
        table.add_row(
            each.name,
            f"{len(each.timings)}{failed}",
            *(f"{quantile(ttft, share):.0f}" for share in (0.5, 0.95, 0.99)),
            *(f"{quantile(tpot, share):.1f}" for share in (0.5, 0.95, 0.99)),
            f"{each.batch_prompt / each.seconds:.0f}" if each.batch_prompt else "",
            f"{each.batch_output / each.seconds:.1f}" if each.batch_output else "",
            f"{each.fill:.0%}",
        )
    console.print(table)


def print_aims(console: Console, alone: Sequence[Stretch], sent: Sequence[Stretch], tide: Sequence[Stretch]) -> None:
    """Over all rounds together, as a round of its own has few late requests."""

    def p95(stretches: Sequence[Stretch]) -> float:
        return quantile([timing.ttft_s for each in stretches for timing in each.timings], 0.95)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    ratio = p95(tide) / p95(alone)
    share = mean([each.batch_work for each in tide]) / max(mean([each.batch_work for each in sent]), 1e-9)
    fill = mean([each.fill for each in tide])
    for what, value, met, aim in (
        ("p95 TTFT of (c) to that of (a)", f"{ratio:.2f}", ratio <= 1.15, "at most 1.15"),
        ("batch work of (c) to that of (b)", f"{share:.0%}", share >= 0.8, "at least 80%"),
        ("fill of (c)", f"{fill:.0%}", fill >= 0.9, "at least 90%"),
    ):
        console.print(f"{'[green]met' if met else '[red]missed'}[/]  {what}: {value} (aim: {aim})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="length of a stretch")
    parser.add_argument("--rate", type=float, default=1.2, help="people's requests a second, on average")
    parser.add_argument("--shrink", type=float, default=16.0, help="the traces' lengths are divided by this")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lines", type=int, default=8, help="lines at a time in (b)")
    parser.add_argument("--grace", type=int, default=5, help="what the job of (d) gets, seconds")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--skip-job", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    cores = len(os.sched_getaffinity(0))
    found: dict[str, list[Stretch]] = {"a": [], "b": [], "c": []}
    took: list[float] = []
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tides-")))
        for number in range(args.rounds):
            asks = flood(args.seconds, rate=args.rate, shrink=args.shrink, seed=args.seed + number)
            lines = summaries(5000, shrink=args.shrink, seed=args.seed + number)
            for stage in "abc":
                with Platform(home / f"{number}{stage}", f"replicas = {cores}") as platform:
                    console.print(
                        f"round {number + 1}, {stage}: {len(asks)} requests in {args.seconds:g} s", style="dim"
                    )
                    if stage == "a":
                        stretch = asyncio.run(people_alone(platform, asks, args.seconds))
                    elif stage == "b":
                        stretch = asyncio.run(both_sent(platform, asks, lines, args.lines))
                    else:
                        stretch = asyncio.run(with_the_tide(platform, asks, lines))
                    found[stage].append(stretch)
                    if stretch.others > 0.05:
                        console.print(
                            f"others took {stretch.others:.0%} of the machine: don't trust this", style="yellow"
                        )
            print_table(console, [found[stage][-1] for stage in "abc"])
        if not args.skip_job:
            more = f"min_replicas = {max(cores - 1, 1)}\nmax_replicas = {cores}\nscale_down_seconds = 5"
            with Platform(home / "job", more) as platform:
                took.append(asyncio.run(flood_takes_back(platform, args.grace)))
    print_aims(console, found["a"], found["b"], found["c"])
    for seconds in took:
        met = seconds <= args.grace + 2
        console.print(
            f"{'[green]met' if met else '[red]missed'}[/]  a flood has a job's core after {seconds:.1f} s"
            f" (aim: at most its grace of {args.grace} s and 2 s)"
        )
    if args.json is not None:
        figures = {stage: [each._asdict() for each in stretches] for stage, stretches in found.items()}
        args.json.write_text(json.dumps({"stretches": figures, "given_back_s": took}, indent=1))


if __name__ == "__main__":
    main()
