"""Rate limits in the response headers of each API.

Sources: OpenAI API reference, "Rate limits in headers"; Anthropic API reference, "Rate limits", response headers.
"""

import time

import msgspec

from tidemill.gateway.protocols.dialect import ANTHROPIC, Dialect


class LimitState(msgspec.Struct, frozen=True, gc=False):
    """The tightest limit of its kind, as it is now."""

    what: bytes
    """`requests` or `tokens`."""
    limit: int
    """A minute."""
    remaining: int
    reset_s: int
    """Seconds until all of it is free again."""


def limit_headers(state: LimitState, dialect: Dialect, now: float) -> bytes:
    """Header lines for one limit. `now`: Unix time in seconds."""
    if dialect is ANTHROPIC:  # the reset is an instant in RFC 3339
        instant = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + state.reset_s)).encode()
        name = b"anthropic-ratelimit-" + state.what
        return b"%b-limit: %d\r\n%b-remaining: %d\r\n%b-reset: %b\r\n" % (
            name,
            state.limit,
            name,
            state.remaining,
            name,
            instant,
        )
    return b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %ds\r\n" % (
        state.what,
        state.limit,
        state.what,
        state.remaining,
        state.what,
        state.reset_s,
    )
