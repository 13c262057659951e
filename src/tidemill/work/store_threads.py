"""What blocks on store and disk, done in threads; and what must be done, tried until it is."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import structlog

_RETRY_AFTER_S = (0.2, 1.0, 5.0)
"""Waits before something that must be written down is tried again."""
SAID_EACH = 20
"""Of so many tries one is told of in the log."""

P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger()


class StoreThreads:
    """A few threads. Its coroutines are for one event loop."""

    def __init__(self, count: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: call(*args, **kwargs))

    async def surely(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it again and again until it does not fail.

        For what must be written down, however long the store does not answer.
        """
        tries = 0
        while True:
            try:
                return await self.do(call, *args, **kwargs)
            except Exception as error:
                wait_s = _RETRY_AFTER_S[min(tries, len(_RETRY_AFTER_S) - 1)]
                if tries % SAID_EACH == 0:
                    log.warning("cannot be stored; it is tried again", reason=str(error), again_in_s=wait_s)
                tries += 1
                await asyncio.sleep(wait_s)

    def later(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call it some time; a failure is told of in the log."""

        def quietly() -> None:
            try:
                call(*args, **kwargs)
            except Exception as error:
                log.warning("cannot be stored", reason=str(error))

        self._executor.submit(quietly)

    def close(self) -> None:
        """Return when all is done."""
        self._executor.shutdown(wait=True)
