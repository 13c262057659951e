"""Logs: JSON where nobody looks, and no failure of theirs becomes a request's."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from tidemill.app.logs import configure_logs


@pytest.fixture(autouse=True)
def restored() -> object:
    yield
    structlog.reset_defaults()


def test_an_event_is_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    structlog.get_logger().warning("engine lost", replica="m/0")
    (line,) = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["replica"]) == ("engine lost", "warning", "m/0")


SAYS = """
import structlog
from tidemill.app.logs import configure_logs
configure_logs()
print("for people", flush=True)
try:
    1 / 0
except ZeroDivisionError:
    structlog.get_logger().exception("engine lost", replica="m/0")
"""


def test_where_people_are_told_things_too_events_are_for_people(tmp_path: Path) -> None:
    together = tmp_path / "together.log"
    with together.open("w") as output:
        subprocess.run([sys.executable, "-c", SAYS], stdout=output, stderr=output, check=True)
    text = together.read_text()
    assert text.startswith("for people\n") and "engine lost" in text and "replica=m/0" in text
    assert "ZeroDivisionError: division by zero" in text
    assert "{" not in text and "\x1b" not in text, "neither JSON nor colours"
    apart = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True)
    assert apart.stdout == "for people\n"
    event = json.loads(apart.stderr)
    assert event["replica"] == "m/0" and "ZeroDivisionError" in event["exception"]


def test_a_full_disk_under_the_log_file_is_nobodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", full)
        configure_logs()
        structlog.get_logger().error("engine lost")
        monkeypatch.undo()
        configure_logs()
        with contextlib.suppress(OSError):
            full.close()
