"""A Ray cluster as the backend: processes as actors, pinned to the nodes that the tide has chosen.

The cluster stands already (`ray start`, KubeRay); Tidemill joins it through a bridge in a process of its own
(`fleet.ray_bridge`). Each gang is one placement group: Ray sets its devices aside for it, all of them or none, so that
others on the cluster keep off. Which accelerators of a node a process sees is Ray's word; a device's index here is
only its number among the node's.
"""

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from tidemill.child_protocol import Child, start_child
from tidemill.errors import Unavailable
from tidemill.fleet.backend import CannotStart, Device, Node, Process, ProcessEnd, ProcessSpec
from tidemill.fleet.ray_messages import RayCommand, RayMessage, RayNode, RayPart, RayStarted

OPEN_WITHIN_S = 60.0
AGAIN_AFTER_S = (1.0, 2.0, 5.0, 15.0)
"""Waits before a lost cluster is joined again."""
SUSPECT_S = 30.0
"""How long a node that does not answer is taken for lost while Ray has not said so; then Ray's word counts again."""
FORGET_S = 3600.0
"""How long a node that is lost is still told of."""
CLOSE_GRACE_S = 3.0
KIND_LABEL = "tidemill.kind"
NAME_LABEL = "tidemill.name"
_ACCELERATORS = ("GPU", "NPU")
"""Ray's resources that are devices; a node without any has its CPUs as slots."""
_KIND_PREFIX = "accelerator_type:"

log = structlog.get_logger()


class RayProcess:
    """See `fleet.backend.Process`."""

    def __init__(
        self, launch: ProcessSpec, key: str, host: str, started: RayStarted, tell: Callable[[RayCommand], None]
    ) -> None:
        self.key = key
        self._launch = launch
        self._host = host
        self._started = started
        self._send = tell
        self._ended: asyncio.Future[ProcessEnd] = asyncio.get_running_loop().create_future()

    @property
    def launch(self) -> ProcessSpec:
        return self._launch

    @property
    def pid(self) -> int | None:
        """On its node; None once it has ended."""
        return None if self._ended.done() else self._started.pid

    @property
    def host(self) -> str:
        return self._host

    @property
    def port(self) -> int | None:
        return self._started.port

    @property
    def started_at(self) -> float:
        return self._started.at

    async def wait(self) -> ProcessEnd:
        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float, signal: str | None = None) -> ProcessEnd:
        line = f"stop {signal or self._launch.stop_signal} {max(grace_s, 0.0)!r}"
        self._send(RayCommand(do="tell", key=self.key, line=line))
        return await self.wait()

    def kill(self) -> None:
        self._send(RayCommand(do="kill", key=self.key))

    def ended(self, end: ProcessEnd) -> None:
        """The bridge's word."""
        if not self._ended.done():
            self._ended.set_result(end)


