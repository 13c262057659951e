"""How fast a replica may be: an estimate by the roofline, with its arithmetic. Not a promise, and not a simulation.

A step of decoding reads all weights that it needs and the KV cache of all its sequences once, and computes two
operations a parameter and token; the slower of both bounds it. To that come the collectives, and a fixed time per
layer and step that kernels need to start. The efficiencies are fitted to measurements: docs/catalogue.md tells to
which, and what the error is.
"""

import msgspec

from tidemill.engines.catalogue.gpus import GpuSpec
from tidemill.engines.catalogue.models import CatalogueModel, KvPrecision, WeightPrecision
from tidemill.engines.memory import (
    CHUNK_TOKENS,
    ReplicaLayout,
    attention_bytes,
    dense_mlp_bytes,
    moe_layer_bytes,
    sequence_bytes,
    stage_layers,
)

BANDWIDTH_SHARE = 0.8
"""Of a memory's bandwidth, what decoding gets out of it."""
COMPUTE_SHARE = 0.75
"""Of the dense peak, what large matrix products get out of it."""
LAYER_SECONDS = 35e-6
"""What each layer takes however little there is to do, on one device."""
STEP_SECONDS = 1.5e-3
"""What each step takes for scheduling and sampling."""
HOP_SECONDS = 10e-6
"""What each collective takes however little it carries."""
NETWORK_GBS = 50.0
"""Between nodes, for each device, in one direction: one 400 Gb/s port each."""
ROUTED_BYTES = 3
"""Of each value that goes to an expert and back: fp8 there, bf16 back."""


class Estimate(msgspec.Struct, frozen=True):
    """What one replica may do. Tokens a second, seconds."""

    decode_step_s: float
    """Time per output token of a stream, while `sequences` are decoded and nothing else."""
    decode_tokens_s: float
    """Of all streams together."""
    prefill_tokens_s: float
    bound: str
    """What decoding waits for: `memory`, `compute`, `overhead`."""
    weights_read: float
    """Bytes that a device reads of weights in a step."""
    kv_read: float
    operations: float
    """Of a device in a step."""
    memory_s: float
    compute_s: float
    overhead_s: float
    """Collectives and fixed times."""


