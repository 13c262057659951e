"""Probes of upstreams: whether each is well.

It is a coarse question, asked by the supervisor for all gateway processes.

Engines of one's own are watched by their own guard (`fleet.replica`). What a probe sees of an upstream comes on top of
what the gateways learn from real requests (`gateway.routing.circuit_breaker`): it finds an outage that no request has
met yet, and the end of one, so that nobody has to be the guinea pig.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping

import structlog

from tidemill.engines.protocol import Probe

_TIMEOUT_S = 5.0
FAILURES = 2
"""Probes that fail one after the other before an upstream is left out."""
AGAIN_S = 1.0
"""The wait between probes while one has failed."""

log = structlog.get_logger()

StatusOf = Callable[[str, bytes, float, Mapping[str, str]], Awaitable[int | None]]
"""The status of a GET: base URL, path, time limit in seconds, headers; None when nothing comes."""


class UpstreamProbe:
    """Asks one upstream, `every_s` seconds; `ready` is what it has found.

    0 seconds: it is taken for well, always.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        headers: Mapping[str, str],
        probes: tuple[Probe, ...],
        *,
        every_s: float,
        changed: Callable[[], None],
        get: StatusOf,
    ) -> None:
        self.name = name
        self.base_url = base_url
        self.ready = True
        self._headers = headers
        self._every_s = every_s
        self._changed = changed
        self._get = get
        self._task: asyncio.Task[None] | None = None
        self._probes = probes

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
        """Whether it answers, as its engine's `probes` find out.

        A page that it refuses is not asked for again.
        """
        while True:
            probe, further = self._probes[0], self._probes[1:]
            base_url = root_of(self.base_url) if probe.at_root else self.base_url
            status = await self._get(base_url, probe.path, _TIMEOUT_S, self._headers)
            if status is None or status == 200 or status >= 500 or not further:
                return status is not None and status < 500
            self._probes = further


def root_of(base_url: str) -> str:
    """An engine's address without its `/v1`."""
    return base_url.rstrip("/").removesuffix("/v1")
