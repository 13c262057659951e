"""Several upstreams on a platform that really runs: one is lost and comes back, and a fallback earns its keep."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.mock import SCRIPT, Mock
from tests.support.platform import Platform, start_platform, wait_until

CONFIG = """
[models.main]
engine = "openai"
base_urls = ["{one}", "{two}"]
upstream_model = "mock"
probe_seconds = 1
aliases = ["main-latest"]
fallbacks = ["dear", "spare"]

[models.dear]
engine = "openai"
base_url = "{spare}"
cost = {{ input = "3.00", cached_input = "1.01", output = "9.00" }}

[models.spare]
engine = "openai"
base_url = "{spare}"
cost = {{ input = "3.00", cached_input = "1.00", output = "9.00" }}

[prices.main]
input = "4.00"
cached_input = "1.00"
output = "16.00"
"""


class World:
    """A platform before three mock engines."""

    def __init__(self, platform: Platform, one: Mock, two: Mock, spare: Mock) -> None:
        self.platform = platform
        self.one, self.two, self.spare = one, two, spare

    def ask(self, key: str, **fields: Any) -> httpx.Response:
        body = {"model": "main", "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4, **fields}
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{self.platform.url}/chat/completions", json=body, headers=headers, timeout=30)

    def replicas(self, tenant: str, count: int) -> Counter[str]:
        self.platform.record(tenant, count)
        return Counter(each["replica"] for each in self.platform.usage(tenant)["records"])

    def replicas_now(self, tenant: str) -> set[str]:
        return {each["replica"] for each in self.platform.usage(tenant)["records"]}

    def ready(self) -> int:
        with self.platform.admin as admin:
            models = {each["name"]: each for each in admin.get("models").json()["models"]}
        return int(models["main"]["replicas_ready"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Mock() as one, Mock() as two, Mock() as spare:
        text = CONFIG.format(one=one.url, two=two.url, spare=spare.url)
        with start_platform(tmp_path_factory.mktemp("upstreams"), text) as platform:
            yield World(platform, one, two, spare)


def start_again(mock: Mock) -> None:
    """The same engine on the same port."""
    mock._process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--port", str(mock.port)], stdout=subprocess.PIPE, text=True
    )
    assert mock._process.stdout is not None
    mock._process.stdout.readline()


def test_a_replica_is_lost_and_found(world: World) -> None:
    key = world.platform.new_tenant("steady")
    world.one.stop()
    for _ in range(10):
        assert world.ask(key, model="main-latest").status_code == 200
    assert world.replicas("steady", 10) == {"main/1": 10}
    wait_until(lambda: world.ready() == 1, 15)
    start_again(world.one)
    wait_until(lambda: world.ready() == 2, 15)
    wait_until(lambda: world.ask(key).is_success and "main/0" in world.replicas_now("steady"), 15)


def test_the_fallback_that_pays_is_taken_when_all_are_gone(world: World) -> None:
    key = world.platform.new_tenant("fallen")
    for mock in (world.one, world.two):
        mock.stop()
    answers = [world.ask(key) for _ in range(6)]
    assert {answer.status_code for answer in answers} == {200}
    assert world.replicas("fallen", 6) == {"spare/0": 6}
    for record in world.platform.usage("fallen")["records"]:
        assert record["model"] == "main"
        assert record["charge"] == "0.000076", "3 x 4 and 4 x 16 per million: the asked model's price"
    for mock in (world.one, world.two):
        start_again(mock)
    wait_until(lambda: world.ready() == 2, 15)
    assert world.ask(key).status_code == 200


def test_a_config_that_would_lose_money_does_not_start(tmp_path: Path) -> None:
    config = tmp_path / "tidemill.toml"
    text = CONFIG.format(one="http://127.0.0.1:9/v1", two="http://127.0.0.1:10/v1", spare="http://127.0.0.1:11/v1")
    config.write_text(text.replace('cost = { input = "3.00", cached_input = "1.00", output = "9.00" }', ""))
    command = [sys.executable, "-m", "tidemill", "up", "--data", str(tmp_path / "data"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "models.main.fallbacks: the cost of 'spare' is not known" in done.stderr + done.stdout


def test_two_gateway_processes_know_what_the_other_has_sent(tmp_path: Path) -> None:
    """Each turn comes on a connection of its own, to whichever process takes it."""
    with Mock() as one, Mock() as two:
        text = f"""
[models.main]
engine = "openai"
base_urls = ["{one.url}", "{two.url}"]
[prices.main]
input = "4.00"
output = "16.00"
"""
        with start_platform(tmp_path, text, workers=2) as platform:
            world = World(platform, one, two, one)
            homes: Counter[str] = Counter()
            for number in range(6):
                tenant = f"talker-{number}"
                key = platform.new_tenant(tenant)
                turns = [" ".join(f"{number}-{turn}-{word}" for word in range(60)) for turn in range(6)]
                for count in range(1, 7):
                    messages = [{"role": "user", "content": turn} for turn in turns[:count]]
                    assert world.ask(key, messages=messages).status_code == 200
                (home,) = world.replicas(tenant, 6)
                homes[home] += 1
            assert homes == {"main/0": 3, "main/1": 3}
