"""Waiting for an event instead of for a moment."""

import asyncio
from collections.abc import Callable

WITHIN_S = 60.0
"""Only a test that fails waits so long; a busy machine may."""


async def until(true: Callable[[], object], within_s: float = WITHIN_S) -> None:
    """Wait until `true()` is; raises AssertionError when that takes too long."""
    try:
        async with asyncio.timeout(within_s):
            while not true():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"it has not come about within {within_s:g} s") from None


async def at_rest(count: Callable[[], int], looks: int = 50) -> int:
    """What `count()` gives once it has given the same over so many looks, between which this event loop has run."""
    seen, same = count(), 0

    def look() -> bool:
        nonlocal seen, same
        now = count()
        seen, same = now, same + 1 if now == seen else 0
        return same >= looks

    await until(look)
    return seen
