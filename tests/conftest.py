"""Fixtures of more than one folder. What they are made of is in `support`."""

from collections.abc import Iterator

import pytest

from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform

EMBEDDED = """
[models.smollm2-135m-instruct]
engine = "llamacpp"
threads = 1  # two that wait for each other are slower than one where tests take the other core

[prices.smollm2-135m-instruct]
input = "1.00"
cached_input = "0.25"
output = "2.00"
"""


@pytest.fixture(scope="session")
def mock() -> Iterator[Mock]:
    """The benchmark's mock engine, an upstream of `running`."""
    with Mock() as mock:
        yield mock


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, mock: Mock) -> Iterator[Platform]:
    """A platform with the real model, and with the mock as an upstream: `mock` is drained, `mock-abort` aborted."""
    gateway = "[gateway]\nwrite_timeout_seconds = 1.5\n"
    config = EMBEDDED + mock.config("mock", drain_seconds=1.0) + mock.config("mock-abort", on_disconnect="abort")
    with start_platform(tmp_path_factory.mktemp("running"), gateway + config) as platform:
        yield platform


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform with the real model alone. One for a file's tests."""
    with start_platform(tmp_path_factory.mktemp("embedded"), EMBEDDED) as platform:
        yield platform
