"""The catalogue: models and kinds of devices as data (TOML beside this file), read once, looked up by name."""

import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

import msgspec

from tidemill.engines.catalogue.gpus import GpuSpec
from tidemill.engines.catalogue.models import CatalogueModel
from tidemill.errors import NotFound
from tidemill.suggestions import nearest

__all__ = ["CatalogueModel", "GpuSpec", "gpu_named", "gpus", "model_named", "models"]

T = TypeVar("T")

_SHORT = {
    "h100": "h100-sxm",
    "h800": "h800-sxm",
    "h200": "h200-sxm",
    "a100": "a100-sxm-80",
    "a100-80": "a100-sxm-80",
    "a100-80g": "a100-sxm-80",
    "a100-80gb": "a100-sxm-80",
    "a100-40": "a100-sxm-40",
    "a100-40g": "a100-sxm-40",
    "a100-40gb": "a100-sxm-40",
    "4090": "rtx-4090",
    "rtx4090": "rtx-4090",
    "5090": "rtx-5090",
    "rtx5090": "rtx-5090",
    "910b": "ascend-910b",
    "910c": "ascend-910c",
    "p800": "kunlun-p800",
    "k100-ai": "hygon-k100-ai",
    "k100": "hygon-k100-ai",
    "dcu": "hygon-k100-ai",
}
"""How people call a kind, in lower case."""


@cache
def models() -> Mapping[str, CatalogueModel]:
    """All models, by name."""
    found: dict[str, CatalogueModel] = {}
    folder = files(__name__) / "models"
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if file.name.endswith(".toml"):
            for name, table in _read(file).items():
                found[name] = msgspec.convert({"name": name, **table}, CatalogueModel)
    return found


@cache
def gpus() -> Mapping[str, GpuSpec]:
    """All kinds of devices, by their short name."""
    tables = _read(files(__name__) / "gpus.toml")
    return {kind: msgspec.convert({"kind": kind, **table}, GpuSpec) for kind, table in tables.items()}


def model_named(name: str) -> CatalogueModel:
    """A model by its name, an alias or its hub id, whatever the case. Raises NotFound with the nearest right name."""
    known: dict[str, CatalogueModel] = {}
    for spec in models().values():
        known |= dict.fromkeys((spec.name, spec.hub_id.lower(), spec.hub_id.lower().rpartition("/")[2]), spec)
        known |= dict.fromkeys(spec.aliases, spec)
    return _found(name, known, lambda each: each.name, "model", "tidemill model catalogue")


def gpu_named(kind: str) -> GpuSpec:
    """A kind of device, as `h800-sxm`, `H800` or `910B`. Raises NotFound with the nearest right name."""
    known = {**gpus(), **{short: gpus()[full] for short, full in _SHORT.items()}}
    return _found(kind, known, lambda each: each.kind, "kind of device", "tidemill model catalogue --gpus")


def _found(name: str, known: Mapping[str, T], named: Callable[[T], str], what: str, lists: str) -> T:
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in known:
        return known[wanted]
    near = nearest(wanted, known, cutoff=0.5)
    hint = f"Did you mean {named(known[near])}? " if near else ""
    raise NotFound(f"There is no {what} {name!r} in the catalogue.", hint=f"{hint}`{lists}` names all.")


def _read(file: Traversable) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))
