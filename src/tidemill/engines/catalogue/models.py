"""What a model is made of, as its config.json tells it, and the counts and bytes that follow from that.

Everything here is arithmetic on the architecture. The tests hold the derived parameter counts against those that
the makers publish, to the last parameter where they do, so that a wrong figure in the data does not go unnoticed.
"""

from typing import Literal, get_args

import msgspec

WeightPrecision = Literal["bf16", "fp8", "int8", "int4", "mxfp4"]
KvPrecision = Literal["bf16", "fp8"]

WEIGHT_PRECISIONS: tuple[WeightPrecision, ...] = get_args(WeightPrecision)

BYTES_PER_WEIGHT: dict[WeightPrecision, float] = {
    "bf16": 2.0,
    "fp8": 1.0 + 4 / (128 * 128),
    "int8": 1.0 + 4 / 4096,
    "int4": 0.5 + 2.5 / 128,
    "mxfp4": 0.5 + 1 / 32,
}
"""Of a quantised matrix, its scales included: fp8 in blocks of 128 x 128 with a float32 each (DeepSeek-V3), int8 with
a float32 a row, int4 in groups of 128 with a float16 scale and a 4-bit zero (AWQ, GPTQ), mxfp4 in groups of 32 with a
byte each (OCP Microscaling specification)."""

BYTES_PER_PLAIN = 2.0
"""Embeddings, the head, norms and routers stay in bf16 whatever the precision."""

BYTES_PER_KV: dict[KvPrecision, int] = {"bf16": 2, "fp8": 1}


class Mla(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head latent attention: what is cached is one latent vector and one rotary key for all heads.

    Source: DeepSeek-V2 (arXiv 2405.04434).
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def cached(self) -> int:
        """Values that are cached for a token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim


class Moe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mixture of experts in place of the dense MLP."""

    experts: int
    top_k: int
    """Experts that a token goes through, besides the shared ones."""
    intermediate: int
    shared: int = 0
    dense_layers: int = 0
    """The first layers, which have a dense MLP."""
    expert_bias: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    """One value per expert that only decides the choice (DeepSeek-V3's balancing without a loss)."""


class ParameterCount(msgspec.Struct, frozen=True):
    """Parameters of a part of the model: those in matrices that quantisation shrinks, and the rest."""

    matrices: int = 0
    plain: int = 0

    @property
    def total(self) -> int:
        return self.matrices + self.plain

    def __add__(self, other: "ParameterCount") -> "ParameterCount":
        return ParameterCount(self.matrices + other.matrices, self.plain + other.plain)

    def times(self, count: int) -> "ParameterCount":
        return ParameterCount(self.matrices * count, self.plain * count)

    def bytes_at(self, precision: WeightPrecision) -> float:
        return self.matrices * BYTES_PER_WEIGHT[precision] + self.plain * BYTES_PER_PLAIN


class CatalogueModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One model of the catalogue. Names follow config.json: `hidden` is its hidden_size, and so on."""

    name: str
    hub_id: str
    licence: str
    source: str
    native: WeightPrecision
    """The precision that its maker publishes the weights in."""
    max_context: int
    """Tokens, prompt and answer together, as config.json has it (without YaRN where that must be switched on)."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Of a dense MLP."""
    vocabulary: int
    aliases: tuple[str, ...] = ()
    parameters: int | None = None
    """As published, where an exact count is; `total` counts them anew."""
    total_published: str = ""
    active_published: str = ""
    tied: bool = False
    """The head uses the embedding's table."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    layer_norms: int = 2
    """Norms in a layer, besides those of q and k."""
    attention_sinks: bool = False
    """One learned value per head."""
    sliding_window: int = 0
    """Tokens that a layer with a window looks back; 0: none has one."""
    window_layers: int = 0
    mla: Mla | None = None
    moe: Moe | None = None

    @property
    def moe_layers(self) -> int:
        return self.layers - self.moe.dense_layers if self.moe is not None else 0

    @property
    def tables(self) -> ParameterCount:
        """The embedding, and the head where it has one of its own."""
        return ParameterCount(plain=self.vocabulary * self.hidden * (1 if self.tied else 2))

    @property
    def attention_split(self) -> ParameterCount:
        """A layer's attention matrices that tensor parallelism cuts by query heads."""
        if self.mla is not None:
            mla = self.mla
            q = mla.q_lora_rank * self.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
            kv = mla.kv_lora_rank * self.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            return ParameterCount(q + kv + self.heads * mla.v_head_dim * self.hidden)
        width = self.heads * self.head_dim
        bias = width * self.qkv_bias + self.hidden * self.output_bias + self.heads * self.attention_sinks
        return ParameterCount(2 * self.hidden * width, bias)

    @property
    def attention_kv(self) -> ParameterCount:
        """Its key and value projections: cut by KV heads, of which every device has at least one."""
        if self.mla is not None:
            return ParameterCount()
        width = 2 * self.kv_heads * self.head_dim
        return ParameterCount(self.hidden * width, width * self.qkv_bias)

    @property
    def attention_whole(self) -> ParameterCount:
        """What every device has whole: norms, and the down-projections of MLA."""
        norms = self.layer_norms * self.hidden + 2 * self.head_dim * self.qk_norm
        if self.mla is None:
            return ParameterCount(plain=norms)
        mla = self.mla
        down = self.hidden * (mla.q_lora_rank + mla.cached)
        return ParameterCount(down, norms + mla.q_lora_rank + mla.kv_lora_rank)

    @property
    def dense_mlp(self) -> ParameterCount:
        """A dense layer's MLP: gate, up and down."""
        return ParameterCount(3 * self.hidden * self.intermediate)

    @property
    def expert(self) -> ParameterCount:
        """One expert."""
        if self.moe is None:
            return ParameterCount()
        bias = (2 * self.moe.intermediate + self.hidden) * self.moe.expert_bias
        return ParameterCount(3 * self.hidden * self.moe.intermediate, bias)

    @property
    def router(self) -> ParameterCount:
        """The router of a layer with experts."""
        if self.moe is None:
            return ParameterCount()
        return ParameterCount(plain=self.moe.experts * (self.hidden + self.moe.router_bias + self.moe.selection_bias))

    @property
    def attention(self) -> ParameterCount:
        """A layer without its MLP."""
        return self.attention_split + self.attention_kv + self.attention_whole

    @property
    def total(self) -> int:
        """All parameters (without modules for multi-token prediction)."""
        return self._through(self.moe.experts if self.moe is not None else 0).total

    @property
    def active(self) -> int:
        """Parameters that one token is multiplied with: of the experts those that it is sent to, of the tables the
        head alone."""
        experts = self.moe.top_k if self.moe is not None else 0
        embedding = 0 if self.tied else self.vocabulary * self.hidden
        return self._through(experts).total - embedding

    def _through(self, experts: int) -> ParameterCount:
        every = self.attention.times(self.layers) + self.dense_mlp.times(self.layers - self.moe_layers)
        if self.moe is not None:
            every += (self.expert.times(experts + self.moe.shared) + self.router).times(self.moe_layers)
        return every + self.tables + ParameterCount(plain=self.hidden)

    def attention_precision(self, precision: WeightPrecision) -> WeightPrecision:
        """What the matrices outside the experts are kept in: mxfp4 is for experts only (gpt-oss)."""
        return "bf16" if precision == "mxfp4" else precision

    def kv_values(self, *, kv_heads: int | None = None) -> int:
        """Values that one layer caches for a token; of `kv_heads` heads, where a device has only these."""
        if self.mla is not None:
            return self.mla.cached
        return 2 * (self.kv_heads if kv_heads is None else kv_heads) * self.head_dim
