"""Which environment variable makes which devices visible to a process, and no others."""

from collections.abc import Sequence

from tidemill.fleet.backend import Device

_BY_KIND = {
    "ascend": ("ASCEND_RT_VISIBLE_DEVICES",),
    "hygon": ("HIP_VISIBLE_DEVICES",),
    "dcu": ("HIP_VISIBLE_DEVICES",),
    "mi": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "kunlun": ("XPU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "mtt": ("MUSA_VISIBLE_DEVICES",),
}
"""By the beginning of a kind's name; all others are taken for CUDA's.

Sources: CANN's, ROCm's, XRE's and MUSA's own documentation of these variables. Not run on these devices here.
"""
_CUDA = ("CUDA_VISIBLE_DEVICES",)


def visible_devices(devices: Sequence[Device]) -> dict[str, str]:
    """The variables for a process that holds `devices`.

    One that holds CPU slots alone sees no accelerator; one that holds nothing is left with what the node shows it.
    """
    if not devices:
        return {}
    found: dict[str, list[str]] = {}
    for device in devices:
        for variable in () if device.kind == "cpu" else variables_of(device.kind):
            found.setdefault(variable, []).append(str(device.index))
    if not found:
        return dict.fromkeys(_CUDA, "")
    return {variable: ",".join(indices) for variable, indices in found.items()}


def variables_of(kind: str) -> tuple[str, ...]:
    """The variables that choose among devices of a kind."""
    return next((names for start, names in _BY_KIND.items() if kind.startswith(start)), _CUDA)
