"""Replica sets for tests: real processes that are started like vLLM, on this machine or on one that can be lost."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tidemill.app.engine_http import get, post
from tidemill.engines import vllm
from tidemill.engines.launch import CommandLine, EngineLaunch, MultiNode
from tidemill.fleet.backend import Device, Node, ProcessSpec
from tidemill.fleet.local import LocalBackend
from tidemill.fleet.recipe import Recipe, WeightsVersion
from tidemill.fleet.replica import Replica
from tidemill.fleet.replicas import ReplicaSet

PROGRAM = (sys.executable, str(Path(__file__).parents[1] / "support/vllm_like.py"))


def weights(path: Path, name: str = "v1", **behaviour: Any) -> WeightsVersion:
    """A version of the weights; see `support.vllm_like` for how it may behave."""
    (path / name).mkdir(exist_ok=True)
    (path / name / "behaviour.json").write_text(json.dumps(behaviour))
    return WeightsVersion(name, str(path / name))


def recipe(version: WeightsVersion, **changes: Any) -> Recipe:
    """A model that takes one device for each replica; with more, over several nodes where one is too small."""

    def command(version: WeightsVersion, devices: Sequence[Device], part: MultiNode | None) -> CommandLine:
        return vllm.command(
            EngineLaunch(model=version.path, served_name="m", tp=changes.get("devices", 1), multi_node=part), PROGRAM
        )

    return Recipe(
        **{
            "model": "m",
            "engine": "vllm",
            "command": command,
            "control": vllm.CONTROL,
            "version": version,
            "devices": 1,
            "spans": True,
            "health_s": 2.5,
            **changes,
        }
    )


def slots(count: int, node: str = "local") -> tuple[Device, ...]:
    return tuple(Device(f"{node}/{index}", node, index, "h20") for index in range(count))


@asynccontextmanager
async def replica_set(path: Path, *recipes: Recipe, devices: int = 2, **options: Any) -> AsyncIterator[ReplicaSet]:
    backend = options.pop("backend", None) or LocalBackend(slots(devices), owner=f"fleet-{path.name}")
    found = ReplicaSet(
        backend,
        {each.model: each for each in recipes},
        get=get,
        post=post,
        logs=path,
        **{"changed": lambda: None, **options},
    )
    await found.open()
    try:
        yield found
    finally:
        await found.close()


async def until(true: Any, within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.02)


async def ready(found: ReplicaSet, *names: str) -> list[Replica]:
    """Wait until these are ready; all of the model `m` when none are named."""

    def all_ready() -> bool:
        wanted = [found.replicas.get(name) for name in names] if names else found.of("m")
        return bool(wanted) and all(each is not None and each.ready for each in wanted)

    await until(all_ready)
    return [found.replicas[name] for name in names] if names else found.of("m")


class FarBackend(LocalBackend):
    """Several nodes, all of them this machine, which can be lost like those of a cluster."""

    def __init__(self, *nodes: str, owner: str) -> None:
        super().__init__([device for node in nodes for device in slots(2, node)], owner=owner)
        self.lost: dict[str, str] = {}
        self.names = nodes

    async def nodes(self) -> Sequence[Node]:
        return [
            Node(
                name,
                "127.0.0.1",
                tuple(device for device in self.devices if device.node == name),
                name not in self.lost,
                self.lost.get(name, ""),
            )
            for name in self.names
        ]

    def _check(self, launch: ProcessSpec) -> None:
        """All nodes are here."""
