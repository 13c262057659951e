"""Rolling a model to another version of its weights: replica by replica, without a request that fails.

A new replica is started and waited for before an old one is drained. It goes on free devices; where there are none,
on the very devices of the old one when those are slots of a CPU, which two can share for a moment; else, when the
model has several replicas, an old one has to go first. A new version that does not start is taken back.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

import msgspec
import structlog

from tidemill.errors import Conflict, NotFound
from tidemill.fleet.backend import Device
from tidemill.fleet.recipe import WeightsVersion
from tidemill.fleet.replica import Replica
from tidemill.fleet.replicas import ReplicaSet
from tidemill.fleet.static_placement import first_fit, share_of_slots
from tidemill.tides.state import Phase

TRIES = 2
"""So often may a replica of the new version end before it was ready."""
LOOK_S = 0.05

log = structlog.get_logger()


class RollState(msgspec.Struct):
    """How a roll stands."""

    model: str
    version: WeightsVersion
    before: WeightsVersion
    state: Literal["rolling", "done", "taking back", "taken back", "failed"] = "rolling"
    done: int = 0
    of: int = 0
    """Replicas."""
    why: str = ""
    """Why it was taken back."""
    began_at: float = 0.0
    ended_at: float | None = None
    """Unix time, seconds."""

    @property
    def under_way(self) -> bool:
        return self.ended_at is None


class RollFailed(Exception):
    """A replica of the new version does not get ready; the text says why."""


class Rolls:
    """The rolls of all models: one at a time for each."""

    def __init__(self, replicas: ReplicaSet, keep: Callable[[str, WeightsVersion], Awaitable[None]]) -> None:
        """`keep` stores what a model has been rolled to.

        It is called before the first old replica is drained for the last time.
        """
        self._replicas = replicas
        self._keep = keep
        self._states: dict[str, RollState] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def states(self) -> list[RollState]:
        """The last roll of each model that was rolled since the platform's start."""
        return list(self._states.values())

    def begin(self, model: str, version: WeightsVersion) -> RollState:
        """Begin to roll a model; returns at once. Raises NotFound, and Conflict when that cannot be done now."""
        if model not in self._replicas.recipes:
            raise NotFound(
                f"There is no model {model!r} whose engine Tidemill runs.",
                hint=f"Known models: {', '.join(self._replicas.recipes) or 'none'}.",
            )
        last = self._states.get(model)
        if last is not None and last.under_way:
            raise Conflict(
                f"{model} is already being rolled to {last.version.path}.", hint="Wait until it has finished."
            )
        before = self._replicas.version(model)
        if before == version:
            raise Conflict(f"{model} already runs this version.", hint="Give another --path or --version.")
        old = self._old(model, version)
        ready = [replica for replica in old if replica.ready]
        if len(ready) == 1 and not self._shares(ready[0]) and self._room(model) is None:
            raise Conflict(
                f"{model} has one replica, and there are no free devices for the new one beside it.",
                hint="Free some, or change its path in the configuration and restart the platform.",
            )
        if not old and self._room(model) is None:
            raise Conflict(
                f"{model} has no replica now, and there are no free devices to try the new version on.",
                hint="Try again when some are free.",
            )
        state = RollState(model, version, before, of=max(len(old), 1), began_at=time.time())
        self._states[model] = state
        self._tasks[model] = asyncio.create_task(self._run(state))
        return state

    async def close(self) -> None:
        """Leave off; what is half rolled starts as it was before, the next time."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(self, state: RollState) -> None:
        model = state.model
        log.info("a model is rolled", model=model, to=state.version.path, version=state.version.name)
        try:
            await self._roll(state, state.version)
            self._replicas.set_version(model, state.version)
            await self._keep(model, state.version)
            state.state = "done"
        except RollFailed as failure:
            state.why, state.state = str(failure), "taking back"
            log.error("the new version does not start; it is taken back", model=model, reason=state.why)
            try:
                await self._roll(state, state.before)
                state.state = "taken back"
            except RollFailed as second:
                state.state, state.why = "failed", f"{state.why}; and the old version: {second}"
        except Exception as error:
            log.exception("rolling a model failed", model=model)
            state.state, state.why = "failed", f"an unforeseen error: {error}"
        finally:
            state.ended_at = time.time()

    async def _roll(self, state: RollState, version: WeightsVersion) -> None:
        """Until no replica runs another version. Raises DoesNotStart."""
        going_back = version == state.before
        await self._end_sleepers(state.model, version)
        if not going_back and not self._old(state.model, version):
            await self._try(state.model, version)
            state.done += 1
        while old := self._old(state.model, version):
            if any(each.phase is Phase.ASLEEP for each in old):
                await self._end_sleepers(state.model, version)  # one that was draining before
                continue
            replica = min(old, key=lambda each: each.ready)  # those first that nobody would miss
            await self._replace(replica, version, going_back=going_back)
            state.done += -1 if going_back else 1

    async def _end_sleepers(self, model: str, version: WeightsVersion) -> None:
        """Their devices are others': nothing takes their place."""
        for each in self._old(model, version):
            if each.phase is Phase.ASLEEP:
                await self._replicas.stop(each.name, "it sleeps with weights of another version")

    async def _try(self, model: str, version: WeightsVersion) -> None:
        """See that the version starts, for a model that has no replica; the plan may give it up again.

        Raises DoesNotStart.
        """
        devices = self._room(model)
        if devices is None:
            raise RollFailed("there are no free devices any more")
        name = self._replicas.start(model, devices, why="a new version is tried", version=version, surge=True)
        replica = self._replicas.replicas[name]
        try:
            await self._until_ready(replica)
        except RollFailed:
            await self._replicas.stop(name, "the new version does not start")
            raise
        replica.surge = False

    async def _replace(self, old: Replica, version: WeightsVersion, *, going_back: bool) -> None:
        """One replica of the new version in place of an old one. Raises DoesNotStart."""
        what = version.name or version.path
        why = f"{'back to' if going_back else 'rolled to'} {what}"
        if not old.devices:
            old.version = version  # it waits for devices; then it starts with these weights
            return
        devices: Sequence[Device] | None = old.devices if self._shares(old) else self._room(old.model, instead_of=old)
        ending: asyncio.Task[None] | None = None
        if devices is None or not (old.ready or going_back):
            # There is no room beside it, or it serves nobody: its devices are its successor's.
            devices = old.devices
            ending = self._replicas.stop(old.name, why)
        name = self._replicas.start(
            old.model,
            devices,
            batch_only=old.batch_only,
            colocated=old.colocated,
            why=why,
            version=version,
            surge=True,
            after=ending,
        )
        new = self._replicas.replicas[name]
        try:
            await self._until_ready(new)
        except RollFailed:
            failed = self._replicas.stop(name, f"{what} does not start")
            if ending is not None and not going_back:
                self._replicas.start(
                    old.model,
                    devices,
                    batch_only=old.batch_only,
                    colocated=old.colocated,
                    why=f"{what} does not start",
                    version=old.version,
                    after=failed,
                )
            await failed
            raise
        if ending is None:
            ending = self._replicas.stop(old.name, why) if old.name in self._replicas.replicas else None
        new.surge = False
        if ending is not None:
            await ending

    async def _until_ready(self, replica: Replica) -> None:
        while not replica.ready:
            if replica.phase is Phase.GONE or replica.failures >= TRIES:
                raise RollFailed(f"{replica.name}: {replica.last_failure or replica.why}")
            await asyncio.sleep(LOOK_S)

    def _old(self, model: str, version: WeightsVersion) -> list[Replica]:
        return [
            replica
            for replica in self._replicas.of(model)
            if replica.version != version and replica.phase not in (Phase.DRAINING, Phase.GONE)
        ]

    def _shares(self, replica: Replica) -> bool:
        """Two can be on its devices for a moment."""
        return all(device.kind == "cpu" for device in replica.devices)

    def _room(self, model: str, instead_of: Replica | None = None) -> Sequence[Device] | None:
        """Devices for another replica of the model, rather on a node where no other one stays.

        None: there are none that nobody holds.
        """
        recipe = self._replicas.recipes[model]
        if recipe.devices is None:
            return share_of_slots(recipe, 0, self._replicas.nodes) or None
        stay = [each for each in self._replicas.of(model) if each is not instead_of]
        nodes = {device.node for each in stay for device in each.devices}
        return first_fit(recipe, self._replicas.nodes, self._replicas.held(), apart=nodes)
