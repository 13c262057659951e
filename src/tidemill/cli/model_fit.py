"""`tidemill model fit` and `tidemill model catalogue`, as a reader sees them. They need no platform."""

import shlex
from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from tidemill.cli.output import grouped, print_json, print_table, print_text
from tidemill.engines.catalogue import CatalogueModel, GpuSpec, gpus, model_named, models
from tidemill.engines.catalogue.models import BYTES_PER_KV, BYTES_PER_WEIGHT, WEIGHT_PRECISIONS, KvPrecision
from tidemill.engines.fit import Fit, FitRequest, fits, parse_nodes, parse_tokens, shortfall
from tidemill.engines.launch import EngineLaunch, MultiNode, launch_for
from tidemill.engines.memory import CHUNK_TOKENS, GIB
from tidemill.engines.registry import LAUNCHERS
from tidemill.engines.roofline import BANDWIDTH_SHARE, COMPUTE_SHARE, NETWORK_GBS
from tidemill.errors import BadInput

DEFAULT_CONTEXT = 8192


def show_fit(
    model: str,
    nodes: str,
    *,
    context: str | None,
    concurrency: int,
    precision: str | None,
    kv: str,
    engine: str,
    everything: bool,
    json: bool,
) -> None:
    """Print what fits. Raises BadInput and NotFound."""
    spec, groups = model_named(model), parse_nodes(nodes)
    wanted = next((each for each in WEIGHT_PRECISIONS if each == precision), None)
    if precision is not None and wanted is None:
        raise BadInput(
            f"precision: {precision!r} is not supported.", hint=f"Choose one of: {', '.join(WEIGHT_PRECISIONS)}."
        )
    cached: KvPrecision | None = next((each for each in get_args(KvPrecision) if each == kv), None)
    if cached is None:
        raise BadInput(f"kv-precision must be bf16 or fp8, not {kv!r}.")
    if engine not in LAUNCHERS:
        raise BadInput(f"engine: {engine!r} is not supported.", hint=f"Choose one of: {', '.join(LAUNCHERS)}.")
    if not 1 <= concurrency <= 100_000:
        raise BadInput("concurrency must be from 1 to 100000 sequences.")
    tokens = min(DEFAULT_CONTEXT, spec.max_context) if context is None else parse_tokens(context)
    request = FitRequest(context=tokens, sequences=concurrency, precision=wanted, kv=cached)
    found = fits(spec, groups, request)
    if json:
        print_json(_document(spec, found, request, engine))
        return
    _print_model(spec, request)
    shown = found if everything else _worth_showing(found)
    _print_tables(shown)
    best = shown[0]
    lines = ["", *_arithmetic(spec, best, request)]
    hidden = len(found) - len(shown)
    if hidden:
        lines.append(f"{hidden} more layouts do not hold it; --all shows them.")
    if best.fits:
        lines += ["", *_start(spec, best, request, engine)]
    print_text("\n".join(lines))


def _worth_showing(found: Sequence[Fit]) -> Sequence[Fit]:
    fitting = [fit for fit in found if fit.fits]
    return fitting or sorted(found, key=lambda fit: (-fit.max_sequences, fit.need.total))[:3]


def _print_model(spec: CatalogueModel, request: FitRequest) -> None:
    parts = [f"{spec.total / 1e9:.1f}B parameters"]
    if spec.moe is not None:
        shared = f" and {spec.moe.shared} shared" if spec.moe.shared else ""
        parts.append(f"{spec.active / 1e9:.1f}B active (of {spec.moe.experts} experts {spec.moe.top_k}{shared})")
    heads = "MLA" if spec.mla is not None else f"{spec.heads} heads, {spec.kv_heads} of KV"
    parts += [f"{spec.layers} layers", heads, f"{grouped(spec.max_context)} tokens"]
    print_text(f"{spec.hub_id}: {', '.join(parts)}; {spec.licence}.")
    print_text(
        f"A replica shall work on {request.sequences} sequences of {grouped(request.context)} tokens at a time. "
        "Speeds are estimates."
    )


_COLUMNS: list[tuple[str, Any]] = [
    ("Layout", "left"),
    ("Devices", "right"),
    ("Copies", "right"),
    ("GiB", "right"),
    ("Holds", "right"),
    ("Longest", "right"),
    ("Each/s", "right"),
    ("Out/s", "right"),
    ("In/s", "right"),
]
"""No wider than a terminal of 80 columns."""


def _print_tables(shown: Sequence[Fit]) -> None:
    """A table for each group of nodes, that with the best layout first; what does not fit says why."""
    for group in dict.fromkeys(str(fit.group) for fit in shown):
        own = [fit for fit in shown if str(fit.group) == group]
        usable = f"{own[0].usable / GIB:.1f} of {own[0].group.gpu.memory_bytes / GIB:.1f} GiB of each device"
        print_text(f"\n{group}, weights in {own[0].precision}, {usable} to use:")
        print_table(_COLUMNS, [_row(fit) for fit in own])
        for fit in own:
            if not fit.fits:
                print_text(f"{fit.layout} does not fit: {shortfall(fit)}.")


