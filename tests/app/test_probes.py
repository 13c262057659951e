"""The look at upstreams."""

import asyncio
from collections.abc import Mapping

import pytest

from tidemill.app import probes
from tidemill.app.probes import UpstreamProbe
from tidemill.engines.registry import engine_of

Status = int | None


class Pages:
    """What an upstream answers, by path; None for nothing."""

    def __init__(self, **pages: Status) -> None:
        self.pages = pages
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, base_url: str, path: bytes, timeout_s: float, headers: Mapping[str, str]) -> Status:
        self.asked.append((base_url, path.decode()))
        assert headers in ({"Authorization": "Bearer key"}, {"x-api-key": "key", "anthropic-version": "2023-06-01"})
        return self.pages.get(path.decode().strip("/"))


def probe(pages: Pages, every_s: float = 10.0, kind: str = "openai") -> tuple[UpstreamProbe, list[bool]]:
    seen: list[bool] = []
    engine = engine_of(kind)
    made = UpstreamProbe(
        "x/0",
        "http://x/v1",
        engine.auth_headers("key"),
        engine.probes,
        every_s=every_s,
        changed=lambda: seen.append(made.ready),
        get=pages,
    )
    return made, seen


@pytest.mark.parametrize(
    ("pages", "well"),
    [
        ({"health": 200}, True),
        ({"health": 503, "models": 200}, False),  # vLLM whose engine has died still lists its models
        ({"health": 500}, False),
        ({"health": None, "models": 200}, False),
        ({"health": 404, "models": 200}, True),
        ({"health": 404, "models": 401}, True),  # a refusal is an answer
        ({"health": 401, "models": 429}, True),
        ({"health": 404, "models": 502}, False),
        ({"health": 404, "models": None}, False),
    ],
)
async def test_what_counts_as_well(pages: dict[str, Status], well: bool) -> None:
    asked, _ = probe(Pages(**pages))
    assert await asked.ask() is well


async def test_a_page_that_is_not_there_is_not_asked_for_again() -> None:
    pages = Pages(health=404, models=200)
    asked, _ = probe(pages)
    for _ in range(3):
        await asked.ask()
    assert pages.asked == [("http://x", "/health"), *[("http://x/v1", "/models")] * 3]


@pytest.mark.parametrize(("status", "well"), [(200, True), (401, True), (429, True), (529, False), (None, False)])
async def test_anthropics_api_is_asked_for_its_models(status: Status, well: bool) -> None:
    pages = Pages(**{"models?limit=1": status})
    asked, _ = probe(pages, kind="anthropic")
    assert await asked.ask() is well
    assert pages.asked == [("http://x/v1", "/models?limit=1")]


async def test_two_failures_in_a_row_take_it_out_and_one_answer_brings_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "AGAIN_S", 0.01)
    pages = Pages(health=200)
    watched, seen = probe(pages, every_s=0.01)
    watched.start()
    await asyncio.sleep(0.1)
    assert watched.ready and seen == []
    pages.pages = {}
    async with asyncio.timeout(60):
        while watched.ready:
            await asyncio.sleep(0.005)
    pages.pages = {"health": 200}
    async with asyncio.timeout(60):
        while not watched.ready:
            await asyncio.sleep(0.005)
    await watched.stop()
    assert seen == [False, True], "each change is announced once"


async def test_zero_seconds_is_never() -> None:
    pages = Pages()
    watched, _ = probe(pages, every_s=0)
    watched.start()
    await asyncio.sleep(0.05)
    await watched.stop()
    assert watched.ready and pages.asked == []
