"""Kinds of devices: memory, bandwidth, compute and power, each as far as it is known."""

from typing import Literal

import msgspec

from tidemill.engines.catalogue.models import WeightPrecision

MIB = 2**20


class GpuSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of device. What the vendor does not publish is named in `uncertain`, or None when nobody gives it."""

    kind: str
    name: str
    vendor: str
    source: str
    memory_mib: int | None = None
    """As the driver reports it; None where it is the machine's (cpu)."""
    bandwidth: float | None = None
    """Of its memory, GB/s (1e9 bytes)."""
    link: float | None = None
    """To its neighbours in the node, in one direction, GB/s."""
    tdp: int | None = None
    """Watts."""
    compute: dict[Literal["bf16", "fp8", "int8"], float] = {}
    """Dense TFLOP/s by precision."""
    upcasts: tuple[WeightPrecision, ...] = ()
    """Weights that it keeps in this precision and widens to bf16 while it computes."""
    uncertain: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        return (self.memory_mib or 0) * MIB

    @property
    def precisions(self) -> tuple[WeightPrecision, ...]:
        """What weights it can hold and compute with."""
        computed: tuple[WeightPrecision, ...] = tuple(self.compute)
        return computed + tuple(each for each in self.upcasts if each not in computed)

    def flops(self, precision: WeightPrecision) -> float | None:
        """FLOP/s with weights of that precision; None when nobody says."""
        figures = [figure for kind, figure in self.compute.items() if kind == precision]
        if not figures and precision in self.upcasts:
            figures = [self.compute[kind] for kind in self.compute if kind == "bf16"]
        return figures[0] * 1e12 if figures else None
