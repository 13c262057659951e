"""The tide over a simulated fleet of 256 devices and a day, beside what is done without it.

    .venv/bin/python bench/tides_sim.py [--devices 256] [--hours 24] [--seed 1] [--only tide,alone] [--json FILE]

The policies are those of `tidemill.tides`, the very functions that run the live fleet; the fleet, its models' speeds
and its day are simulated (`tidemill.planner`: what is left out is said in fleet_model.py and simulate.py). Arrivals
are the Azure LLM inference traces of 2023 on a daily curve. Aims: fill at least 95%, the objective kept as well as by
interactive work alone to within 0.5 points, all deadlines kept. A missed aim is printed, and no error.
"""

import argparse
import json
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from tidemill.planner.arrivals import read_trace
from tidemill.planner.policies import SchedulingPolicy, alone, kueue_like, reactive, static, tide
from tidemill.planner.scenario import a_day, peak_replicas
from tidemill.planner.simulate import Scenario, Simulation, SimulationResult
from tidemill.tides.rules import RULES

TRACES = Path(__file__).parents[2] / "shared" / "traces" / "azure-llm-2023"
AIM_FILL = 0.95
AIM_POINTS = 0.005
NAMES = ("alone", "static", "reactive", "kueue", "tide")


def policies(scenario: Scenario) -> dict[str, SchedulingPolicy]:
    peak = peak_replicas(scenario, RULES.target)
    sizes = {stream.spec.name: stream.spec.devices for stream in scenario.streams}
    ours = sum(count * sizes[name] for name, count in peak.items())
    ours = min(-(-ours // 8) * 8, len(scenario.devices) - 8)  # whole nodes
    return {
        "alone": alone(peak, RULES),
        "static": static(peak, ours, RULES),
        "reactive": reactive(ours, RULES),
        "kueue": kueue_like(RULES),
        "tide": tide(RULES),
    }


def table(found: list[SimulationResult]) -> Table:
    rows: list[tuple[str, list[str]]] = [
        ("fill", [f"{each.fill:.1%}" for each in found]),
        ("devices held", [f"{each.held:.1%}" for each in found]),
        ("requests within the objective", [f"{each.kept:.2%}" for each in found]),
        *((f"  {name}", [f"{each.kept_by_model[name]:.2%}" for each in found]) for name in found[0].kept_by_model),
        ("deadlines kept", [f"{each.deadlines_kept} of {each.deadlines}" for each in found]),
        ("batch tokens of work", [f"{each.batch_work / 1e9:,.1f} G" for each in found]),
        ("device-hours of jobs", [f"{each.job_hours:,.0f}" for each in found]),
        ("  lost to restores and checkpoints", [f"{each.lost_hours:,.0f}" for each in found]),
        ("device-hours of interactive replicas", [f"{each.interactive_hours:,.0f}" for each in found]),
        ("jobs ended", [f"{each.jobs_ended}" for each in found]),
        ("jobs preempted", [f"{each.preemptions}" for each in found]),
        ("replicas started", [f"{each.replica_starts}" for each in found]),
    ]
    shown = Table(title="A day of a simulated fleet")
    shown.add_column("")
    for each in found:
        shown.add_column(each.policy, justify="right")
    for name, values in rows:
        shown.add_row(name, *values)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=TRACES)
    parser.add_argument("--devices", type=int, default=256)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    conv = args.traces / "AzureLLMInferenceTrace_conv.csv"
    code = args.traces / "AzureLLMInferenceTrace_code.csv"
    if not conv.exists() or not code.exists():
        parser.error(f"{args.traces} has no Azure traces; get them from Azure/AzurePublicDataset, data/")
    console = Console(width=132)
    scenario = a_day(
        read_trace(conv, 2.0), read_trace(code, 2.0), devices=args.devices, seed=args.seed, hours=args.hours
    )
    console.print(
        f"{args.devices} devices, {args.hours:g} h, seed {args.seed}: "
        f"{len(scenario.jobs)} jobs, {len(scenario.batches)} batches, {len(scenario.streams)} models"
    )
    found = []
    for name, policy in policies(scenario).items():
        if name in args.only.split(","):
            began = time.perf_counter()
            found.append(Simulation(scenario, policy).run())
            console.print(f"[dim]{policy.name}: {found[-1].plans:,} plans, {time.perf_counter() - began:.0f} s[/dim]")
    console.print(table(found))
    by_name = {each.policy: each for each in found}
    best, base = by_name.get("tide"), by_name.get("interactive alone")
    if best is not None:
        say(console, best.fill >= AIM_FILL, f"fill {best.fill:.1%}, aim {AIM_FILL:.0%}")
        all_kept = best.deadlines_kept == best.deadlines
        say(console, all_kept, f"deadlines kept: {best.deadlines_kept} of {best.deadlines}, aim: all")
        if base is not None:
            points = (base.kept - best.kept) * 100
            say(
                console, points <= AIM_POINTS * 100, f"objective: {points:+.2f} points below interactive alone, aim 0.5"
            )
    if args.json:
        args.json.write_text(json.dumps([msgspec.to_builtins(each) for each in found], indent=1) + "\n")


def say(console: Console, reached: bool, text: str) -> None:
    console.print(f"[green]reached[/green]  {text}" if reached else f"[red]missed[/red]   {text}")


if __name__ == "__main__":
    main()
