"""`tidemill up` as a process: its first start, its only one on a data directory, its end, and its next start."""

import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.mock import Mock
from tests.support.platform import Platform, free_port, start_platform, wait_until
from tidemill.meter.frames import frame, segment_path
from tidemill.store.accounts import verify_books
from tidemill.store.balance_leases import leasing_workers
from tidemill.store.engine import open_store, store_url

GATEWAY = "[gateway]\ndrain_seconds = 10\n"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Mock]:
    with Mock() as mock:
        yield mock


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory, upstream: Mock) -> Iterator[Platform]:
    with start_platform(tmp_path_factory.mktemp("up"), GATEWAY + upstream.config()) as platform:
        yield platform


def request(platform: Platform, *, key: str | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "url": f"{platform.url}/chat/completions",
        "headers": {"authorization": f"Bearer {key or platform.key}"},
        "json": {
            "model": "mock",
            "messages": [{"role": "user", "content": "one two three"}],
            "max_tokens": 5,
            **fields,
        },
        "timeout": 30,
    }


def up(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `tidemill up` to its end, which is to come soon."""
    command = [sys.executable, "-m", "tidemill", "up", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def ports() -> list[str]:
    return ["--port", str(free_port()), "--control-port", str(free_port())]


class Stream(threading.Thread):
    """A client that reads a stream to its end, in a thread of its own."""

    def __init__(self, platform: Platform, **fields: Any) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._request = request(platform, stream=True, **fields)
        self.start()
        wait_until(lambda: len(self.lines) > 3 or not self.is_alive())

    def run(self) -> None:
        try:
            with httpx.stream("POST", **self._request) as answer:
                self.lines += (line for line in answer.iter_lines() if line)
        except httpx.HTTPError as error:
            self.error = error

    @property
    def tokens(self) -> int:
        return sum('"content":"' in line and '"content":""' not in line for line in self.lines)


def test_the_first_start_makes_secrets_that_only_their_owner_reads(platform: Platform) -> None:
    for name in ("first-key", "admin-token", "tidemill.db"):
        assert stat.S_IMODE((platform.data / name).stat().st_mode) == 0o600, name
    assert platform.key.startswith("sk-tm-")
    said = platform.output.read_text()
    assert platform.key in said and platform.url in said and platform.control_url in said and "curl " in said
    assert (platform.data / "admin-token").read_text().strip() not in said
    assert httpx.post(**request(platform)).status_code == 200


def test_a_second_one_on_the_same_data_says_so_and_stops(platform: Platform, tmp_path: Path) -> None:
    done = up("--data", str(platform.data), *ports(), cwd=tmp_path)
    assert done.returncode == 1
    assert f"is already running on the data directory {platform.data}" in done.stderr
    assert f"process {platform.pids('supervisor')[0]}, {platform.url}" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert httpx.post(**request(platform)).status_code == 200


@pytest.mark.parametrize("plane", ["--port", "--control-port"])
def test_a_port_that_is_taken_is_named_and_nothing_is_left_running(tmp_path: Path, upstream: Mock, plane: str) -> None:
    (tmp_path / "c.toml").write_text(upstream.config())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        chosen = {"--port": str(free_port()), "--control-port": str(free_port()), plane: str(taken.getsockname()[1])}
        words = [word for pair in chosen.items() for word in pair]
        done = up("--config", "c.toml", "--data", "d", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert f"Cannot listen on port {chosen[plane]}" in done.stderr and plane in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "d" / "runtime.json").exists()


def test_a_bad_configuration_is_one_line_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('curency = "USD"\n')
    done = up("--config", "c.toml", "--data", "d", *ports(), cwd=tmp_path)
    assert done.returncode == 1
    assert "c.toml: unknown key curency. Did you mean currency?" in " ".join(done.stderr.split())
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('[models.m]\nengine = "llamacpp"\npath = "absent.gguf"', "models.m.path: there is no file absent.gguf"),
        (
            '[models.m]\nengine = "openai"\nbase_url = "http://x"\napi_key_env = "NO_SUCH_KEY"',
            "the environment variable NO_SUCH_KEY is not set",
        ),
        ('[store]\nurl = "mysql://h/n"', "SQLite or PostgreSQL, not mysql"),
    ],
)
def test_what_a_start_finds_out_is_one_line_too(tmp_path: Path, config: str, says: str) -> None:
    (tmp_path / "c.toml").write_text(config)
    done = up("--config", "c.toml", "--data", "d", *ports(), cwd=tmp_path)
    assert done.returncode == 1
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr + done.stdout


def test_a_stop_lets_an_open_stream_come_to_its_end_and_a_new_start_keeps_every_nano(
    platform: Platform, upstream: Mock
) -> None:
    key = platform.new_tenant("kept", credit="5")
    first_key = platform.key
    upstream.behave(interval_ms=50)
    try:
        stream = Stream(platform, key=key, max_tokens=30, stream_options={"include_usage": True})
        platform.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        time.sleep(0.3)
        with pytest.raises(httpx.HTTPError):  # nobody new is let in
            httpx.post(**request(platform, key=key))
        stream.join(20)
        assert platform.process.wait(20) == 0  # type: ignore[union-attr]
    finally:
        upstream.behave(interval_ms=0)
    assert stream.error is None and stream.lines[-1] == "data: [DONE]"
    assert '"completion_tokens":30' in stream.lines[-2]
    assert "some requests were cut off" not in platform.output.read_text()
    store = open_store(store_url(None, platform.data))
    with store.read() as connection:
        assert leasing_workers(connection) == set()
        assert all(not found for found in verify_books(connection).values())
    store.close()
    assert list((platform.data / "meter").iterdir()) == []

    platform.start()
    assert platform.key == first_key and first_key not in platform.output.read_text()
    usage = platform.usage("kept")
    (record,) = usage["records"]
    assert (record["status"], record["completion_tokens"]) == ("ok", 30)
    # 3 prompt tokens at 4.00 and 30 of the answer at 16.00 a million
    assert (record["charge"], usage["balance"]) == ("0.000492", "4.999508")
    assert httpx.post(**request(platform, key=key)).status_code == 200


def test_a_second_signal_cuts_off_and_bills_what_came(platform: Platform, upstream: Mock) -> None:
    key = platform.new_tenant("impatient", credit="5")
    upstream.behave(interval_ms=50)
    try:
        stream = Stream(platform, key=key, max_tokens=2000)
        began = time.monotonic()
        platform.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        time.sleep(0.3)
        platform.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
        platform.process.wait(20)  # type: ignore[union-attr]
        assert time.monotonic() - began < 10
        stream.join(10)
    finally:
        upstream.behave(interval_ms=0)
    assert "some requests were cut off" in " ".join(platform.output.read_text().split())
    platform.start()
    (record,) = platform.usage("impatient")["records"]
    assert record["completion_tokens"] >= stream.tokens > 0


def test_a_usage_log_that_cannot_be_read_does_not_keep_the_platform_down(platform: Platform) -> None:
    platform.stop()
    bad = platform.data / "meter" / "gw9-bad"
    bad.mkdir()
    segment_path(bad, 1).write_bytes(frame(b"\xc1 is no MessagePack").ljust(4096, b"\0"))
    try:
        platform.start()
        assert httpx.post(**request(platform)).status_code == 200
        wait_until(lambda: platform.usage("demo")["records"] != [])
        assert bad.exists()
        assert "gw9-bad" in platform.output.read_text()
    finally:
        for path in bad.iterdir():
            path.unlink()
        bad.rmdir()
