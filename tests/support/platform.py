"""A real platform for a test: `tidemill up` as a process of its own, on a data directory of its own.

platform = start_platform(tmp_path, CONFIG)
platform.cli("usage", "--tenant", "demo")   # -> the parsed JSON
platform.kill9("gateway")
platform.stop()
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import httpx

Part = Literal["supervisor", "gateway", "engine"]
_MODULES = {"gateway": "tidemill.app.worker", "engine": "tidemill.engines.llamacpp_child"}
READY_WITHIN_S = 60.0


class Platform:
    """A running `tidemill up`. Amounts are decimal strings, as everywhere."""

    def __init__(self, data: Path, config: Path | None, port: int, control_port: int, env: Mapping[str, str]) -> None:
        self.data = data
        self.port = port
        self.control_port = control_port
        self.url = f"http://127.0.0.1:{port}/v1"
        self.control_url = f"http://127.0.0.1:{control_port}"
        self.output = data.parent / f"{data.name}-up.log"
        self._config = config
        self._env = {**os.environ, **env}
        self._env.pop("TIDEMILL_DATA", None)
        self._env.pop("TIDEMILL_ADMIN_TOKEN", None)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def key(self) -> str:
        """The first tenant's key."""
        return (self.data / "first-key").read_text().strip()

    @property
    def admin(self) -> httpx.Client:
        """The control plane's API, `GET usage` and so on, a good deal quicker than the CLI."""
        token = (self.data / "admin-token").read_text().strip()
        headers = {"authorization": f"Bearer {token}"}
        return httpx.Client(base_url=f"{self.control_url}/api/v1/", headers=headers, timeout=30)

    def pids(self, part: Part) -> list[int]:
        """The processes of a part, found among the supervisor's children, and below the shims (`fleet.shim`)."""
        assert self.process is not None
        if part == "supervisor":
            return [self.process.pid]
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if _MODULES[part].encode() in words:
                    parent = parent_of(int(entry.name))
                    if self.process.pid in (parent, parent_of(parent)):
                        found.append(int(entry.name))
        return sorted(found)

    @property
    def engine_url(self) -> str:
        """Where the embedded engine itself listens, past the gateway."""
        (pid,) = self.pids("engine")
        for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            if word.startswith(b"{"):
                return f"http://127.0.0.1:{json.loads(word)['port']}"
        raise AssertionError("the engine's command line does not say where it listens")

    def start(self, *, workers: int = 1, within_s: float = READY_WITHIN_S) -> "Platform":
        """Start it (again); returns when it says that it is ready."""
        command = [sys.executable, "-m", "tidemill", "up", "--data", str(self.data)]
        command += ["--port", str(self.port), "--control-port", str(self.control_port), "--workers", str(workers)]
        if self._config is not None:
            command += ["--config", str(self._config)]
        with self.output.open("wb") as output:
            process = self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )
        try:
            wait_until(lambda: process.poll() is not None or b"is ready" in self.output.read_bytes(), within_s)
            if process.poll() is not None:
                raise AssertionError(f"`tidemill up` ended:\n{self.output.read_text()}\n{self.logs()}")
        except BaseException:
            self.kill9_all()
            raise
        return self

    def stop(self, within_s: float = 60.0) -> None:
        """SIGTERM, and wait: open requests finish, everything metered is loaded."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill9_all()
            raise

    def kill9(self, part: Part) -> list[int]:
        """`kill -9` every process of a part; returns their ids."""
        killed = self.pids(part)
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if part == "supervisor" and self.process is not None:
            self.process.wait()
        return killed

    def kill9_all(self) -> None:
        """`kill -9` everything at once."""
        if self.process is None or self.process.poll() is not None:
            return
        for pid in [*self.pids("gateway"), *self.pids("engine"), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def cli(self, *arguments: str) -> Any:
        """Run a command with --json and give its parsed output; fails loudly when the command does."""
        at = arguments.index("--") if "--" in arguments else len(arguments)
        words = [*arguments[:at], "--data", str(self.data), "--json", *arguments[at:]]
        command = [sys.executable, "-m", "tidemill", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self._env)
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stderr}{done.stdout}"
        return json.loads(done.stdout)

    def job(self, job: str) -> Any:
        """A job as the admin API shows it."""
        with self.admin as admin:
            return _ok(admin.get("jobs/show", params={"job": job}))

    def new_tenant(self, name: str, credit: str | None = "100") -> str:
        """Make a tenant with a credit; gives its key."""
        with self.admin as admin:
            _ok(admin.post("tenants", json={"name": name}))
            if credit is not None:
                _ok(admin.post("credits", json={"tenant": name, "amount": credit}))
            return str(_ok(admin.post("keys", json={"tenant": name, "name": "test"}))["key"])

    def usage(self, tenant: str) -> Any:
        """The tenant's statement with its records."""
        with self.admin as admin:
            return _ok(admin.get("usage", params={"tenant": tenant, "records": "true", "limit": 1000}))

    def record(self, tenant: str, count: int = 1, within_s: float = 60.0) -> Any:
        """The tenant's last record, once it has `count` of them."""
        found: list[Any] = []

        def enough() -> bool:
            found[:] = self.usage(tenant)["records"]
            return len(found) >= count

        wait_until(enough, within_s)
        assert len(found) == count, found
        return found[-1]

    def reconcile(self) -> Any:
        """`meter reconcile`."""
        with self.admin as admin:
            return _ok(admin.get("meter/reconcile"))

    def logs(self) -> str:
        """The end of what the parts have said, for a failing test's output."""
        texts = [path.read_text(errors="replace")[-3000:] for path in sorted((self.data / "logs").glob("*.log"))]
        return "\n".join(texts)

    def __enter__(self) -> "Platform":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def parent_of(pid: int) -> int:
    """The process that a process belongs to."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def start_platform(
    tmp_path: Path,
    config_text: str | None = None,
    *,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    workers: int = 1,
) -> Platform:
    """Start a platform under `tmp_path`; without a configuration the default one, with the embedded model."""
    config = None
    if config_text is not None:
        config = tmp_path / "tidemill.toml"
        config.write_text(config_text)
    platform = Platform(tmp_path / "data", config, port or free_port(), free_port(), env or {})
    return platform.start(workers=workers)


def free_port() -> int:
    """A port on loopback that is free, and none that the kernel gives to whoever connects meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(true: Callable[[], bool], within_s: float = 60.0, every_s: float = 0.05) -> None:
    """Poll until `true()`; fails when that takes too long."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(every_s)


def _ok(answer: httpx.Response) -> Any:
    assert answer.status_code in (200, 201), f"{answer.request.url}: {answer.status_code} {answer.text}"
    return answer.json()
