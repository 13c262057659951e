"""Fixtures of more than one folder, and what pytest is told of all tests. What they are made of is in `support`."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from _pytest.fixtures import FixtureDef

from tests.store.databases import postgres_server
from tests.support import requirements
from tests.support.examples import register_profiles
from tests.support.mock import Mock
from tests.support.platform import Platform, start_platform

register_profiles()

RUN_COMMANDS = ("Jobs", "LocalBackend", "launch", "replica_set")
"""A module that has one of these runs jobs or engines in processes of their own."""

__all__ = ["postgres_server"]

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a whole platform, what runs commands in processes of their own, and what needs PostgreSQL."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if hasattr(item.module, "start_platform") or any(map(_gives_platform, _fixtures_of(item))):
            item.add_marker(pytest.mark.platform)
        if any(hasattr(item.module, name) for name in RUN_COMMANDS):
            item.add_marker(pytest.mark.processes)
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "postgres_server" in item.fixturenames or parameters.get("databases") == "postgresql":
            item.add_marker(pytest.mark.postgres)


def _fixtures_of(item: pytest.Function) -> Iterator[FixtureDef[Any]]:
    for found in item._fixtureinfo.name2fixturedefs.values():
        yield from found


def _gives_platform(fixture: FixtureDef[Any]) -> bool:
    made = fixture.func.__annotations__.get("return")
    return f"{Platform.__module__}.{Platform.__qualname__}" in (made if isinstance(made, str) else repr(made))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where nothing may be left out, a test that misses what it needs has failed."""
    report = yield
    if requirements.ALL and report.skipped and (missing := requirements.missing(_reason(report))) is not None:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: {missing[0]} is not installed; {missing[1]}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line which tests were left out because something is not installed, and how to have them."""
    line = requirements.summary(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    if line:
        terminalreporter.write_line(line, yellow=True)


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
