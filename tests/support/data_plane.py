"""A data plane before a scripted engine, as a fixture. The data plane runs on uvloop, so its tests do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest_asyncio
import uvloop

from tests.support.plane import Plane, model
from tests.support.upstream import Script, Upstream


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


Start = Callable[..., Awaitable[tuple[Plane, Upstream]]]


@pytest_asyncio.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`plane, upstream = await start(script, **changes to the model)`: a data plane before a scripted engine."""
    async with AsyncExitStack() as stack:

        async def start(
            script: Script, *, credit: str = "100", write_timeout_s: float = 30.0, **changes: Any
        ) -> tuple[Plane, Upstream]:
            upstream = Upstream(script)
            await upstream.start()
            stack.push_async_callback(upstream.stop)
            plane = Plane(tmp_path, [model(upstream.port, **changes)], credit=credit, write_timeout_s=write_timeout_s)
            await stack.enter_async_context(plane)
            return plane, upstream

        yield start
