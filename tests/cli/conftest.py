"""Commands run in this process, against a real control plane behind a real port, or against a stopped one's data."""

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from litestar.testing import TestClient

from tests.control.world import TOKEN, FakePlatform, app_of, open_world
from tidemill.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document that was printed."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """The one line of a command that failed."""
        assert self.code in (1, 2) and self.out == "" and self.err.count("\n") == 1, self
        assert self.err.startswith("error: ")
        return self.err.removeprefix("error: ").rstrip("\n")


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TIDEMILL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    directory = tmp_path / "data"
    directory.mkdir()
    return directory


@pytest.fixture
def platform(data: Path) -> Iterator[FakePlatform]:
    world = open_world(data)
    yield world
    world.store.close()


class Up(NamedTuple):
    """A platform that runs on `data`."""

    platform: FakePlatform
    data: Path
    url: str
    requests: list[str]


@pytest.fixture
def up(data: Path, platform: FakePlatform) -> Iterator[Up]:
    requests: list[str] = []
    lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (data / "admin-token").write_text(TOKEN + "\n")
    app = app_of(platform)
    with TestClient(app, raise_server_exceptions=False) as client, serve(client, requests) as url:
        (data / "runtime.json").write_text(json.dumps({"pid": 1, "control_url": url}))
        yield Up(platform, data, url, requests)
    os.close(lock)


@contextmanager
def serve(client: TestClient[Any], requests: list[str]) -> Iterator[str]:
    """Put an ASGI test client behind a port, and note the requests. Gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            answer = client.request(self.command, self.path, content=body, headers=dict(self.headers))
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
