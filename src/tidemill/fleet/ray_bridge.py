"""The bridge to a Ray cluster: `python -m tidemill.fleet.ray_bridge ADDRESS`, a process of its own.

Ray ends a driver's process when the cluster's head is gone for a minute, and takes 150 MB and a dozen threads; neither
may concern the platform. The platform writes `RayCommand`s to its standard input and reads `RayMessage`s from its
standard output (`fleet.ray_messages`). The end of standard input is the platform's death: then this process goes, and
Ray ends everything that it has started.
"""

import asyncio
import contextlib
import importlib
import inspect
import os
import sys
import time
from typing import Any

from tidemill.child_protocol import Commands, report
from tidemill.fleet import ray_runner, shim
from tidemill.fleet.ray_messages import RayCommand, RayMessage, RayNode, RayPart, RayStarted

NAMESPACE = "tidemill"
CONNECT_WITHIN_S = 30.0
_LOOK_EVERY_S = 1.0
ROOM_WITHIN_S = 10.0
"""How long Ray may take to set a gang's resources aside; they are free as far as the platform knows."""
_START_WITHIN_S = 60.0
PING_WITHIN_S = 2.0
THREADS = 4
"""Of an actor: one waits for the command's end, the others take orders."""


class Bridge:
    """The driver of a Ray cluster."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._ray: Any = None
        self._runner: Any = None
        self._actors: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: tuple[RayNode, ...] | None = None

    async def connect(self, address: str) -> bool:
        """Join the cluster; False, and a word of why, when that cannot be."""
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                await asyncio.to_thread(self._connect, address)
        except TimeoutError:
            self._say(RayMessage(say="unreachable", why=f"no answer within {CONNECT_WITHIN_S:.0f} s"))
            return False
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._say(RayMessage(say="unreachable", why=lines[0].rstrip(".")))
            return False
        return True

    def _connect(self, address: str) -> None:
        ray = _import("ray")
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="warning")
        ray.cloudpickle.register_pickle_by_value(ray_runner)
        self._ray = ray
        self._runner = ray.remote(ray_runner.RayRunner)

    async def run(self, commands: Commands) -> None:
        """Obey until the platform is gone."""
        looking = asyncio.create_task(self._keep_looking())
        while (command := await commands.next(RayCommand)) is not None:
            match command.do:
                case "start":
                    self._spawn(self._start(command))
                case "tell":
                    actor = self._actors.get(command.key)
                    if actor is not None:
                        actor.tell.remote(command.line)
                case "kill":
                    self._end(command.key)
        looking.cancel()

    def _spawn(self, doing: Any) -> None:
        task = asyncio.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Nodes

    async def _keep_looking(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # a head that is restarting; Ray ends this process if it stays away
                nodes = await asyncio.to_thread(self._nodes)
                if nodes != self._told:
                    self._told = nodes
                    self._say(RayMessage(say="nodes", nodes=nodes))
            await asyncio.sleep(_LOOK_EVERY_S)

    def _nodes(self) -> tuple[RayNode, ...]:
        found = [
            RayNode(
                id=str(node["NodeID"]),
                name=str(node.get("NodeName") or node["NodeManagerAddress"]),
                address=str(node["NodeManagerAddress"]),
                alive=bool(node["Alive"]),
                resources={str(name): float(amount) for name, amount in node.get("Resources", {}).items()},
                labels={str(name): str(value) for name, value in (node.get("Labels") or {}).items()},
            )
            for node in self._ray.nodes()
        ]
        return tuple(sorted(found, key=lambda node: (node.name, node.id)))

    # Processes

    async def _start(self, command: RayCommand) -> None:
        group: Any = None
        actors: list[Any] = []
        try:
            group = await asyncio.to_thread(self._set_aside, command.parts)
            within = _import("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
            for index, part in enumerate(command.parts):
                where = within(group, placement_group_bundle_index=index)
                options = _options(part.resources)
                actors.append(
                    self._runner.options(scheduling_strategy=where, max_concurrency=THREADS, **options).remote(
                        inspect.getsource(shim)
                    )
                )
            async with asyncio.timeout(_START_WITHIN_S):
                said = await asyncio.gather(
                    *(
                        actor.start.remote(part.order, sys.executable)
                        for actor, part in zip(actors, command.parts, strict=True)
                    )
                )
            refused = [word["why"] for word in said if word["say"] != "started"]
            if refused:
                raise RuntimeError(refused[0])
        except Exception as error:
            for actor in actors:
                self._ray.kill(actor)
            if group is not None:
                self._give_back(group)
            why = "Ray did not start it in time" if isinstance(error, TimeoutError) else _first_line(error)
            self._say(RayMessage(say="failed", ticket=command.ticket, why=why))
            return
        started = tuple(RayStarted(word["pid"], word["port"], word["at"]) for word in said)
        self._say(RayMessage(say="started", ticket=command.ticket, started=started))
        self._actors |= {part.key: actor for part, actor in zip(command.parts, actors, strict=True)}
        self._spawn(self._await_ends(command.parts, actors, group))

    def _set_aside(self, parts: tuple[RayPart, ...]) -> Any:
        """Have Ray keep a gang's devices for it: all of them, or none."""
        groups = _import("ray.util.placement_group")
        group = groups.placement_group(
            [part.resources for part in parts],
            strategy="PACK",
            bundle_label_selector=[{"ray.io/node-id": part.node_id} for part in parts],
        )
        if group.wait(ROOM_WITHIN_S):
            return group
        groups.remove_placement_group(group)
        raise RuntimeError("Ray says that the devices there are in use")

    def _give_back(self, group: Any) -> None:
        with contextlib.suppress(Exception):
            _import("ray.util.placement_group").remove_placement_group(group)

    async def _await_ends(self, parts: tuple[RayPart, ...], actors: list[Any], group: Any) -> None:
        await asyncio.gather(*(self._await_end(part, actor) for part, actor in zip(parts, actors, strict=True)))
        await asyncio.to_thread(self._give_back, group)

    async def _await_end(self, part: RayPart, actor: Any) -> None:
        while True:
            try:
                said = await actor.wait.remote()
                break
            except Exception as error:
                if part.key in self._actors and await self._answers(actor):
                    continue  # the connection was cut for a moment
                lost = not await self._alive(part.node_id)
                why = "node lost" if lost else f"killed: {_first_line(error)}"
                said = {"code": None if lost else -9, "at": time.time(), "why": why}
                break
        self._actors.pop(part.key, None)
        at = said.get("at", time.time())
        self._say(
            RayMessage(say="ended", key=part.key, node_id=part.node_id, code=said["code"], at=at, why=said["why"])
        )
        with contextlib.suppress(Exception):
            self._ray.kill(actor)

    async def _answers(self, actor: Any) -> bool:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(PING_WITHIN_S):
                return bool(await actor.ping.remote())
        return False

    async def _alive(self, node_id: str) -> bool:
        """Whether a node lives. Ray takes a quarter of a minute to say so; a process on it tells sooner."""
        on_node = _import("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy(node_id, soft=False)

        def answer() -> bool:
            return True

        probe = self._ray.remote(answer).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(PING_WITHIN_S):
                return bool(await probe.remote())
        return False

    def _end(self, key: str) -> None:
        """End a process at once.

        The shim kills what there is when its actor is gone, after the orphans' grace.
        """
        actor = self._actors.get(key)
        if actor is not None:
            actor.tell.remote("kill")

    def _say(self, word: RayMessage) -> None:
        report(word, self._out)


def _import(name: str) -> Any:
    """A module of Ray, which is an extra, untyped in part, and slow to import."""
    return importlib.import_module(name)


def _options(resources: dict[str, float]) -> dict[str, Any]:
    """Ray's resources as an actor asks for them."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus"}
    custom = {name: amount for name, amount in resources.items() if name not in named}
    return {"num_cpus": 0, **{named[name]: amount for name, amount in resources.items() if name in named}} | (
        {"resources": custom} if custom else {}
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


async def _main(address: str, out: int) -> None:
    commands = await Commands.open()
    bridge = Bridge(out)
    if await bridge.connect(address):
        await bridge.run(commands)


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what Ray prints must not come between the words
    asyncio.run(_main(sys.argv[1], out))
    os._exit(0)  # Ray's own clean-up waits for a cluster that may not answer


if __name__ == "__main__":
    main()
