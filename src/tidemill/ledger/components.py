"""The catalogue of price components.

All that a request can be billed for, with its unit and the scale of its price.

A price is a rate for each component, a usage record a quantity of each. To bill something new, add it here, to the
documentation, and to what counts it.
"""

from collections.abc import Mapping
from enum import IntEnum

import msgspec

MAX_TOKENS = 2**28
"""The most tokens of one kind in one request that Tidemill believes: 268 million."""

MAX_PRICE = 10**16
"""The highest rate of most components, nanos: ten currency units a token."""


class Component(IntEnum):
    """What is counted and priced. The numbers are in logs on disk: none is ever changed, or used again."""

    INPUT = 1
    """Prompt tokens that had to be computed."""
    CACHED_INPUT = 2
    """Prompt tokens that the engine found in its prefix cache."""
    CACHE_WRITE = 3
    """Prompt tokens that the engine wrote into a cache which the client asked for."""
    OUTPUT = 4
    """Tokens of the answer."""
    REASONING_OUTPUT = 5
    """Tokens that a model thinks before its answer."""
    REQUEST = 6
    SEARCH = 7
    """One query over up to a hundred documents (Cohere's search unit)."""
    DOCUMENT = 8
    """Documents that were ranked or read."""
    IMAGE = 9
    AUDIO_SECOND = 10
    CHARACTER = 11
    """Characters of text that were read or spoken."""

    @property
    def key(self) -> str:
        """Its name in configuration, database and APIs."""
        return self.name.lower()


class ComponentSpec(msgspec.Struct, frozen=True):
    """How a component is counted and priced."""

    label: str
    """What an invoice calls it."""
    unit: str
    """What is counted, in the plural."""
    per: int
    """A rate is the price of so many units."""
    per_text: str
    """The same in words: a price is so much *per ...*."""
    part_of: Component | None = None
    """The component that it is counted with where a price has no rate for it; without one, it then costs nothing."""
    most: int = MAX_TOKENS
    """The most of it in one request that is believed. All components together then fit a charge of 64 bits."""
    max_rate: int = MAX_PRICE


CATALOGUE: Mapping[Component, ComponentSpec] = {
    Component.INPUT: ComponentSpec("input", "tokens", 1_000_000, "million tokens"),
    Component.CACHED_INPUT: ComponentSpec("cached input", "tokens", 1_000_000, "million tokens"),
    Component.CACHE_WRITE: ComponentSpec("cache write", "tokens", 1_000_000, "million tokens", Component.INPUT),
    Component.OUTPUT: ComponentSpec("output", "tokens", 1_000_000, "million tokens"),
    Component.REASONING_OUTPUT: ComponentSpec("reasoning", "tokens", 1_000_000, "million tokens", Component.OUTPUT),
    Component.REQUEST: ComponentSpec("requests", "requests", 1_000, "thousand requests", most=2**16),
    Component.SEARCH: ComponentSpec("searches", "searches", 1_000, "thousand searches", most=2**16),
    Component.DOCUMENT: ComponentSpec("documents", "documents", 1_000, "thousand documents", most=2**16),
    Component.IMAGE: ComponentSpec("images", "images", 1, "image", most=2**12, max_rate=10**13),
    Component.AUDIO_SECOND: ComponentSpec("audio (s)", "seconds", 60, "minute", most=2**20, max_rate=10**13),
    Component.CHARACTER: ComponentSpec("characters", "characters", 1_000_000, "million characters", most=2**26),
}
"""In the order of an invoice."""

BASE = INPUT, CACHED_INPUT, OUTPUT = Component.INPUT, Component.CACHED_INPUT, Component.OUTPUT
"""The components that every price has a rate of, and every record a count: the tokens of a prompt and an answer. The
log and the database have a place of their own for each; the others are kept where there are any."""

BY_KEY: Mapping[str, Component] = {component.key: component for component in CATALOGUE}
"""The components by their names."""

PLACE: Mapping[Component, int] = {component: place for place, component in enumerate(CATALOGUE)}
"""The place of each in the order of an invoice."""


def group_of(component: Component) -> tuple[Component, ...]:
    """A component and those that are part of it."""
    return (component, *(each for each, spec in CATALOGUE.items() if spec.part_of is component))
