"""Every command and every code block of README.md and docs/tutorial.md, run in order on a real platform.

The other pages' examples of configuration are read as the platform reads them.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import iter_modules

import httpx
import pytest

from tests.docs.examples import Reader, normal, pattern_of, steps_of
from tests.support.paths import ROOT
from tests.support.platform import Platform, free_port
from tidemill.app.config import schema
from tidemill.app.config.load import load_config

PAGES = sorted(ROOT.glob("docs/**/*.md"))
FRONT = [ROOT / name for name in ("README.md", "README.zh-CN.md", "CHANGELOG.md")]
NEEDED = (".venv", "Makefile", "pyproject.toml", "uv.lock", "src")


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader in a checkout that has no data yet."""
    for name in NEEDED:
        (tmp_path / name).symlink_to(ROOT / name)
    somebody = Reader(tmp_path, port=free_port(), control_port=free_port())
    yield somebody
    somebody.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("page", "at_least"), [("README.md", 6), ("docs/tutorial.md", 20)])
def test_every_block_does_what_the_page_says(page: str, at_least: int, reader: Reader) -> None:
    assert reader.work_through(ROOT / page) >= at_least


@pytest.mark.parametrize("page", [*FRONT, *PAGES], ids=lambda page: page.name)
def test_configuration_in_the_pages_is_taken(page: Path, tmp_path: Path) -> None:
    for step in steps_of(page):
        if step.kind == "toml":
            file = tmp_path / "tidemill.toml"
            file.write_text(step.text, encoding="utf-8")
            load_config(file)


@pytest.mark.parametrize("page", [*FRONT, *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_operator_page_names_every_key_of_the_configuration() -> None:
    page = (ROOT / "docs/operator.md").read_text(encoding="utf-8")
    modules = [importlib.import_module(f"{schema.__name__}.{each.name}") for each in iter_modules(schema.__path__)]
    structs = {value for module in modules for name, value in vars(module).items() if name.endswith("Config")}
    assert len(structs) >= 16
    for struct in structs:
        for key in struct.__struct_fields__:
            assert f"`{key}`" in page or f"`[{key}" in page, f"{key} of {struct.__name__}"


def test_the_api_page_names_every_route(embedded: Platform) -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    routes = httpx.get(f"http://127.0.0.1:{embedded.port}/").json()["routes"]
    admin = httpx.get(f"{embedded.control_url}/api/openapi.json").json()["paths"]
    for path in [*(route.split()[1] for route in routes), *admin]:
        assert path in page, f"{path} is not in docs/api.md"


def test_what_stands_for_something_else() -> None:
    expected = "key sk-tm-abc of ten_1x, made 2026-11-24 15:48:35; tokens: 12 ... end"
    printed = "key sk-tm-XyZ of ten_9kk3, made 2027-01-02 03:04:05; tokens: {} and so on\nto the end\n"
    assert pattern_of(expected).fullmatch(normal(printed.format(12)))
    assert not pattern_of(expected).fullmatch(normal(printed.format(13)))
    table, other = "a  1,250   0.5\nb  -3  +12%", "b  7  12%\na  3  12.25"
    assert pattern_of(table, vary=True).fullmatch(normal(other, vary=True))
    assert not pattern_of(table, vary=True).fullmatch(normal(other + "\nc 1", vary=True))
