"""Medians over the rounds, the table, the aims beside it, and what others publish."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import phases

REFERENCE = "sglang-router"
SUBJECT = "tidemill"
DIRECT = "direct"
CROWDED = 0.15  # processors at work for others, on average, above which the report warns


@dataclass(frozen=True)
class Row:
    key: str
    label: str
    format: str
    ratio: bool = False  # print the ratio to the reference too


@dataclass(frozen=True)
class Aim:
    """What tidemill is to reach: a figure, or a ratio to the reference in the same round."""

    key: str
    text: str
    limit: float
    ratio: bool
    unit: str


ROWS = [
    Row("request_us", "CPU us a request, 64 connections saturated", "{:,.0f}", ratio=True),
    Row("worker_request_us", "  its worker processes alone", "{:,.0f}"),
    Row("request_us_half", "CPU us a request, half of saturation", "{:,.0f}", ratio=True),
    Row("request_us_one", "CPU us a request, 1 connection", "{:,.0f}", ratio=True),
    Row("long_request_us", "CPU us a request of 640 KB (128k words)", "{:,.0f}", ratio=True),
    Row("requests_per_s_per_core", "requests/s per core (1e6 / CPU us)", "{:,.0f}"),
    Row("requests_per_s", "requests/s seen, 64 connections", "{:,.0f}"),
    Row("chunk_us_64", "CPU us a chunk, 64 streams at 100/s", "{:,.1f}", ratio=True),
    Row("worker_chunk_us_64", "  its worker processes alone", "{:,.1f}"),
    Row("chunk_us_1000", "CPU us a chunk, 1,000 streams at 10/s", "{:,.1f}", ratio=True),
    Row("worker_chunk_us_1000", "  its worker processes alone", "{:,.1f}"),
    Row("added_p50_one", "added latency p50, 1 connection, ms", "{:,.2f}"),
    Row("added_p99_one", "added latency p99, 1 connection, ms", "{:,.2f}"),
    Row("added_p50_many", "added latency p50, 64 saturated, ms", "{:,.2f}"),
    Row("added_p99_many", "added latency p99, 64 saturated, ms", "{:,.2f}"),
    Row("added_p50_half", "added latency p50, half of saturation, ms", "{:,.2f}"),
    Row("added_p99_half", "added latency p99, half of saturation, ms", "{:,.2f}"),
    Row("workers_cpu", "2 workers: CPU a request, of that with 1", "{:,.2f}x"),
    Row("workers_rate", "2 workers: requests/s seen, of that with 1", "{:,.2f}x"),
    Row("workers_free_cores", "2 workers on free cores, by CPU time", "{:,.2f}x"),
    Row("kib_per_stream", "memory per open stream, KiB", "{:,.1f}"),
    Row("base_mib", "memory before the streams, MiB", "{:,.0f}"),
    Row("ready_s", "start to first answer, s", "{:,.2f}"),
]

AIMS = [
    Aim("request_us", "CPU a request, saturated (first light)", 1.0, True, "x"),
    Aim("request_us", "CPU a request, saturated (data plane)", 0.6, True, "x"),
    Aim("chunk_us_64", "CPU a chunk, 64 streams", 1.0, True, "x"),
    Aim("chunk_us_1000", "CPU a chunk, 1,000 streams", 1.0, True, "x"),
    Aim("workers_cpu", "CPU a request with 2 workers, of that with 1 (2 / 1.8)", 1.11, False, "x"),
    Aim("kib_per_stream", "memory per open stream", 40.0, False, " KiB"),
    Aim("added_p99_half", "added latency p99 at half of saturation", 3.0, False, " ms"),
    Aim("ready_s", "start to first answer", 2.0, False, " s"),
]

# Published by others, not measured here; none of them states requests per core with billing on.
PUBLISHED = [
    ("LiteLLM", "23 requests/s per vCPU", "3,000 RPS on 33 pods of 4 vCPU, prompts of 50-100K tokens"),
    ("LiteLLM", "130 requests/s per vCPU (our division)", "1,036 RPS on 2 x 4 vCPU, 12 ms median overhead"),
    ("LiteLLM", "4.3 ms a request", "independent sequential test"),
    ("Portkey", "2.4 to 2.65 ms a request", "independent sequential test"),
    ("Bifrost", "0.44 to 0.62 ms a request", "independent sequential test"),
    ("Bifrost", '"11 us" a request', "its own figure, without JSON and the HTTP call"),
]


@dataclass
class Summary:
    order: list[str]
    medians: dict[str, dict[str, float]] = field(default_factory=dict)  # contestant -> key -> value
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)  # to the reference, round by round
    spread: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)  # lowest, highest
    failures: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def summarize(order: Sequence[str], rounds: Sequence[Mapping[str, phases.Findings]]) -> Summary:
    summary = Summary(list(order))
    values = [_with_added_latency(found) for found in rounds]
    for name in order:
        keys = {key for one in values for key in one.get(name, {})}
        series = {key: [one[name][key] for one in values if key in one.get(name, {})] for key in keys}
        summary.medians[name] = {key: statistics.median(found) for key, found in series.items()}
        summary.spread[name] = {key: (min(found), max(found)) for key, found in series.items()}
        summary.ratios[name] = {}
        for key in keys:
            pairs = [(one[name].get(key), one.get(REFERENCE, {}).get(key)) for one in values if name in one]
            each = [mine / theirs for mine, theirs in pairs if mine is not None and theirs]
            if each:
                summary.ratios[name][key] = statistics.median(each)
        failures: dict[str, int] = {}
        notes: dict[str, None] = {}
        for one in rounds:
            if name in one:
                for kind, count in one[name].failures.items():
                    failures[kind] = failures.get(kind, 0) + count
                notes |= dict.fromkeys(one[name].notes)
        summary.failures[name] = failures
        summary.notes[name] = list(notes)
    return summary


def _with_added_latency(found: Mapping[str, phases.Findings]) -> dict[str, dict[str, float]]:
    """Latency less that of the direct way in the same round."""
    straight = found[DIRECT].values
    result: dict[str, dict[str, float]] = {}
    for name, findings in found.items():
        mine = dict(findings.values)
        for label in ("one", "many"):
            for quantile in ("p50", "p99"):
                key = f"latency_{quantile}_{label}"
                if name != DIRECT and key in mine and key in straight:
                    mine[f"added_{quantile}_{label}"] = mine[key] - straight[key]
        result[name] = mine
    return result


def print_all(
    console: Console,
    summary: Summary,
    versions: Mapping[str, str],
    machine: Mapping[str, Any],
    given_up: Mapping[str, str],
    seconds: float,
    others: Mapping[str, float],
) -> None:
    console.print()
    console.print(_table(summary, versions))
    console.print(
        f"{machine['cores']} cores, {machine['processor']}, Linux {machine['kernel']}; medians; (x) is the "
        f"ratio to {REFERENCE} in the same round; added latency is that above the direct way; "
        f"{seconds:.0f} s in all",
        style="dim",
        highlight=False,
    )
    crowd = others["others"] + others["stolen"]
    if crowd > CROWDED:
        console.print(
            f"[bold yellow]other work took {crowd:.2f} of {machine['cores']} processors meanwhile: "
            "the latencies and the rates seen are not the gateways' own; run it again on a quiet machine[/]",
            highlight=False,
        )
    _print_troubles(console, summary, given_up)
    console.print()
    console.print(_aims(summary))
    console.print(_published(summary))


def _table(summary: Summary, versions: Mapping[str, str]) -> Table:
    table = Table(title="Gateways in front of one mock engine", title_justify="left")
    table.add_column("")
    for name in summary.order:
        table.add_column(f"{name}\n[dim]{versions.get(name, '')}[/]", justify="right")
    for row in ROWS:
        cells = [_cell(summary, name, row) for name in summary.order]
        if any(cell != "-" for cell in cells):
            table.add_row(row.label, *cells)
    table.add_row("wrong or missing answers", *(_failures(summary, name) for name in summary.order))
    return table


def _failures(summary: Summary, name: str) -> str:
    if not summary.medians[name]:
        return "-"
    count = sum(summary.failures[name].values())
    return f"[red]{count:,}[/]" if count else "0"


def _cell(summary: Summary, name: str, row: Row) -> str:
    value = summary.medians[name].get(row.key)
    if value is None:
        return "-"
    text = row.format.format(value)
    ratio = summary.ratios[name].get(row.key)
    return f"{text} [dim]({ratio:.2f}x)[/]" if row.ratio and ratio is not None and name != REFERENCE else text


def _print_troubles(console: Console, summary: Summary, given_up: Mapping[str, str]) -> None:
    for name in summary.order:
        for kind, count in summary.failures[name].items():
            console.print(f"[red]{name}: {count:,} x {kind}[/]", highlight=False)
        for note in summary.notes[name]:
            console.print(f"[yellow]{name}: {note}[/]", highlight=False)
    for name, why in given_up.items():
        lines = why.strip().splitlines()
        console.print(f"[red]{name}: {lines[0]} {lines[-1] if len(lines) > 1 else ''}[/]", highlight=False)


def _aims(summary: Summary) -> Table:
    table = Table(title=f"Aims of {SUBJECT}, with keys, holds, balances and durable metering on", title_justify="left")
    for heading in ("aim", "at most", "is", "reached"):
        table.add_column(heading, justify="left" if heading == "aim" else "right")
    for row in aims(summary):
        reached = {True: "[green]yes[/]", False: "[red]no[/]", None: "not measured"}[row["reached"]]
        limit = f"{row['limit']:g}{row['unit']}" + (f" {REFERENCE}" if row["ratio"] else "")
        value = "-" if row["value"] is None else f"{row['value']:.2f}{row['unit']}"
        table.add_row(row["aim"], limit, value, reached)
    return table


def aims(summary: Summary) -> list[dict[str, Any]]:
    result = []
    for aim in AIMS:
        source = summary.ratios if aim.ratio else summary.medians
        value = source.get(SUBJECT, {}).get(aim.key)
        reached = None if value is None else value <= aim.limit
        row = {"aim": aim.text, "limit": aim.limit, "ratio": aim.ratio, "unit": aim.unit, "value": value}
        result.append({**row, "reached": reached})
    return result


def _published(summary: Summary) -> Table:
    table = Table(title="Beside what others publish (not measured here)", title_justify="left")
    for heading in ("gateway", "figure", "how"):
        table.add_column(heading)
    mine = summary.medians.get(SUBJECT, {}).get("requests_per_s_per_core")
    if mine is not None:
        how = "measured above: small requests, keys, holds, durable metering and ledger on"
        table.add_row(f"[bold]{SUBJECT}[/]", f"[bold]{mine:,.0f} requests/s per core[/]", how)
    for row in PUBLISHED:
        table.add_row(*row)
    return table


def write_json(
    path: Path,
    summary: Summary,
    rounds: Sequence[Mapping[str, phases.Findings]],
    versions: Mapping[str, str],
    machine: Mapping[str, Any],
    given_up: Mapping[str, str],
) -> None:
    """Everything measured: medians, ratios, spread, aims, and each round in the load generator's words."""
    content = {
        "machine": dict(machine),
        "versions": dict(versions),
        "medians": summary.medians,
        "ratios": summary.ratios,
        "spread": summary.spread,
        "failures": summary.failures,
        "notes": summary.notes,
        "given_up": dict(given_up),
        "aims": aims(summary),
        "rounds": [{name: {"values": f.values, "raw": f.raw} for name, f in one.items()} for one in rounds],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
