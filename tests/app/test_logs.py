"""Logs: JSON where nobody looks, and no failure of theirs becomes a request's."""

import contextlib
import json
import sys

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


def test_a_full_disk_under_the_log_file_is_nobodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stderr", full)
        configure_logs()
        structlog.get_logger().error("engine lost")
        monkeypatch.undo()
        configure_logs()
        with contextlib.suppress(OSError):
            full.close()
