"""The platform that `tidemill demo` plays on.

A child process with a temporary data directory and ports of its own.

Everything goes over the public doors: the data plane's HTTP API for the tenants, the admin API for the operator.
"""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tidemill.cli.client import AdminClient, Json
from tidemill.cli.output import complain
from tidemill.errors import Unavailable

_START_WITHIN_S = 120.0
_STOP_WITHIN_S = 60.0
ANSWER_WITHIN_S = 300.0
"""How long an answer may be silent; on a machine that is busy otherwise, ten at once take their time."""

Progress = Callable[[str], None]


class DemoPlatform:
    """`tidemill up` in `directory`, with `config` as its configuration.

    A context manager: it is stopped at the end.
    """

    def __init__(self, directory: Path, config: str, progress: Progress) -> None:
        from tidemill.fleet.ranks import free_port

        self.data = directory / "data"
        self.port, self.control_port = free_port(), free_port()
        self._config = directory / "tidemill.toml"
        self._config.write_text(config, encoding="utf-8")
        self._progress = progress
        self._said: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._ready = threading.Event()

    def __enter__(self) -> "DemoPlatform":
        command = [sys.executable, "-m", "tidemill", "up", "--config", str(self._config), "--data", str(self.data)]
        command += ["--port", str(self.port), "--control-port", str(self.control_port)]
        # The settings of another platform, which the user's environment may hold, are not for this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the platform in order
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        try:
            self._await_start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def operator(self) -> AdminClient:
        """A client of the control plane with the admin token."""
        token = (self.data / "admin-token").read_text().strip()
        return AdminClient(f"http://127.0.0.1:{self.control_port}", token)

    def chat(self, key: str, answer: "DemoAnswer", **wanted: Any) -> None:
        """Send a chat request and follow its answer into `answer`, which may be looked at meanwhile."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_WITHIN_S)
        try:
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body_of(wanted), headers)
            answer.take(connection.getresponse())
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.error = {"code": "no_answer", "message": f"{type(error).__name__}: {error}"}
        finally:
            connection.close()
            answer.done = True

    def _await_start(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_WITHIN_S
        while not self._ready.wait(0.05):
            if self._process.poll() is not None or time.monotonic() > deadline:
                time.sleep(0.2)  # for its last words
                raise Unavailable(f"The demo's platform does not start: {' '.join(self._said[-3:]) or 'no word'}")

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            line = line.strip()
            self._said.append(line)
            if line.startswith("·") and not self._ready.is_set():
                self._progress(line.removeprefix("·").strip())
            elif "is ready" in line:
                self._ready.set()

    def _stop(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            complain("the demo's platform does not stop and is killed.", kind="note")
            process.kill()
            process.wait()


def body_of(wanted: Json) -> bytes:
    """A request as it is sent."""
    return json.dumps(wanted, separators=(",", ":")).encode()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C, so that the platform is stopped and its directory removed then too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class DemoAnswer:
    """A chat answer while it comes, streamed or whole."""

    def __init__(self) -> None:
        self.status = 0
        self.request_id = ""
        self.text = ""
        self.pieces = 0
        """Chunks of text that have come, about a token each."""
        self.usage: Json | None = None
        self.error: Json | None = None
        self.done = False

    def take(self, response: http.client.HTTPResponse) -> None:
        """Read a response to its end."""
        self.request_id = response.headers.get("x-request-id", "")
        streamed = "event-stream" in (response.headers.get("content-type") or "")
        if not streamed:
            self._take_chunk(json.loads(response.read()), "message")
        self.status = response.status
        while streamed and (line := response.readline()):
            data = line.strip().removeprefix(b"data: ")
            if data and data != b"[DONE]" and not data.startswith(b":"):
                self._take_chunk(json.loads(data), "delta")

    def _take_chunk(self, chunk: Json, part: str) -> None:
        self.error = chunk.get("error") or self.error
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            text = choice[part].get("content") or ""
            self.text += text
            self.pieces += bool(text)
