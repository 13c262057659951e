"""A key's policy: its expiry, the allowed networks and the allowed models."""

import time
from collections.abc import Collection
from datetime import UTC, datetime
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import msgspec

from tidemill.gateway.errors import InvalidKey, NotAllowed
from tidemill.http.server import Exchange
from tidemill.store.keys import ANYTHING, KeyPolicy

Network = IPv4Network | IPv6Network

MAX_FORWARDED = 16
"""Proxies that a request may have come through."""


class KeyRules(msgspec.Struct, frozen=True):
    """A key's policy, ready to be applied."""

    expires_at: float | None
    """Seconds since 1970 UTC."""
    models: frozenset[str]
    """Empty: all."""
    networks: tuple[Network, ...]
    """Empty: from anywhere."""

    def check(self, exchange: Exchange, proxies: Collection[Network]) -> None:
        """Raise InvalidKey for an expired key, NotAllowed for an address outside the key's networks."""
        if self.expires_at is not None and time.time() >= self.expires_at:
            when = datetime.fromtimestamp(self.expires_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            raise InvalidKey(f"This API key expired at {when}.", hint="Ask your operator for a new one.")
        if self.networks:
            address = client_address(exchange, proxies)
            if address is None or not within(address, self.networks):
                raise NotAllowed(
                    f"This API key may not be used from {address or 'an unknown address'}.",
                    hint="Your operator has restricted it to certain networks.",
                )

    def check_model(self, model: str) -> None:
        """Raise NotAllowed for a model that the key may not use."""
        if self.models and model not in self.models:
            allowed = ", ".join(sorted(self.models))
            raise NotAllowed(
                f"This API key may not use the model {model!r}.", hint=f"It may use: {allowed}.", param="model"
            )


def rules_of(policy: KeyPolicy) -> KeyRules | None:
    """The parsed rules of a policy; None for one that allows everything."""
    if policy == ANYTHING:
        return None
    return KeyRules(
        expires_at=None if policy.expires_at is None else policy.expires_at.timestamp(),
        models=frozenset(policy.models),
        networks=networks_of(policy.networks),
    )


@lru_cache(maxsize=1024)
def networks_of(texts: tuple[str, ...]) -> tuple[Network, ...]:
    """Parse networks in CIDR notation."""
    return tuple(ip_network(text) for text in texts)


def within(address: IPv4Address | IPv6Address, networks: Collection[Network]) -> bool:
    """True if one of the networks contains this address."""
    return any(address in network for network in networks)


def client_address(exchange: Exchange, proxies: Collection[Network]) -> IPv4Address | IPv6Address | None:
    """The address that a request comes from.

    It is the connection's other end or, where that is a trusted proxy, whoever it was handed on for, by X-Forwarded-For
    read from its end: what stands before the first that is not trusted may be made up.
    """
    address = _address(exchange.peer)
    if not proxies or address is None or not within(address, proxies):
        return address
    forwarded = exchange.headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")
    for text in reversed(forwarded[-MAX_FORWARDED:]):
        before = _address(text.strip())
        if before is None:
            return address if not text.strip() else None
        address = before
        if not within(address, proxies):
            break
    return address


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
