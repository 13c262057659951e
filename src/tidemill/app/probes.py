"""Probes of upstreams: whether each is well.

It is a coarse question, asked by the supervisor for all gateway processes.

Engines of one's own are watched by their own guard (`fleet.replica`). What a probe sees of an upstream comes on top of
what the gateways learn from real requests (`gateway.routing.circuit_breaker`): it finds an outage that no request has
met yet, and the end of one, so that nobody has to be the guinea pig.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

_TIMEOUT_S = 5.0
FAILURES = 2
"""Probes that fail one after the other before an upstream is left out."""
AGAIN_S = 1.0
"""The wait between probes while one has failed."""

log = structlog.get_logger()

StatusOf = Callable[[str, bytes, float, str | None], Awaitable[int | None]]
"""The status of a GET: base URL, path, time limit in seconds, API key; None when nothing comes."""


class UpstreamProbe:
    """Asks one upstream, `every_s` seconds; `ready` is what it has found.

    0 seconds: it is taken for well, always.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        api_key: str | None,
        *,
        every_s: float,
        changed: Callable[[], None],
        get: StatusOf,
    ) -> None:
        self.name = name
        self.base_url = base_url
        self.ready = True
        self._api_key = api_key
        self._every_s = every_s
        self._changed = changed
        self._get = get
        self._task: asyncio.Task[None] | None = None
        self._has_health = True

    def start(self) -> None:
        if self._every_s > 0:
            self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        failures = 0
        while True:
            await asyncio.sleep(min(AGAIN_S, self._every_s) if failures else self._every_s)
            try:
                well = await self.ask()
            except Exception:
                log.exception("a probe failed", replica=self.name)
                continue
            failures = 0 if well else min(failures + 1, FAILURES)
            if well != self.ready and (well or failures >= FAILURES):
                self.ready = well
                log.warning("an upstream is back" if well else "an upstream does not answer", replica=self.name)
                self._changed()

    async def ask(self) -> bool:
        """Whether it answers: `/health` where it has one, else its list of models. A refusal is an answer too."""
        if self._has_health:
            root = self.base_url.rstrip("/").removesuffix("/v1")
            status = await self._get(root, b"/health", _TIMEOUT_S, self._api_key)
            if status is None or status == 200 or status >= 500:
                return status == 200
            self._has_health = False
        status = await self._get(self.base_url, b"/models", _TIMEOUT_S, self._api_key)
        return status is not None and status < 500
