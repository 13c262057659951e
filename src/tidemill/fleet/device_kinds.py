"""Kinds of devices: what the vendors' tools call a device, and what the catalogue does."""

import re
from collections.abc import Collection

from tidemill.engines.catalogue import gpu_named, gpus
from tidemill.errors import ConfigError, NotFound
from tidemill.fleet.devices import slug

CPU = "cpu"
_FORM = re.compile(r"sxm\d*|pcie|nvl|\d+|ascend|kunlun|hygon")
"""Words of a kind that say of which make it is or how it is built in, and not which model."""


def kind_of(name: str, memory_bytes: int) -> str:
    """The catalogue's kind of a device that a tool calls `name`.

    A name of its own for one that is not in it.
    """
    called = slug(name)
    words = called.split("-")
    fitting = []
    for kind, spec in gpus().items():
        wanted = _words(kind)
        if wanted and all(any(_is(word, given) for given in words) for word in wanted):
            other_form = ("pcie" in called) != ("pcie" in kind)
            misfit = abs(spec.memory_bytes - memory_bytes) if memory_bytes else 0
            fitting.append((other_form, misfit, kind))
    return min(fitting)[2] if fitting else called


def _words(kind: str) -> list[str]:
    """The words that a device's name must contain: `rtx-4090` all of it, `a100-sxm-80` only the model."""
    words = kind.split("-")
    return [] if kind == CPU else [word for word in words if words[0] == "rtx" or not _FORM.fullmatch(word)]


def _is(word: str, given: str) -> bool:
    """`910b` is what `910b4` is called; `h20` is not what `h200` is."""
    return given == word or (given.startswith(word) and word[-1:].isalpha() and given[len(word) :].isdigit())


def memory_of(kind: str) -> int:
    """Bytes of a device's memory as the catalogue says; 0 where it does not."""
    spec = gpus().get(kind)
    return spec.memory_bytes if spec is not None else 0


def canonical(kind: str) -> str:
    """The catalogue's name of a kind that somebody calls `H800`.

    The kind itself where the catalogue has none.
    """
    if kind == CPU:
        return kind
    try:
        return gpu_named(kind).kind
    except NotFound:
        return kind


def check_kind(key: str, kind: str, present: Collection[str] = ()) -> str:
    """The catalogue's name of a kind that a configuration names, or one that is `present` on a node.

    Raises ConfigError with the nearest right one.
    """
    if kind == CPU or kind in present:
        return kind
    try:
        return gpu_named(kind).kind
    except NotFound as error:
        others = f" Found on this machine: {', '.join(sorted(present))}." if present else ""
        raise ConfigError(f"{key}: {error.message}", hint=f"{error.hint}{others}") from error