class RayBackend:
    """See `fleet.backend.Backend`."""

    kind = "ray"

    def __init__(self, address: str, *, log_fd: Callable[[], int]) -> None:
        """`address` is what `ray.init` takes: `auto`, `HOST:PORT`.

        `log_fd` opens a file for what the bridge has to say.
        """
        self._address = address
        self._log_fd = log_fd
        self._child: Child | None = None
        self._watch: asyncio.Task[None] | None = None
        self._joined = asyncio.Event()
        self._why = "the Ray cluster has not been joined yet"
        self._nodes: dict[str, Node] = {}
        """By Ray's id."""
        self._lost_at: dict[str, float] = {}
        self._suspects: dict[str, float] = {}
        """Nodes that do not answer, and until when they are taken for lost."""
        self._ray_nodes: dict[str, RayNode] = {}
        self._processes: dict[str, RayProcess] = {}
        self._tickets = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[RayStarted, ...]]] = {}
        self._early: dict[str, ProcessEnd] = {}
        self._closing = False

    async def open(self) -> None:
        """Join the cluster. Raises Unavailable when it does not answer."""
        self._watch = asyncio.create_task(self._keep_joined())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OPEN_WITHIN_S):
                await self._joined.wait()
                return
        await self.close()
        raise Unavailable(
            f"The Ray cluster at {self._address} cannot be joined: {self._why}.",
            hint="Check that it is running (`ray status`), and check fleet.ray_address.",
        )

    async def nodes(self) -> Sequence[Node]:
        now = time.monotonic()
        forgotten = [id for id, at in self._lost_at.items() if now - at > FORGET_S]
        for each in forgotten:
            del self._lost_at[each], self._nodes[each]
        self._suspects = {id: until for id, until in self._suspects.items() if until > now}
        return tuple(
            _down(node, "it does not answer") if id in self._suspects and node.up else node
            for id, node in self._nodes.items()
        )

    async def start(self, launches: Sequence[ProcessSpec]) -> Sequence[Process]:
        """Start all of them or none. Raises CannotStart."""
        if not self._joined.is_set():
            raise CannotStart(f"{launches[0].name} cannot be started: {self._why}.")
        parts, hosts = [], []
        for launch in launches:
            node = self._node_of(launch)
            hosts.append(self._ray_nodes[node].address)
            parts.append(
                RayPart(
                    key=f"{launch.name}:{secrets.token_hex(6)}",
                    name=launch.name,
                    node_id=node,
                    resources=self._resources(launch, node),
                    order=_order(launch, hosts[-1]),
                )
            )
        ticket = next(self._tickets)
        answer = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        self._tell(RayCommand(do="start", ticket=ticket, parts=tuple(parts)))
        try:
            started = await asyncio.shield(answer)
        except CannotStart as error:
            raise CannotStart(f"{launches[0].name} cannot be started: {error.message}.") from None
        except asyncio.CancelledError:
            answer.add_done_callback(lambda done: self._unwanted(done, parts))
            raise
        finally:
            self._waiting.pop(ticket, None)
        made = []
        for launch, part, host, one in zip(launches, parts, hosts, started, strict=True):
            process = RayProcess(launch, part.key, host, one, self._tell)
            early = self._early.pop(part.key, None)
            if early is not None:
                process.ended(early)
            else:
                self._processes[part.key] = process
            made.append(process)
        return made

    def _unwanted(self, done: "asyncio.Future[tuple[RayStarted, ...]]", parts: Sequence[RayPart]) -> None:
        """Started after all for somebody who has gone meanwhile."""
        if not done.cancelled() and done.exception() is None:
            for part in parts:
                self._tell(RayCommand(do="kill", key=part.key))

    async def close(self) -> None:
        """End everything that was started, and leave the cluster."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * CLOSE_GRACE_S):
                await asyncio.gather(*(process.stop(CLOSE_GRACE_S) for process in list(self._processes.values())))
        if self._child is not None and self._child.alive:
            await self._child.end(CLOSE_GRACE_S)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    # The bridge

    async def _keep_joined(self) -> None:
        failures = 0
        while not self._closing:
            try:
                await self._run_once()
            except OSError as error:
                self._why = error.strerror or str(error)
            failures = 0 if self._joined.is_set() else failures + 1
            self._left()
            if self._closing:
                return
            log.warning("the Ray cluster is not joined", address=self._address, reason=self._why)
            await asyncio.sleep(AGAIN_AFTER_S[min(failures, len(AGAIN_AFTER_S) - 1)])

    async def _run_once(self) -> None:
        self._child = child = await start_child("ray", "tidemill.fleet.ray_bridge", [self._address], self._log_fd())
        async for message in child.reports(RayMessage):
            self._hear(message)
        await child.wait()
        if self._joined.is_set():
            self._why = "the connection to the Ray cluster was lost"

    def _left(self) -> None:
        """The bridge has gone, and Ray ends what it has started."""
        self._joined.clear()
        now = time.time()
        for process in self._processes.values():
            process.ended(ProcessEnd(None, now, "the connection to the Ray cluster was lost"))
        self._processes.clear()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(CannotStart(self._why))
        self._nodes = {id: _down(node, self._why) for id, node in self._nodes.items()}

    def _hear(self, word: RayMessage) -> None:
        match word.say:
            case "nodes":
                self._learn(word.nodes)
                self._joined.set()
            case "unreachable":
                self._why = word.why
            case "started" | "failed":
                answer = self._waiting.get(word.ticket)
                if answer is not None and not answer.done():
                    if word.say == "started":
                        answer.set_result(word.started)
                    else:
                        answer.set_exception(CannotStart(word.why))
            case "ended":
                end = ProcessEnd(word.code, word.at, word.why)
                process = self._processes.pop(word.key, None)
                if word.code is None and word.node_id:
                    self._suspects[word.node_id] = time.monotonic() + SUSPECT_S
                if process is not None:
                    process.ended(end)
                else:  # before `start` has heard that it began
                    self._early[word.key] = end
                    while len(self._early) > 1000:
                        del self._early[next(iter(self._early))]

    def _tell(self, command: RayCommand) -> None:
        if self._child is not None:
            self._child.tell(command)

    # Nodes

    def _learn(self, found: Sequence[RayNode]) -> None:
        self._ray_nodes = {node.id: node for node in found}
        names = unique_names(found)
        for node in found:
            if node.alive:
                self._nodes[node.id] = Node(names[node.id], node.address, devices_of(node, names[node.id]))
                self._lost_at.pop(node.id, None)
            elif node.id in self._nodes:
                self._lose(node.id)
        for gone in self._nodes.keys() - self._ray_nodes.keys():
            self._lose(gone)

    def _lose(self, node_id: str) -> None:
        if node_id not in self._lost_at:
            self._lost_at[node_id] = time.monotonic()
        self._nodes[node_id] = _down(self._nodes[node_id], "Ray has lost it")

    def _node_of(self, launch: ProcessSpec) -> str:
        """Ray's id of the node that a process is to run on. Raises CannotStart."""
        wanted = launch.node or next((device.node for device in launch.devices), "")
        for node_id, node in self._nodes.items():
            if node.up and (node.name == wanted or (not wanted and node.devices)) and node_id not in self._suspects:
                return node_id
        lost = any(node.name == wanted for node in self._nodes.values())
        why = f"the node {wanted!r} is lost" if lost else f"there is no node {wanted!r}"
        raise CannotStart(f"{launch.name} cannot be started: {why}.")

    def _resources(self, launch: ProcessSpec, node_id: str) -> dict[str, float]:
        """What Ray shall set aside for a process: its devices.

        One of no device, or of the idle class, which gets only what the holder of its cores leaves, takes nothing that
        counts.
        """
        if not launch.devices or launch.idle_class:
            return {"CPU": 0.001}
        return {device_resource(self._ray_nodes[node_id]): float(len(launch.devices))}