def estimate(
    spec: CatalogueModel,
    layout: ReplicaLayout,
    gpu: GpuSpec,
    precision: WeightPrecision,
    kv: KvPrecision,
    *,
    context: int,
    sequences: int,
    per_node: int = 8,
) -> Estimate | None:
    """The estimate at `sequences` of `context` tokens each; None where bandwidth or compute are not known.

    In a pipeline the sequences go round in as many groups as there are stages.
    """
    peak = gpu.flops(precision)
    if gpu.bandwidth is None or peak is None:
        return None
    batch = max(1, -(-sequences // layout.pp))
    own = -(-batch // layout.dp)
    weights = _weights_read(spec, layout, precision, batch)
    kv_read = float(own * sequence_bytes(spec, layout, kv, context))
    operations = own * _operations(spec, layout, context)
    memory_s = (weights + kv_read) / (gpu.bandwidth * 1e9 * BANDWIDTH_SHARE)
    compute_s = operations / (peak * COMPUTE_SHARE)
    overhead_s = stage_layers(spec, layout) * LAYER_SECONDS + STEP_SECONDS
    overhead_s += _collective_s(spec, layout, gpu, own, per_node)
    step = layout.pp * (max(memory_s, compute_s) + overhead_s)
    return Estimate(
        decode_step_s=step,
        decode_tokens_s=sequences / step,
        prefill_tokens_s=prefill_tokens_s(spec, layout, gpu, precision, context=context, per_node=per_node) or 0.0,
        bound=max((memory_s, "memory"), (compute_s, "compute"), (overhead_s, "overhead"))[1],
        weights_read=weights,
        kv_read=kv_read,
        operations=operations,
        memory_s=memory_s,
        compute_s=compute_s,
        overhead_s=overhead_s,
    )


def tpot_under_load_s(
    spec: CatalogueModel,
    layout: ReplicaLayout,
    gpu: GpuSpec,
    precision: WeightPrecision,
    kv: KvPrecision,
    *,
    prompt: int,
    output: int,
    sequences: int,
) -> float | None:
    """Time per output token where a new request follows each that ends, and its prompt is computed in between.

    While one answer of `output` tokens is written, all the other sequences begin once, each with its prompt.
    """
    found = estimate(spec, layout, gpu, precision, kv, context=prompt + output // 2, sequences=sequences)
    speed = prefill_tokens_s(spec, layout, gpu, precision, context=prompt)
    if found is None or speed is None:
        return None
    return found.decode_step_s + sequences * prompt / speed / output


def prefill_tokens_s(
    spec: CatalogueModel,
    layout: ReplicaLayout,
    gpu: GpuSpec,
    precision: WeightPrecision,
    *,
    context: int,
    per_node: int = 8,
) -> float | None:
    """Prompt tokens a second of one replica that does nothing else, for prompts of `context` tokens.

    The stages of a pipeline work on different chunks at the same time, the copies of dp on different prompts.
    """
    peak = gpu.flops(precision)
    if gpu.bandwidth is None or peak is None:
        return None
    tokens = max(1, min(CHUNK_TOKENS, context))
    weights = _weights_read(spec, layout, precision, tokens * layout.dp)
    memory_s = weights / (gpu.bandwidth * 1e9 * BANDWIDTH_SHARE)
    compute_s = tokens * _operations(spec, layout, context / 2, prefill=True) / (peak * COMPUTE_SHARE)
    overhead_s = stage_layers(spec, layout) * LAYER_SECONDS + STEP_SECONDS
    overhead_s += _collective_s(spec, layout, gpu, tokens, per_node)
    return tokens * layout.dp / (max(memory_s, compute_s) + overhead_s)


def _weights_read(spec: CatalogueModel, layout: ReplicaLayout, precision: WeightPrecision, tokens: int) -> float:
    """Of the experts of a layer, those are read that at least one of the tokens is sent to."""
    stage = stage_layers(spec, layout)
    heavy = min(spec.moe_layers, stage)
    read = stage * attention_bytes(spec, layout, precision)
    if spec.moe is not None:
        touched = 1 - (1 - spec.moe.top_k / spec.moe.experts) ** tokens
        read += heavy * moe_layer_bytes(spec, layout, precision, touched=touched)
    read += (stage - heavy) * dense_mlp_bytes(spec, layout, precision)
    head = spec.vocabulary * spec.hidden * 2 / layout.tp
    return read + head / layout.pp


def _operations(spec: CatalogueModel, layout: ReplicaLayout, context: float, *, prefill: bool = False) -> float:
    """Floating point operations of one token on one device that has it: the matrices, and attention over `context`.

    MLA decodes in the latent space: each head compares and sums vectors of the latent's length (DeepSeek-V2, 2.1.2).
    In prefill the head is used for the last token alone.
    """
    head = spec.vocabulary * spec.hidden
    matrices = 2 * (spec.active - (head if prefill else 0))
    if spec.mla is None:
        width = 2 * spec.head_dim
    elif prefill:
        width = spec.mla.qk_nope_head_dim + spec.mla.qk_rope_head_dim + spec.mla.v_head_dim
    else:
        width = 2 * spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
    seen = context
    if spec.window_layers:
        share = spec.window_layers / spec.layers
        seen = (1 - share) * context + share * min(context, spec.sliding_window)
    attention = 2 * spec.layers * spec.heads * width * seen
    return (matrices + attention) / (layout.tp * layout.pp)


def _collective_s(spec: CatalogueModel, layout: ReplicaLayout, gpu: GpuSpec, tokens: int, per_node: int) -> float:
    """Two all-reduces a layer over tp; over ep, what goes to the experts and comes back."""
    link = (gpu.link or 32.0) * 1e9
    stage = stage_layers(spec, layout)
    spent = 0.0
    if layout.tp > 1:
        carried = 2 * (layout.tp - 1) / layout.tp * tokens * spec.hidden * 2
        spent += 2 * stage * (carried / link + HOP_SECONDS)
    if layout.ep > 1 and spec.moe is not None:
        outside = max(0.0, 1 - per_node / layout.ep)
        carried = tokens / layout.tp * spec.moe.top_k * spec.hidden * ROUTED_BYTES
        speed = NETWORK_GBS * 1e9 if outside else link
        spent += min(spec.moe_layers, stage) * (carried * (outside or 1.0) / speed + 2 * HOP_SECONDS)
    return spent
