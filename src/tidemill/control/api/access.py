"""How a handler reaches the store.

In a thread, with the usage logs drained before and the gateways told after.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from litestar.di import NamedDependency
from litestar.params import SkipValidation
from sqlalchemy import Connection

from tidemill.control import changes
from tidemill.control.platform import Platform
from tidemill.store.engine import Store

T = TypeVar("T")

Running = NamedDependency[SkipValidation[Platform]]
"""The running platform, as handlers are given it."""


async def read(platform: Platform, query: Callable[[Connection], T]) -> T:
    """Run `query` in one read transaction."""
    return await asyncio.to_thread(_read, platform.store, query)


async def read_drained(platform: Platform, query: Callable[[Connection], T]) -> T:
    """The same, of all that was settled until now."""
    await platform.drain_usage()
    return await read(platform, query)


async def change(platform: Platform, make: Callable[[Connection], T]) -> T:
    """Run `make` in one write transaction, and return once the gateways act upon it."""
    result = await asyncio.to_thread(changes.write, platform.store, make)
    await platform.announce()
    return result


def _read(store: Store, query: Callable[[Connection], T]) -> T:
    with store.read() as connection:
        return query(connection)