def device_resource(node: RayNode) -> str:
    """Ray's name of what this node's devices are: an accelerator, or else its CPUs."""
    return next((name for name in _ACCELERATORS if node.resources.get(name, 0.0) >= 1.0), "CPU")


def devices_of(node: RayNode, name: str) -> tuple[Device, ...]:
    """The devices of a node, numbered as they come.

    Their kind is what the node's label `tidemill.kind` says, or Ray's accelerator type in small letters.
    """
    resource = device_resource(node)
    count = int(node.resources.get(resource, 0.0))
    kind = node.labels.get(KIND_LABEL) or node.labels.get("ray.io/accelerator-type", "").lower()
    if not kind:
        types = (each.removeprefix(_KIND_PREFIX) for each in node.resources if each.startswith(_KIND_PREFIX))
        kind = next(types, "cpu" if resource == "CPU" else resource).lower()
    share = int(node.resources.get("memory", 0.0) / count) if count and resource == "CPU" else 0
    return tuple(Device(f"{name}/{index}", name, index, kind, share) for index in range(count))


def unique_names(nodes: Sequence[RayNode]) -> dict[str, str]:
    """A name for each node, by Ray's id.

    Its label `tidemill.name`, else Ray's name of it, with a piece of the id where several have the same.
    """
    named = {node.id: node.labels.get(NAME_LABEL) or node.name for node in nodes}
    count: dict[str, int] = {}
    for node in nodes:
        if node.alive:
            count[named[node.id]] = count.get(named[node.id], 0) + 1
    return {id: name if count.get(name, 0) < 2 else f"{name}-{id[:6]}" for id, name in named.items()}


def _down(node: Node, why: str) -> Node:
    return Node(node.name, node.host, node.devices, up=False, why=why)


def _order(launch: ProcessSpec, host: str) -> dict[str, Any]:
    """What the shim on the node is told (`fleet.shim.ORDER`)."""
    return {
        "argv": list(launch.argv),
        "env": {"TIDEMILL_DEVICES": ",".join(device.id for device in launch.devices), **launch.env},
        "cwd": str(launch.cwd) if launch.cwd is not None else None,
        "log": str(launch.log) if launch.log is not None else None,
        "host": host,
        "cores": sorted({device.index for device in launch.devices if device.kind == "cpu"}),
        "idle": launch.idle_class,
        "oom_score_adj": launch.oom_score_adj,
        "end_file": str(launch.end_file) if launch.end_file is not None else None,
        "stop_signal": launch.stop_signal,
        "orphan_grace_s": launch.orphan_grace_s,
    }
