"""What runs on a node of a Ray cluster: an actor that keeps one shim, and through it one command.

This module is sent to the node by value, and the shim as text, so that a node needs Ray and the engine, and no
Tidemill. When the driver dies Ray ends the actor, the shim's standard input ends with it, and the shim ends the
command in order.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

SHIM_PREFIX = "tidemill-shim-"


class RayRunner:
    """One command on this node. Ray calls its methods in threads of their own."""

    def __init__(self, shim: str) -> None:
        """`shim` is the source of `fleet.shim`."""
        self._shim = shim
        self._child: subprocess.Popen[bytes] | None = None
        self._end: dict[str, Any] | None = None
        self._waiting = threading.Lock()

    def start(self, order: dict[str, Any], python: str) -> dict[str, Any]:
        """Start the command of an order (see `fleet.shim.ORDER`); returns what the shim says of it.

        `env` of the order comes on top of this node's, and `python`, the interpreter of the platform, becomes this
        node's where it is the program.
        """
        fd, path = tempfile.mkstemp(prefix=SHIM_PREFIX, suffix=".py")
        with os.fdopen(fd, "w") as file:
            file.write(self._shim)
        for name in ("log", "end_file"):
            if order[name]:
                os.makedirs(os.path.dirname(order[name]) or ".", mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
        argv = list(order["argv"])
        if argv and argv[0] == python:
            argv[0] = sys.executable
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TIDEMILL_"))}
        # Ray has chosen the accelerators, and made them visible to this process.
        order = {**order, "argv": argv, "env": {**inherited, **order["env"]}}
        order["cores"] = sorted(set(order["cores"]) & os.sched_getaffinity(0))
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.tell(json.dumps(order))
        said = self._hear()
        os.unlink(path)  # noqa: PTH108
        return said or {"say": "cannot", "why": "its shim does not answer"}

    def wait(self) -> dict[str, Any]:
        """How the command ended, once it has. May be asked again, when the answer was lost on its way."""
        assert self._child is not None
        with self._waiting:
            if self._end is None:
                said = self._hear()
                code = self._child.wait()
                self._end = said or {"say": "ended", "code": -9 if code < 0 else code, "why": "killed"}
            return self._end

    def tell(self, line: str) -> None:
        """A line to the shim."""
        assert self._child is not None and self._child.stdin is not None
        try:
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()
        except OSError:
            pass  # it is gone, and `wait` says so

    def ping(self) -> bool:
        """This actor answers."""
        return True

    def _hear(self) -> dict[str, Any] | None:
        assert self._child is not None and self._child.stdout is not None
        for line in self._child.stdout:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                return found
        return None
