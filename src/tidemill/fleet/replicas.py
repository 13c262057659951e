"""All replicas of the fleet, started and stopped one by one.

Each has a name that stays, and a history that is kept.

Who decides which there are is somebody else: the tide's loop (`fleet.controller`), a roll (`fleet.roll`), or, where
nobody plans, `keep_minimum`.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import structlog

from tidemill.errors import Conflict, NotFound
from tidemill.fleet.backend import Backend, Device, Node
from tidemill.fleet.recipe import Recipe, WeightsVersion
from tidemill.fleet.replica import Get, PhaseChange, Post, Replica, ReplicaLoadSample
from tidemill.fleet.static_placement import first_fit, share_of_slots
from tidemill.tides.state import Phase, ReplicaView

HISTORY = 50
"""Transitions that are kept of a model."""
_LOOK_EVERY_S = 1.0
"""How often the nodes are looked at."""

log = structlog.get_logger()


class ReplicaSet:
    """The replicas of all models with engines of our own."""

    def __init__(
        self,
        backend: Backend,
        recipes: Mapping[str, Recipe],
        *,
        get: Get,
        post: Post,
        logs: Path,
        changed: Callable[[], None],
        on_drained: Callable[[Replica], Awaitable[None]] | None = None,
    ) -> None:
        """`changed` is called after each step of a replica; `on_drained` before a drained one ends."""
        self.backend = backend
        self.recipes = dict(recipes)
        self._get = get
        self._post = post
        self._logs = logs
        self._changed = changed
        self._on_drained = on_drained
        self._versions: dict[str, WeightsVersion] = {}
        self._replicas: dict[str, Replica] = {}
        self._histories: dict[str, deque[PhaseChange]] = {name: deque(maxlen=HISTORY) for name in recipes}
        self._nodes: tuple[Node, ...] = ()
        self._devices: dict[str, Device] = {}
        self._watch: asyncio.Task[None] | None = None
        self.keeps_minimum = True
        """Start the replicas that a model must have. The tide's loop sets it to False and does so itself."""
        self.held_elsewhere: Callable[[], set[str]] = set
        """Devices that jobs hold; `keep_minimum` leaves them alone."""
        for recipe in recipes.values():
            for _ in range(recipe.min_replicas):
                self._add(recipe)

    # What there is

    @property
    def nodes(self) -> tuple[Node, ...]:
        """As they were when last looked at."""
        return self._nodes

    @property
    def replicas(self) -> Mapping[str, Replica]:
        """By name; without those that are gone."""
        return self._replicas

    def of(self, model: str) -> list[Replica]:
        """A model's replicas, by their index."""
        return sorted(
            (replica for replica in self._replicas.values() if replica.model == model), key=lambda each: each.index
        )

    def views(self) -> list[ReplicaView]:
        return [replica.view() for replica in self._replicas.values() if replica.devices]

    def device(self, device_id: str) -> Device:
        """Raises NotFound."""
        device = self._devices.get(device_id)
        if device is None:
            raise NotFound(f"There is no device {device_id!r}.", hint=f"Known devices: {', '.join(self._devices)}.")
        return device

    def history(self, model: str) -> list[PhaseChange]:
        """A model's last transitions, oldest first."""
        return list(self._histories.get(model, ()))

    def held(self) -> set[str]:
        """The devices that nobody else can have now."""
        awake = (each for each in self._replicas.values() if each.phase is not Phase.ASLEEP)
        return {device.id for each in awake for device in each.devices} | self.held_elsewhere()

    def shared(self) -> set[str]:
        """The CPU slots that a replica shares with whatever else is planned for them."""
        shares = (each for each in self._replicas.values() if each.recipe.shares)
        return {device.id for each in shares for device in each.devices}

    def version(self, model: str) -> WeightsVersion:
        """What new replicas of a model run."""
        return self._versions.get(model) or self.recipes[model].version

    def set_version(self, model: str, version: WeightsVersion) -> None:
        self._versions[model] = version

    # What is done

    async def open(self) -> None:
        """Connect to the backend and start what must be there. Raises Unavailable."""
        for replica in self._replicas.values():
            replica.version = self.version(replica.model)
        await self.backend.open()
        await self._look()
        self._watch = asyncio.create_task(self._keep_looking())

    async def close(self) -> None:
        """End all replicas now, and everything else that the backend has started."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.gather(*(replica.close() for replica in list(self._replicas.values())))
        await self.backend.close()

    def start(
        self,
        model: str,
        devices: Sequence[Device | str],
        *,
        batch_only: bool = False,
        colocated: bool = False,
        why: str = "",
        version: WeightsVersion | None = None,
        surge: bool = False,
        after: asyncio.Task[None] | None = None,
    ) -> str:
        """Start a replica on these devices; gives its name, under which it is in `views` at once.

        `colocated`: it shares them with another one, and gets only what that leaves (`Launch.idle_class`). `surge`: see
        `Replica.surge`. `after`: what has the devices until then. Raises NotFound for a model or a device that there
        is not.
        """
        recipe = self.recipes.get(model)
        if recipe is None:
            raise NotFound(f"There is no model {model!r} whose engine Tidemill runs.")
        held = [self.device(each) if isinstance(each, str) else each for each in devices]
        replica = self._add(recipe, batch_only=batch_only, colocated=colocated, version=version)
        replica.surge = surge
        replica.begin(held, why or "it was asked for", after=after)
        return replica.name

    def stop(self, name: str, why: str) -> asyncio.Task[None]:
        """Drain a replica and end it; returns at once, and the task ends with it. Raises NotFound."""
        return self._replica(name).end(why, on_drained=self._on_drained)

    def sleep(self, name: str, why: str) -> None:
        """Drain a replica and take its weights out of its devices, which are then anybody's; returns at once.

        Raises NotFound.
        """
        self._replica(name).sleep(why, on_drained=self._on_drained)

    def wake(self, name: str, why: str) -> None:
        """Have one that sleeps take its devices again; returns at once.

        Raises NotFound; Conflict for one that has slept through a roll, which is ended.
        """
        replica = self._replica(name)
        if replica.version != self.version(replica.model):
            replica.end("it sleeps with weights of another version", on_drained=self._on_drained)
            raise Conflict(f"{name} sleeps with weights of another version; it is ended.")
        replica.wake(why)

    def set_batch_only(self, name: str, *, batch_only: bool, why: str) -> None:
        """Lend a replica to batches, or take it back for people.

        Raises NotFound, and Conflict for one of the idle class, which is no good for people.
        """
        replica = self._replica(name)
        if replica.colocated and not batch_only:
            raise Conflict(f"{name} runs in the idle class; start another replica for interactive requests.")
        replica.batch_only = batch_only
        replica.move(replica.phase, why)

    def note_use(self, uses: Mapping[str, ReplicaLoadSample]) -> None:
        """What the gateways have in flight, all of them together; a replica that is not named has nothing."""
        for name, replica in self._replicas.items():
            replica.use = uses.get(name, _NOTHING)

    def _replica(self, name: str) -> Replica:
        replica = self._replicas.get(name)
        if replica is None:
            raise NotFound(f"There is no replica {name!r}.", hint=f"Known replicas: {', '.join(self._replicas)}.")
        return replica

    def _add(
        self,
        recipe: Recipe,
        *,
        batch_only: bool = False,
        colocated: bool = False,
        version: WeightsVersion | None = None,
    ) -> Replica:
        taken = {replica.index for replica in self.of(recipe.model)}
        index = next(index for index in range(len(taken) + 1) if index not in taken)
        replica = Replica(
            index,
            recipe,
            backend=self.backend,
            get=self._get,
            post=self._post,
            logs=self._logs,
            note=self._noted,
            batch_only=batch_only,
            colocated=colocated,
            version=version or self.version(recipe.model),
        )
        self._replicas[replica.name] = replica
        return replica

    def _noted(self, replica: Replica, step: PhaseChange) -> None:
        self._histories[replica.model].append(step)
        if step.phase is Phase.GONE and self._replicas.get(step.replica) is replica:
            del self._replicas[step.replica]
        self._changed()

    # Watching

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self._look()
            except Exception:
                log.exception("checking the nodes failed")

    async def _look(self) -> None:
        self._nodes = tuple(await self.backend.nodes())
        self._devices = {device.id: device for node in self._nodes for device in node.devices}
        down = {node.name: node.why or "it does not answer" for node in self._nodes if not node.up}
        known = {node.name for node in self._nodes}
        for replica in list(self._replicas.values()):
            for device in replica.devices:
                if device.node in down or device.node not in known:
                    replica.lost(f"node {device.node} is lost: {down.get(device.node, 'it has left')}")
        self.keep_minimum()

    def leave_to_plans(self) -> None:
        """From now on plans decide which replicas there are; what has found no devices is theirs to start."""
        self.keeps_minimum = False
        for replica in list(self._replicas.values()):
            if not replica.devices and not replica.recipe.shares:
                replica.move(Phase.GONE, "it is started when there are devices for it")

    def keep_minimum(self) -> None:
        """Give devices to replicas that have none yet, and add those that are missing.

        Of all models, or where plans decide, of those whose number is fixed and that share the CPU slots.
        """
        for recipe in self.recipes.values():
            if not self.keeps_minimum and not recipe.shares:
                continue
            alive = [
                each
                for each in self.of(recipe.model)
                if each.phase not in (Phase.DRAINING, Phase.ASLEEP) and not (each.batch_only or each.colocated)
            ]
            missing = recipe.min_replicas - len(alive)
            alive += [self._add(recipe) for _ in range(missing)]
            for replica in alive:
                if not replica.devices:
                    self._seat(replica)

    def _seat(self, replica: Replica) -> None:
        recipe = replica.recipe
        if recipe.devices is None:
            devices: Sequence[Device] | None = share_of_slots(recipe, replica.index, self._nodes)
        else:
            used = {device.node for each in self.of(recipe.model) for device in each.devices}
            devices = first_fit(recipe, self._nodes, self.held(), apart=used)
        if devices:
            replica.begin(devices, "the model always has it" if replica.starts == 0 else "it is placed anew")
            return
        kinds = " or ".join(recipe.kinds) or "one kind"
        where = "in equal parts on nodes" if recipe.spans and (recipe.devices or 1) > 1 else "on one node"
        why = f"there are no {recipe.devices or 1} free devices of {kinds} {where}"
        if replica.why != why:
            log.warning("a replica finds no devices", replica=replica.name, reason=why)
            replica.failures = 3  # `stuck`: nobody shall wait for it
            replica.move(Phase.STARTING, why)


_NOTHING = ReplicaLoadSample()
