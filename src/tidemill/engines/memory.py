"""What a device must hold for a model: weights, KV cache, and what the engine itself takes. Pure arithmetic.

All figures are of the fullest device of a replica. Assumptions are named constants; docs/catalogue.md tells them.
"""

import msgspec

from tidemill.engines.catalogue.models import (
    BYTES_PER_KV,
    BYTES_PER_PLAIN,
    CatalogueModel,
    KvPrecision,
    ParameterCount,
    WeightPrecision,
)

GIB = 2**30

MEMORY_SHARE = 0.92
"""Of a device's memory, what an engine may take: vLLM's default (`--gpu-memory-utilization`)."""
RUNTIME_BYTES = 3 * GIB // 2
"""The driver's context, kernels' workspaces and captured graphs, on each device."""
COMMUNICATION_BYTES = GIB // 2
"""Buffers of the collective library, where a replica has several devices."""
BLOCK_TOKENS = 16
"""KV cache is given out in blocks of so many tokens."""
CHUNK_TOKENS = 8192
"""Tokens that the engine computes in one step at most (chunked prefill)."""
ACTIVATION_BYTES = 2
LOGIT_BYTES = 8
"""Per sequence and word of the vocabulary: float32, and a copy while sampling."""


class ReplicaLayout(msgspec.Struct, frozen=True):
    """How one replica is spread over devices."""

    tp: int = 1
    """Tensor parallel: each matrix is cut in so many pieces."""
    pp: int = 1
    """Pipeline parallel: the layers are cut in so many stages."""
    dp: int = 1
    """Attention in so many copies, each with its own sequences, while all of them share the experts (MoE alone)."""

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def ep(self) -> int:
        """Devices that the experts of a layer are spread over, whole; 1: they are cut like other matrices."""
        return self.tp * self.dp if self.dp > 1 else 1

    def __str__(self) -> str:
        parts = [f"tp{self.tp}"]
        if self.dp > 1:
            parts += [f"dp{self.dp}", f"ep{self.ep}"]
        if self.pp > 1:
            parts.append(f"pp{self.pp}")
        return " ".join(parts)


class MemoryNeed(msgspec.Struct, frozen=True):
    """Bytes on the fullest device."""

    weights: int
    kv_per_sequence: int
    sequences: int
    """On this device; with dp, a share of the replica's."""
    runtime: int
    activations: int

    @property
    def kv(self) -> int:
        return self.kv_per_sequence * self.sequences

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.runtime + self.activations


def need(
    spec: CatalogueModel,
    layout: ReplicaLayout,
    precision: WeightPrecision,
    kv: KvPrecision,
    *,
    context: int,
    sequences: int,
) -> MemoryNeed:
    """What the fullest device of a replica holds while `sequences` of `context` tokens are worked on."""
    own = -(-sequences // layout.dp)
    several = layout.devices > 1
    return MemoryNeed(
        weights=weight_bytes(spec, layout, precision),
        kv_per_sequence=sequence_bytes(spec, layout, kv, context),
        sequences=own,
        runtime=RUNTIME_BYTES + (COMMUNICATION_BYTES if several else 0),
        activations=_activation_bytes(spec, layout, own),
    )


def weight_bytes(spec: CatalogueModel, layout: ReplicaLayout, precision: WeightPrecision) -> int:
    """Weights on the fullest device. The layers are dealt out evenly; a remainder makes some stages one longer."""
    stage = stage_layers(spec, layout)
    heavy = min(spec.moe_layers, stage) if spec.moe is not None else 0
    attention = stage * attention_bytes(spec, layout, precision)
    experts = heavy * moe_layer_bytes(spec, layout, precision) if heavy else 0.0
    dense = (stage - heavy) * dense_mlp_bytes(spec, layout, precision)
    return round(attention + experts + dense + table_bytes(spec, layout))


def stage_layers(spec: CatalogueModel, layout: ReplicaLayout) -> int:
    """Layers of the longest stage."""
    return -(-spec.layers // layout.pp)


def attention_bytes(spec: CatalogueModel, layout: ReplicaLayout, precision: WeightPrecision) -> float:
    """One layer without its MLP, on one device."""
    kept = spec.attention_precision(precision)
    kv_share = max(1.0, spec.kv_heads / layout.tp) / spec.kv_heads
    cut = spec.attention_split.bytes_at(kept) / layout.tp
    return cut + spec.attention_kv.bytes_at(kept) * kv_share + spec.attention_whole.bytes_at(kept)


def dense_mlp_bytes(spec: CatalogueModel, layout: ReplicaLayout, precision: WeightPrecision) -> float:
    return spec.dense_mlp.bytes_at(spec.attention_precision(precision)) / layout.tp


def moe_layer_bytes(
    spec: CatalogueModel, layout: ReplicaLayout, precision: WeightPrecision, *, touched: float = 1.0
) -> float:
    """One layer's experts and router on one device; of the routed experts the share `touched`."""
    assert spec.moe is not None
    held = -(-spec.moe.experts // layout.ep) / (layout.tp if layout.ep == 1 else 1)
    shared = spec.expert.bytes_at(precision) * spec.moe.shared / layout.tp
    return spec.expert.bytes_at(precision) * held * touched + shared + spec.router.bytes_at("bf16")


def table_bytes(spec: CatalogueModel, layout: ReplicaLayout) -> float:
    """Embedding and head; in a pipeline they are on different stages."""
    tables: ParameterCount = spec.tables
    count = tables.total if layout.pp == 1 else spec.vocabulary * spec.hidden
    return count * BYTES_PER_PLAIN / layout.tp + spec.hidden * BYTES_PER_PLAIN


def sequence_bytes(spec: CatalogueModel, layout: ReplicaLayout, kv: KvPrecision, context: int) -> int:
    """KV cache of one sequence of `context` tokens on one device.

    KV heads are cut by tp until each device has one; from there on they are copied, as MLA's latent vector always is.
    """
    tokens = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS
    stage = stage_layers(spec, layout)
    windowed = spec.window_layers * stage // spec.layers
    seen = min(tokens, -(-spec.sliding_window // BLOCK_TOKENS) * BLOCK_TOKENS)
    values = spec.kv_values(kv_heads=max(1, -(-spec.kv_heads // layout.tp)))
    return ((stage - windowed) * tokens + windowed * seen) * values * BYTES_PER_KV[kv]


def _activation_bytes(spec: CatalogueModel, layout: ReplicaLayout, sequences: int) -> int:
    """A step's intermediate results at their peak: hidden states, the widest MLP, and the logits of each sequence."""
    widest = 2 * spec.intermediate / layout.tp
    if spec.moe is not None:
        widest = max(widest, spec.moe.top_k * (2 * spec.moe.intermediate + spec.hidden))
    states = CHUNK_TOKENS * (4 * spec.hidden + widest) * ACTIVATION_BYTES
    return round(states + sequences * spec.vocabulary * LOGIT_BYTES)
