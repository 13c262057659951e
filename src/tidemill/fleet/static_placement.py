"""Where replicas go when nobody plans.

Those that a configuration wants at all times, on the first devices that fit.

With the tide running, `tides.plan` decides instead.
"""

from collections.abc import Collection, Sequence

from tidemill.fleet.backend import Device, Node
from tidemill.fleet.recipe import Recipe
from tidemill.tides.placement import equal_parts


def share_of_slots(recipe: Recipe, index: int, nodes: Sequence[Node]) -> tuple[Device, ...]:
    """The CPU slots of a replica that does not say how many it wants.

    Its part, when all that may be share a node.
    """
    for node in nodes:
        slots = [device for device in node.devices if device.kind == "cpu"]
        if node.up and slots:
            size = max(1, len(slots) // max(recipe.max_replicas, 1))
            first = index * size % len(slots)
            return tuple(slots[first : first + size])
    return ()


def first_fit(
    recipe: Recipe, nodes: Sequence[Node], taken: Collection[str], apart: Collection[str] = ()
) -> tuple[Device, ...] | None:
    """Free devices for one replica; None when there are not enough.

    All of one kind and node, or of one that spans nodes in equal parts of several, the best kind first, and nodes other
    than those named `apart` where there is a choice.
    """
    assert recipe.devices is not None
    kinds = recipe.kinds or tuple(dict.fromkeys(device.kind for node in nodes for device in node.devices))
    for kind in kinds:
        up = sorted((node for node in nodes if node.up), key=lambda each: each.name in apart)
        of_kind = [[device for device in node.devices if device.kind == kind] for node in up]
        largest = max(map(len, of_kind), default=0)
        parts, size = 1, recipe.devices
        if recipe.spans and 0 < largest < size:
            parts, size = equal_parts(size, largest)
        free = [[device for device in devices if device.id not in taken] for devices in of_kind]
        fitting = [devices[:size] for devices in free if len(devices) >= size]
        if len(fitting) >= parts:
            return tuple(device for devices in fitting[:parts] for device in devices)
    return None
