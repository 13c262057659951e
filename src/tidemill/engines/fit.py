"""What fits where: the layouts of a model over given nodes, and what each of them leaves for context and concurrency.

Pure: a model, nodes and a request in; layouts with their arithmetic out.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import msgspec

from tidemill.engines.catalogue import gpu_named
from tidemill.engines.catalogue.gpus import GpuSpec
from tidemill.engines.catalogue.models import CatalogueModel, KvPrecision, WeightPrecision
from tidemill.engines.memory import GIB, MEMORY_SHARE, MemoryNeed, ReplicaLayout, need
from tidemill.engines.roofline import Estimate, estimate
from tidemill.errors import BadInput

FAST_LINK_GBS = 100.0
"""From here on, tensor parallel over the whole node is what one takes; below, pipelines within a node are offered."""
_MAX_DEVICES = 16_384
MAX_SEQUENCES = 1_000_000
"""Where the search for the largest concurrency ends."""

_NODES = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w .-]*|\d{4}|910[BbCc])(?:@(\d+)\s*(?:GB|GiB|G))?")


class NodeGroup(msgspec.Struct, frozen=True):
    """Nodes that are alike: `2x8xH800` is two nodes of eight H800."""

    nodes: int
    per_node: int
    gpu: GpuSpec

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.per_node}x{self.gpu.kind}"


class FitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica shall do."""

    context: int
    """Tokens of each sequence, prompt and answer together."""
    sequences: int
    """Sequences that a replica works on at a time."""
    precision: WeightPrecision | None = None
    """None: the maker's own, or bf16 where the device cannot hold that."""
    kv: KvPrecision = "bf16"
    memory_share: float = MEMORY_SHARE


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """One layout on one group of nodes."""

    group: NodeGroup
    layout: ReplicaLayout
    precision: WeightPrecision
    need: MemoryNeed
    usable: int
    """Bytes of each device."""
    fits: bool
    """The whole request fits."""
    replicas: int
    """How many such replicas the group holds."""
    max_context: int
    """Tokens that one sequence may have when it is alone, up to what the model takes; 0: not even the weights fit."""
    max_sequences: int
    """Sequences of the wished context that a replica holds."""
    estimate: Estimate | None
    """At the request, or at `max_sequences` where that is fewer; None where there is nothing to estimate from."""

    @property
    def estimated_sequences(self) -> int:
        wished = self.need.sequences * self.layout.dp
        return min(wished, self.max_sequences) if self.max_sequences else wished


def parse_nodes(text: str) -> tuple[NodeGroup, ...]:
    """`2x8xH800`, `8xH100` (one node), `RTX-4090`, several with commas, `cpu@64GB`. Raises BadInput and NotFound."""
    groups = []
    for part in text.split(","):
        found = _NODES.fullmatch(part.strip())
        if found is None:
            raise BadInput(f"{part.strip()!r} says no nodes.", hint="Write 2x8xH800: two nodes of eight H800 each.")
        first, second, kind, memory = found.groups()
        gpu = gpu_named(kind)
        if memory is not None:
            gpu = msgspec.structs.replace(gpu, memory_mib=int(memory) * 1024)
        elif gpu.memory_mib is None:
            raise BadInput(f"{part.strip()!r} does not say how much memory there is.", hint=f"Write {kind}@64GB.")
        nodes, per_node = (int(first), int(second)) if second else (1, int(first or 1))
        if not 1 <= nodes * per_node <= _MAX_DEVICES:
            raise BadInput(f"{part.strip()!r}: there are from 1 to {_MAX_DEVICES} devices.")
        groups.append(NodeGroup(nodes, per_node, gpu))
    return tuple(groups)


