"""The life of a platform: its first start, a second one beside it, stopping, and starting again."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.mock import Mock
from support.platform import Platform, free_port, start_platform


@pytest.fixture
def platform(tmp_path: Path, mock: Mock) -> Platform:
    started = start_platform(tmp_path, mock.config("mock"))
    yield started  # type: ignore[misc]
    started.stop()


def up(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tidemill", "up", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)


def stream(platform: Platform, seconds: float) -> list[str]:
    """The lines of a stream of the mock that lasts so long."""
    body: dict[str, Any] = {
        "model": "mock",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "mock": {"chunks": int(seconds * 50), "interval_ms": 20},
    }
    headers = {"authorization": f"Bearer {platform.key}"}
    with httpx.stream("POST", f"{platform.url}/chat/completions", json=body, headers=headers, timeout=30) as answer:
        return list(answer.iter_lines())


def test_the_first_start_makes_secrets_that_only_their_owner_can_read(platform: Platform) -> None:
    for name in ("first-key", "admin-token", "tidemill.db"):
        assert stat.S_IMODE((platform.data / name).stat().st_mode) == 0o600, name
    output = platform.output.read_text()
    assert platform.key in output
    assert f"{platform.url}/chat/completions" in output


def test_the_curl_line_works_when_pasted(platform: Platform) -> None:
    line = next(line for line in platform.output.read_text().splitlines() if line.startswith("curl "))
    done = subprocess.run(["bash", "-c", line.replace("curl ", "curl -s ", 1)], capture_output=True, timeout=30)
    assert b'"chat.completion"' in done.stdout, done


def test_a_second_start_on_the_same_data_says_so_and_stops(platform: Platform) -> None:
    again = up("--data", str(platform.data), "--port", str(free_port()), "--control-port", str(free_port()))
    assert again.returncode == 1
    assert "already runs on the data directory" in again.stderr
    assert "Traceback" not in again.stderr + again.stdout


def test_a_port_that_is_taken_is_named(platform: Platform, tmp_path: Path, mock: Mock) -> None:
    config = tmp_path / "other.toml"
    config.write_text(mock.config("mock"))
    other = str(tmp_path / "other")
    begin = time.monotonic()
    taken = up(
        "--config", str(config), "--data", other, "--port", str(platform.port), "--control-port", str(free_port())
    )
    assert taken.returncode == 1
    assert str(platform.port) in taken.stderr and "--port" in taken.stderr
    assert time.monotonic() - begin < 40
    assert "Traceback" not in taken.stderr + taken.stdout


def test_sigterm_lets_an_open_stream_finish_and_loses_nothing(platform: Platform) -> None:
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(stream(platform, 3.0)))
    reader.start()
    time.sleep(0.8)
    assert platform.process is not None
    platform.process.send_signal(signal.SIGTERM)
    reader.join(30)
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    assert platform.process.wait(30) == 0
    platform.start()
    [record] = platform.usage("demo")["records"]
    assert record["status"] == "ok"
    assert record["completion_tokens"] == 150


def test_a_restart_keeps_balances_keys_and_records(platform: Platform) -> None:
    stream(platform, 0.2)
    before = platform.usage("demo")
    key = platform.key
    platform.stop()
    stopped = platform.cli("usage", "--tenant", "demo", "--records")
    assert stopped["balance"] == before["balance"] and len(stopped["records"]) == 1
    platform.start()
    after = platform.usage("demo")
    assert after["balance"] == before["balance"] and after["charge"] == before["charge"]
    assert platform.key == key
    stream(platform, 0.1)
