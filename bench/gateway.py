"""`make bench-gateway`: tidemill beside nginx, the Rust routers, aiohttp and LiteLLM, in one run.

    .venv/bin/python bench/gateway.py [--quick] [--rounds 3] [--peers nginx,sglang-router,...] [--json FILE]

Every contestant stands in front of the same mock engine and gets the same load. Rounds are short and
interleaved: within a round all contestants are up and each stretch of load goes to one after the other,
so that a noisy neighbour hurts all alike. Printed are medians over the rounds.
"""

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

import contestants
import peers
import phases
import proc
import report

DEFAULT_PEERS = "nginx,sglang-router,vllm-router,aiohttp"
QUICK_PEERS = "nginx,sglang-router"
DIRECT = "direct"


class Run:
    """All rounds of all contestants."""

    def __init__(self, chosen: list[contestants.Contestant], sizes: phases.Sizes, batch: int, console: Console) -> None:
        self.chosen = chosen
        self.sizes = sizes
        self.batch = batch
        self.console = console
        self.rounds: list[dict[str, phases.Findings]] = []
        self.given_up: dict[str, str] = {}

    def round(self, number: int) -> None:
        found: dict[str, phases.Findings] = {}
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=peers.CACHE)))
            mock_port = proc.free_port()
            mock = [sys.executable, str(peers.BENCH / "mock_engine.py"), "--port", str(mock_port)]
            mock += ["--batch", str(self.batch)]
            engine = stack.enter_context(proc.Server(mock, home / "mock.log"))
            proc.wait_answering(engine, mock_port, contestants.CHAT, contestants.PROBE, "none", 10.0)
            field = [phases.Live(DIRECT, None, mock_port, mock_port, "none", self.sizes)]
            found[DIRECT] = phases.Findings()
            for contestant in self._in_turn(number):
                live = self._start(stack, contestant, home, mock_port)
                if live is not None:
                    field.append(live)
                    found[live.name] = phases.Findings()
                    if live.ready_s is not None:
                        found[live.name].values["ready_s"] = live.ready_s
            for label, phase in phases.PHASES:
                for live in list(field):
                    self._status(f"round {number + 1}: {label}: {live.name}")
                    try:
                        phase(live, found[live.name])
                    except (RuntimeError, OSError) as wrong:
                        found[live.name].notes.append(f"{label}: {wrong}")
                        if live.server is not None and not live.server.running():
                            field.remove(live)
                            self.given_up[live.name] = f"ended during {label}: {live.server.log_tail(300)}"
            self._scale(stack, field, found, home, mock_port)
        self.rounds.append(found)

    def _scale(
        self,
        stack: ExitStack,
        field: list[phases.Live],
        found: dict[str, phases.Findings],
        home: Path,
        mock_port: int,
    ) -> None:
        """Tidemill with one gateway process and with two."""
        one = next((live for live in field if live.name == contestants.Tidemill.name), None)
        mine = next((each for each in self.chosen if isinstance(each, contestants.Tidemill)), None)
        if one is None or mine is None or "--workers" in mine.extra_args:
            return
        twin = contestants.Tidemill(mine.say, [*mine.extra_args, "--workers", "2"])
        twin.prepare()
        place = home / "two"
        place.mkdir()
        two = self._start(stack, twin, place, mock_port)
        if two is None:
            return
        self._status("2 workers")
        try:
            phases.warm_up(two, phases.Findings())
            phases.scaling(one, two, found[one.name])
        except (RuntimeError, OSError) as wrong:
            found[one.name].notes.append(f"2 workers: {wrong}")

    def _in_turn(self, number: int) -> list[contestants.Contestant]:
        """Each round begins with another contestant."""
        shift = number % max(1, len(self.chosen))
        return self.chosen[shift:] + self.chosen[:shift]

    def _start(
        self, stack: ExitStack, contestant: contestants.Contestant, home: Path, mock_port: int
    ) -> phases.Live | None:
        name = contestant.name
        self._status(f"starting {name}")
        own = home / name
        own.mkdir()
        port = proc.free_port()
        server = stack.enter_context(contestant.launch(own, mock_port, port))
        try:
            ready_s = proc.wait_answering(
                server,
                port,
                contestants.CHAT,
                contestants.PROBE,
                contestant.key(own),
                contestant.ready_limit_s,
            )
        except RuntimeError as wrong:
            self.given_up[name] = str(wrong)
            self.console.print(f"[yellow]{name} does not start:[/] {wrong}", highlight=False)
            server.stop()
            return None
        return phases.Live(
            name=name,
            server=server,
            port=port,
            mock_port=mock_port,
            key=contestant.read_key(own),
            sizes=self.sizes,
            heavy=contestant.heavy,
            worker=contestant.worker,
            ready_s=ready_s,
        )

    def _status(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.print(f"[dim]{text}[/]", end="\x1b[K\r", highlight=False)


def choose(
    names: list[str], console: Console, tidemill_args: list[str]
) -> tuple[list[contestants.Contestant], dict[str, str]]:
    """The contestants that can run here, and their versions. Says which can't and why."""
    chosen: list[contestants.Contestant] = []
    versions: dict[str, str] = {}

    def say(text: str) -> None:
        console.print(f"[dim]{text}[/]", highlight=False)

    for name in names:
        kind = contestants.ALL[name]
        contestant = contestants.Tidemill(say, tidemill_args) if kind is contestants.Tidemill else kind(say)
        try:
            versions[name] = contestant.prepare()
        except peers.Unavailable as wrong:
            console.print(f"[yellow]skipping {name}:[/] {wrong}", highlight=False)
            continue
        chosen.append(contestant)
    return chosen, versions


def machine() -> dict[str, Any]:
    model = "?"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def crowding(span: proc.MachineTime) -> dict[str, float]:
    """How many processors, on average, worked for others while the rounds ran."""
    return {
        "others": round(max(0.0, span.busy - span.ours) / span.wall, 3),
        "stolen": round(span.stolen / span.wall, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="processor time, latency and memory of gateways, in one run")
    parser.add_argument("--quick", action="store_true", help="about a minute: one round, few peers, short stretches")
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--peers", help=f"default {DEFAULT_PEERS}; with --quick {QUICK_PEERS}; also litellm; 'none'")
    parser.add_argument("--litellm", action="store_true", help="LiteLLM too (its installation takes a minute)")
    parser.add_argument("--no-tidemill", action="store_true", help="the peers alone")
    parser.add_argument("--tidemill-args", default="", help="more flags for `tidemill up`, e.g. '--workers 2'")
    parser.add_argument("--batch", type=int, default=64, help="streams whose tokens the mock engine sends in one step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures of all rounds")
    args = parser.parse_args()

    names = [n for n in (args.peers or (QUICK_PEERS if args.quick else DEFAULT_PEERS)).split(",") if n != "none"]
    names += ["litellm"] * (args.litellm and "litellm" not in names)
    names += ["tidemill"] * (not args.no_tidemill and "tidemill" not in names)
    unknown = [n for n in names if n not in contestants.ALL]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(contestants.ALL)}")

    console = Console(width=None if sys.stdout.isatty() else 150)
    peers.CACHE.mkdir(exist_ok=True)
    proc.raise_open_files()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that every server is stopped
    began = time.perf_counter()
    chosen, versions = choose(names, console, args.tidemill_args.split())
    run = Run(chosen, phases.QUICK if args.quick else phases.FULL, args.batch, console)
    before = proc.machine_time()
    for number in range(args.rounds or (1 if args.quick else 3)):
        run.round(number)
    others = crowding(proc.machine_time().since(before))
    order = [DIRECT, *(c.name for c in chosen)]
    summary = report.summarize(order, run.rounds)
    if args.json:
        report.write_json(args.json, summary, run.rounds, versions, machine() | others, run.given_up)
    report.print_all(console, summary, versions, machine(), run.given_up, time.perf_counter() - began, others)
    tidemill_failures = summary.failures.get("tidemill", {})
    sys.exit(1 if tidemill_failures or "tidemill" in run.given_up else 0)


if __name__ == "__main__":
    main()