def parse_tokens(text: str) -> int:
    """`32k` (x 1024), `8000`, `0.5M`. Raises BadInput."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmM]?)", text.strip())
    tokens = float(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()] if found else 0
    if not 1 <= tokens <= 2**30:
        raise BadInput(f"{text!r} is no number of tokens.", hint="Write 32768 or 32k.")
    return int(tokens)


def precision_for(spec: CatalogueModel, gpu: GpuSpec, wished: WeightPrecision | None) -> WeightPrecision:
    """The precision that the weights are kept in. Raises BadInput when the device cannot hold the requested one."""
    if wished is None:
        return spec.native if spec.native in gpu.precisions else "bf16"
    if wished not in gpu.precisions:
        raise BadInput(f"{gpu.name} cannot hold {wished} weights.", hint=f"It can hold: {', '.join(gpu.precisions)}.")
    if wished == "mxfp4" and spec.native != "mxfp4":
        raise BadInput(f"{spec.name} is not published in mxfp4.", hint="Choose bf16, fp8, int8 or int4.")
    return wished


def fits(spec: CatalogueModel, groups: Sequence[NodeGroup], request: FitRequest) -> list[Fit]:
    """All layouts on all groups, best first: those that fit the request, by the tokens a second of the whole group
    (then by the fewest devices); then the others, by what they hold. Raises BadInput for a request that the model
    cannot take.
    """
    if request.context > spec.max_context:
        raise BadInput(
            f"{spec.name} takes at most {spec.max_context} tokens, not {request.context}.",
            hint="Longer contexts need a scaled rotary embedding (YaRN), which this does not account for.",
        )
    return sorted(
        (_fit(spec, group, layout, request) for group in groups for layout in layouts(spec, group)), key=_rank
    )


def _rank(fit: Fit) -> tuple[bool, float, int, int]:
    found = fit.estimate
    speed = found.decode_tokens_s * fit.replicas if found is not None and fit.fits else 0.0
    return not fit.fits, -speed, -fit.max_sequences * fit.replicas, fit.layout.devices


def layouts(spec: CatalogueModel, group: NodeGroup) -> Iterator[ReplicaLayout]:
    """How a replica may be spread over these nodes.

    Tensor parallel stays within a node and divides its heads. A pipeline is made of whole nodes, or, where the link
    between devices is slow, of parts of one. Attention in copies (dp) with the experts spread over all of them (ep)
    may go over several nodes.
    """
    width = group.per_node
    inside = [tp for tp in range(1, width + 1) if width % tp == 0 and _cuts(spec, tp)]
    slow = group.gpu.link is not None and group.gpu.link < FAST_LINK_GBS
    for tp in inside:
        yield ReplicaLayout(tp)
        stages = [pp for pp in range(2, width // tp + 1) if width % (tp * pp) == 0] if slow else []
        if tp == max(inside):
            stages += [width // tp * nodes for nodes in range(2 if tp == width else 1, group.nodes + 1)]
        yield from (ReplicaLayout(tp, pp) for pp in sorted({*stages}) if 1 < pp <= spec.layers)
    if spec.moe is None:
        return
    wide = [size for size in range(2, width + 1) if width % size == 0]
    wide += [width * nodes for nodes in range(2, group.nodes + 1)]
    for size in wide:
        if spec.moe.experts % size == 0:
            yield from (ReplicaLayout(tp, dp=size // tp) for tp in inside if size % tp == 0 and size > tp)


def _cuts(spec: CatalogueModel, tp: int) -> bool:
    """Whether the heads can be dealt out: each device an equal share of the query heads, and KV heads cut or copied."""
    if spec.heads % tp:
        return False
    return spec.mla is not None or spec.kv_heads % tp == 0 or tp % spec.kv_heads == 0


def _fit(spec: CatalogueModel, group: NodeGroup, layout: ReplicaLayout, request: FitRequest) -> Fit:
    precision = precision_for(spec, group.gpu, request.precision)
    usable = int(group.gpu.memory_bytes * request.memory_share)

    def holds(context: int, sequences: int) -> bool:
        return need(spec, layout, precision, request.kv, context=context, sequences=sequences).total <= usable

    max_sequences = _largest(MAX_SEQUENCES, lambda count: holds(request.context, count))
    sequences = min(request.sequences, max_sequences) if max_sequences else 0
    return Fit(
        group=group,
        layout=layout,
        precision=precision,
        need=need(spec, layout, precision, request.kv, context=request.context, sequences=request.sequences),
        usable=usable,
        fits=max_sequences >= request.sequences,
        replicas=_replicas(group, layout),
        max_context=_largest(spec.max_context, lambda context: holds(context, 1)),
        max_sequences=max_sequences,
        estimate=estimate(
            spec,
            layout,
            group.gpu,
            precision,
            request.kv,
            context=request.context,
            sequences=sequences,
            per_node=group.per_node,
        )
        if sequences
        else None,
    )


def _replicas(group: NodeGroup, layout: ReplicaLayout) -> int:
    """A replica takes a part of one node, or whole nodes."""
    if layout.devices <= group.per_node:
        return group.nodes * (group.per_node // layout.devices)
    return group.nodes // -(-layout.devices // group.per_node)


def _largest(bound: int, holds: Callable[[int], bool]) -> int:
    """The largest of 1..bound that holds, where all smaller ones hold too; 0 when none does."""
    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def shortfall(fit: Fit) -> str:
    """Why a layout does not hold the request, in one sentence."""
    fixed = fit.need.weights + fit.need.runtime + fit.need.activations
    if fixed > fit.usable:
        return f"weights and runtime alone are {fixed / GIB:.1f} of {fit.usable / GIB:.1f} GiB"
    return f"KV cache for {fit.max_sequences} of {fit.need.sequences * fit.layout.dp} sequences"
