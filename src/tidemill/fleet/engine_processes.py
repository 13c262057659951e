"""The processes of a replica's engine: one, or one on each node that the replica is on.

They start and end together.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tidemill.engines.launch import MultiNode
from tidemill.fleet.backend import Backend, CannotStart, Device, Process, ProcessEnd, ProcessSpec
from tidemill.fleet.ranks import by_node, free_port, host_of
from tidemill.fleet.recipe import Recipe, WeightsVersion


class EngineProcesses:
    """What runs of an engine now; none before `start`."""

    def __init__(self, name: str, recipe: Recipe, backend: Backend, log: Path, *, idle_class: bool) -> None:
        """`idle_class`: they get only what others leave of their devices.

        `log`: the first one's; the others' beside it.
        """
        self._name = name
        self._recipe = recipe
        self._backend = backend
        self._log = log
        self._idle_class = idle_class
        self.running: Sequence[Process] = ()
        """The first one is spoken to."""
        self._starting: asyncio.Task[Sequence[Process]] | None = None

    @property
    def pid(self) -> int | None:
        """Of the one that is spoken to."""
        return self.running[0].pid if self.running else None

    async def start(self, devices: tuple[Device, ...], version: WeightsVersion) -> Process:
        """Start all of them or none; returns the one that is spoken to. Raises CannotStart, OSError."""
        launches = await self._launches(devices, version)
        # Shielded, so that a process that is being started while the caller is cancelled is not lost sight of.
        self._starting = asyncio.create_task(self._backend.start(launches))
        self.running = await asyncio.shield(self._starting)
        return self.running[0]

    async def first_end(self) -> ProcessEnd:
        """How they ended; of several the first takes the others with it, as none can work without all."""
        if len(self.running) == 1:
            return await self.running[0].wait()
        waits = [asyncio.ensure_future(process.wait()) for process in self.running]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        first = [wait.result() for wait in done]
        # An engine may die of its node's loss before that is known.
        return min([*first, *await self.kill_all()], key=lambda ended: ended.code is not None)

    def kill(self) -> None:
        """Kill all; `first_end` tells of it."""
        for process in self.running:
            process.kill()

    async def kill_all(self) -> Sequence[ProcessEnd]:
        """Kill all, also those that are being started; returns when they have ended."""
        await self._until_started()
        self.kill()
        return await asyncio.gather(*(process.wait() for process in self.running))

    async def stop(self, grace_s: float) -> None:
        """End all by their signal, and kill those that have not ended within `grace_s` seconds."""
        await self._until_started()
        await asyncio.gather(*(process.stop(grace_s) for process in self.running))

    async def _until_started(self) -> None:
        """What is being started can only be ended once it is there."""
        if self._starting is not None:
            with suppress(CannotStart, OSError):
                self.running = await self._starting

    async def _launches(self, devices: tuple[Device, ...], version: WeightsVersion) -> list[ProcessSpec]:
        """One for each node."""
        parts = by_node(devices)
        if len(parts) <= 1:
            return [self._launch(devices, version, None)]
        master = host_of(devices[0], await self._backend.nodes())
        port = free_port()
        ranks = (MultiNode(len(parts), rank, master, port) for rank in range(len(parts)))
        return [self._launch(each, version, part) for each, part in zip(parts, ranks, strict=True)]

    def _launch(self, devices: tuple[Device, ...], version: WeightsVersion, part: MultiNode | None) -> ProcessSpec:
        command = self._recipe.command(version, devices, part)
        pinned = self._recipe.devices is not None or any(device.kind != "cpu" for device in devices)
        rank = part.rank if part is not None else 0
        return ProcessSpec(
            name=self._name if not rank else f"{self._name}.{rank}",
            argv=command.argv,
            env=dict(command.env),
            devices=devices if pinned else (),
            node=devices[0].node if devices else "",
            log=self._log if not rank else self._log.with_name(f"{self._log.stem}.{rank}.log"),
            idle_class=self._idle_class,
            stop_signal=self._recipe.control.drain_signal,
            orphan_grace_s=1.0,  # its requests went through gateways that die as well
        )


def ending_in_words(ended: ProcessEnd) -> str:
    """How a process ended, for a reason that an operator reads."""
    if ended.why == "exited":
        return f"its process ended with code {ended.code}"
    return f"its process was {ended.why}"
