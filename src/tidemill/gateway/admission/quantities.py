"""What a request is billed for beside tokens.

What is known of it at admission, and what engines report.
"""

from collections.abc import Mapping

from tidemill.engines.protocol import Ask, TokenCounts
from tidemill.ledger.components import Component
from tidemill.ledger.pricing import NOTHING, Price
from tidemill.ledger.usage import TokenUsage


def counted(ask: Ask, price: Price) -> dict[Component, int]:
    """The quantities known before work starts.

    A ranking's documents and searches are always recorded; the request itself only if it has a price.
    """
    if not ask.documents and Component.REQUEST not in price.rates:
        return {}
    found = {Component.REQUEST: 1} if Component.REQUEST in price.rates else {}
    if ask.documents:
        found[Component.SEARCH] = ask.searches
        found[Component.DOCUMENT] = ask.documents
    return found


def bound(ask: Ask, price: Price) -> Mapping[Component, int]:
    """The maximum of each further component that a request can be billed for."""
    if not ask.documents and Component.REQUEST not in price.rates:
        return NOTHING
    return counted(ask, price) | ({Component.SEARCH: ask.searches_bound} if ask.documents else {})


def used(counts: TokenCounts) -> TokenUsage:
    """An engine's counts in the ledger's terms."""
    if not (counts.reasoning or counts.cache_write or counts.searches):
        return TokenUsage(counts.prompt, counts.cached, counts.completion)
    more = {
        Component.CACHE_WRITE: counts.cache_write,
        Component.REASONING_OUTPUT: counts.reasoning,
        Component.SEARCH: counts.searches,
    }
    return TokenUsage(counts.prompt, counts.cached, counts.completion, more)