def _row(fit: Fit) -> tuple[str, ...]:
    found, speeds = fit.estimate, ["", "", ""]
    if found is not None:
        rates = (1 / found.decode_step_s, found.decode_tokens_s, found.prefill_tokens_s)
        speeds = [_rounded(rate) for rate in rates]
    counts = (fit.max_sequences, fit.max_context)
    return (
        str(fit.layout),
        str(fit.layout.devices),
        str(fit.replicas),
        f"{fit.need.total / GIB:.1f}",
        *(grouped(count) for count in counts),
        *speeds,
    )


def _rounded(rate: float) -> str:
    """Two figures that count, as an estimate has no more; thousands as `12k` from ten thousand on."""
    value = int(round(rate, min(2 - len(str(int(rate))), 0)))
    return grouped(value) if value < 10_000 else f"{grouped(value // 1000)}k"


def _arithmetic(spec: CatalogueModel, fit: Fit, request: FitRequest) -> list[str]:
    """How the first row comes about."""
    need, gpu = fit.need, fit.group.gpu
    values = spec.kv_values(kv_heads=max(1, -(-spec.kv_heads // fit.layout.tp)))
    per_token = f"{values} values x {BYTES_PER_KV[request.kv]} bytes a token and layer"
    if spec.window_layers:
        per_token += f"; {spec.window_layers} of {spec.layers} layers keep {spec.sliding_window} tokens"
    each = need.kv_per_sequence / 2**20
    share = f"{BYTES_PER_WEIGHT[fit.precision]:.3f}".rstrip("0").rstrip(".")
    lines = [
        f"{fit.layout} on {fit.group}, the fullest device:",
        f"  weights      {need.weights / GIB:7.1f} GiB  matrices {share} bytes a value with scales, the rest 2",
        f"  KV cache     {need.kv / GIB:7.1f} GiB  {need.sequences} sequences x {each:.1f} MiB:",
        f"                            {per_token}",
        f"  runtime      {need.runtime / GIB:7.1f} GiB  driver, kernels, graphs, collectives (assumed)",
        f"  activations  {need.activations / GIB:7.1f} GiB  steps of {grouped(CHUNK_TOKENS)} tokens (assumed)",
        f"  together     {need.total / GIB:7.1f} of {fit.usable / GIB:.1f} GiB, "
        f"{request.memory_share:.0%} of {gpu.memory_bytes / GIB:.1f}",
    ]
    if fit.estimate is not None:
        return [*lines, "", *_estimate(fit)]
    return [*lines, "", *_no_estimate(gpu)] if fit.max_sequences else lines


def _estimate(fit: Fit) -> list[str]:
    found, gpu = fit.estimate, fit.group.gpu
    assert found is not None
    peak = gpu.flops(fit.precision) or 0
    lines = [
        f"Estimate for {fit.estimated_sequences} sequences, in a step of decoding (each stage of a pipeline):",
        f"  reads        {found.weights_read / GIB:7.1f} GiB of weights and {found.kv_read / GIB:.1f} of KV cache: "
        f"{found.memory_s * 1e3:.1f} ms at {BANDWIDTH_SHARE:.0%} of {grouped(round(gpu.bandwidth or 0))} GB/s",
        f"  computes     {found.operations / 1e12:7.2f} T operations: {found.compute_s * 1e3:.1f} ms at "
        f"{COMPUTE_SHARE:.0%} of {grouped(round(peak / 1e12))} T/s; the slower of both counts",
        f"  starts       kernels and collectives: {found.overhead_s * 1e3:.1f} ms"
        + (f", {NETWORK_GBS:.0f} GB/s between nodes" if fit.layout.devices > fit.group.per_node else ""),
        f"  a token of each every {found.decode_step_s * 1e3:.1f} ms, bound by {found.bound}",
        "Measured replicas were within 15% of this half of the time, and within a factor of 1.5 nine times in ten.",
    ]
    return lines + _uncertain(gpu)


def _uncertain(gpu: GpuSpec) -> list[str]:
    return [f"{gpu.name}: {', '.join(gpu.uncertain)} not published by the vendor."] if gpu.uncertain else []


def _no_estimate(gpu: GpuSpec) -> list[str]:
    return [f"No estimate of speed: {gpu.name} has no published bandwidth or compute.", *_uncertain(gpu)]


def _launches(spec: CatalogueModel, fit: Fit, request: FitRequest) -> list[EngineLaunch]:
    """One for each node of a replica."""
    launch = launch_for(
        fit.layout,
        model=spec.hub_id,
        served_name=spec.name,
        precision=fit.precision,
        native=spec.native,
        kv=request.kv,
        context=request.context,
        sequences=request.sequences,
    )
    nodes = -(-fit.layout.devices // fit.group.per_node)
    if nodes == 1:
        return [launch]
    ranks = (MultiNode(nodes, rank, "HEAD") for rank in range(nodes))
    return [msgspec.structs.replace(launch, multi_node=rank) for rank in ranks]


def _start(spec: CatalogueModel, fit: Fit, request: FitRequest, engine: str) -> list[str]:
    launches = _launches(spec, fit, request)
    lines = [f"Start it, one replica, with {engine}" + (" (HEAD is the first node):" if len(launches) > 1 else ":")]
    if fit.precision != spec.native and fit.precision in ("int8", "int4"):
        lines.insert(
            0, f"{spec.hub_id} is published in {spec.native}: take a copy that was quantised to {fit.precision}."
        )
    for rank, launch in enumerate(launches):
        line = shlex.join(LAUNCHERS[engine](launch).argv)
        line = line.replace("'{host}'", "0.0.0.0").replace("'{port}'", "8000")
        lines.append("  " + (f"node {rank}: " if len(launches) > 1 else "") + line)
    return lines


def _document(spec: CatalogueModel, found: Sequence[Fit], request: FitRequest, engine: str) -> dict[str, Any]:
    return {
        "model": spec.name,
        "hub_id": spec.hub_id,
        "parameters": spec.total,
        "active_parameters": spec.active,
        "context": request.context,
        "concurrency": request.sequences,
        "kv_precision": request.kv,
        "layouts": [_layout_document(spec, fit, request, engine) for fit in found],
    }


def _layout_document(spec: CatalogueModel, fit: Fit, request: FitRequest, engine: str) -> dict[str, Any]:
    need, found, layout = fit.need, fit.estimate, fit.layout
    document: dict[str, Any] = {
        "nodes": str(fit.group),
        "gpu": fit.group.gpu.kind,
        "layout": {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "ep": layout.ep},
        "devices": layout.devices,
        "replicas": fit.replicas,
        "precision": fit.precision,
        "fits": fit.fits,
        "max_context": fit.max_context,
        "max_concurrency": fit.max_sequences,
        "device_bytes": {
            "weights": need.weights,
            "kv": need.kv,
            "kv_per_sequence": need.kv_per_sequence,
            "runtime": need.runtime,
            "activations": need.activations,
            "total": need.total,
            "usable": fit.usable,
        },
        "estimate": None,
        "uncertain": list(fit.group.gpu.uncertain),
        "launches": [list(LAUNCHERS[engine](each).argv) for each in _launches(spec, fit, request)] if fit.fits else [],
    }
    if found is not None:
        document["estimate"] = {
            "sequences": fit.estimated_sequences,
            "decode_step_s": found.decode_step_s,
            "decode_tokens_s": found.decode_tokens_s,
            "prefill_tokens_s": found.prefill_tokens_s,
            "bound": found.bound,
        }
    if not fit.fits:
        document["why_not"] = shortfall(fit)
    return document


def show_models(*, json: bool) -> None:
    """Print all models of the catalogue."""
    known = list(models().values())
    if json:
        print_json({"models": [_model_document(spec) for spec in known]})
        return
    columns: list[tuple[str, Any]] = [("Model", "left"), ("Hub", "left"), ("Parameters", "right"), ("Active", "right")]
    columns += [("Weights in", "left"), ("Context", "right"), ("KV a token", "right"), ("Licence", "left")]
    print_table(columns, [_model_row(spec) for spec in known])


def _model_row(spec: CatalogueModel) -> tuple[str, ...]:
    kv = f"{spec.layers * spec.kv_values() * BYTES_PER_KV['bf16'] / 1024:.1f} KiB"
    active = f"{spec.active / 1e9:.2f}B" if spec.moe is not None else ""
    context = grouped(spec.max_context)
    return spec.name, spec.hub_id, f"{spec.total / 1e9:.2f}B", active, spec.native, context, kv, spec.licence


def _model_document(spec: CatalogueModel) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(spec)
    return {**document, "parameters": spec.total, "active_parameters": spec.active}


def show_gpus(*, json: bool) -> None:
    """Print all kinds of devices of the catalogue."""
    known = list(gpus().values())
    if json:
        print_json({"gpus": msgspec.to_builtins(known)})
        return
    columns: list[tuple[str, Any]] = [("Kind", "left"), ("Name", "left"), ("GiB", "right"), ("GB/s", "right")]
    columns += [("bf16", "right"), ("fp8", "right"), ("int8", "right"), ("Link GB/s", "right"), ("Watts", "right")]
    columns += [("Weights in", "left"), ("Not published", "left")]
    print_table(columns, [_gpu_row(gpu) for gpu in known])


def _gpu_row(gpu: GpuSpec) -> tuple[str, ...]:
    memory = f"{gpu.memory_bytes / GIB:.1f}" if gpu.memory_mib is not None else ""
    compute = tuple(_figure(gpu.compute.get(each)) for each in ("bf16", "fp8", "int8"))
    weights, unsure = " ".join(gpu.precisions), " ".join(gpu.uncertain)
    return (
        gpu.kind,
        gpu.name,
        memory,
        _figure(gpu.bandwidth),
        *compute,
        _figure(gpu.link),
        _figure(gpu.tdp),
        weights,
        unsure,
    )


def _figure(value: float | None) -> str:
    return "" if value is None else grouped(f"{value:g}")
