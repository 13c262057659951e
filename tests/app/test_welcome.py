"""The line that a start prints to be pasted."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform


@pytest.fixture
def platform(tmp_path: Path, mock: Mock) -> Iterator[Platform]:
    with start_platform(tmp_path, mock.config("mock")) as platform:
        yield platform


def test_the_curl_line_works_when_pasted(platform: Platform) -> None:
    line = next(line for line in platform.output.read_text().splitlines() if line.startswith("curl "))
    done = subprocess.run(["bash", "-c", line.replace("curl ", "curl -s ", 1)], capture_output=True, timeout=30)
    assert b'"chat.completion"' in done.stdout, done
