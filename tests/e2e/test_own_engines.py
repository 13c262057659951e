"""Engines of our own on a real platform: started by their command line, watched, restarted, and rolled to another
version under load without a request that fails.

The engine is the mock, started through a program that takes vLLM's command line as the real one's parser does; and
llama.cpp itself.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.platform import Platform, start_platform, wait_until
from tidemill.app.recipes import embedded_model

VLLM_LIKE = Path(__file__).parents[1] / "support/vllm_like.py"
CONFIG = """
[fleet]
health_seconds = 3

[nodes.local]
devices = [{{ kind = "H20", count = 4 }}, {{ kind = "cpu", count = 2 }}]

[models.big]
engine = "vllm"
path = "{path}/v1"
version = "v1"
kinds = ["h20"]
replicas = 2
context = 8192

[models.big.launch]
command = ["{python}", "{program}"]
max_sequences = 64
quantization = "fp8"

[models.smol]
engine = "llamacpp"
kinds = ["cpu"]
devices = 1
parallel = 8
context = 512

[prices.big]
input = "1.00"
output = "2.00"

[prices.smol]
input = "1.00"
output = "2.00"
"""


def weights(path: Path, name: str, **behaviour: Any) -> Path:
    (path / name).mkdir(exist_ok=True)
    (path / name / "behaviour.json").write_text(json.dumps(behaviour))
    return path / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def platform(folder: Path) -> Iterator[Platform]:
    weights(folder, "v1", word="one ", interval_ms=2.0)
    config = CONFIG.format(path=folder, python=sys.executable, program=VLLM_LIKE)
    with start_platform(folder, config, workers=2) as platform:
        yield platform


class Crowd:
    """Clients that ask one after the other until they are stopped, half of them for streams."""

    def __init__(self, platform: Platform, key: str, model: str, clients: int = 8) -> None:
        self.words: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._arguments = (platform.url, key, model)
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        url, key, model = self._arguments
        body = {"model": model, "messages": [{"role": "user", "content": f"hi {number}"}], "max_tokens": 6}
        with httpx.Client(timeout=60, headers={"authorization": f"Bearer {key}"}) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(f"{url}/chat/completions", json={**body, "stream": number % 2 == 0})
                    if (
                        not answer.is_success
                        or (number % 2 == 0 and "[DONE]" not in answer.text)
                        or '{"error"' in answer.text
                    ):
                        self.failures.append(f"{answer.status_code}: {answer.text[:300]}")
                    self.words.update(word for word in ("one", "two") if f"{word} " in answer.text)
                    self.words["all"] += 1
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def replicas(platform: Platform, model: str) -> list[dict[str, Any]]:
    with platform.admin as admin:
        found = admin.get("fleet").json()["replicas"]
    return [each for each in found if each["model"] == model]


def engines(path: Path) -> list[int]:
    """The processes that serve a version's weights; the mock has taken the place of the program, with its log."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if entry.name.isdigit() and b"mock_engine.py" in words and b"TIDEMILL_PROCESS=" in environment:
            found.append(int(entry.name))
    return found


def test_they_serve_and_are_told_what_the_configuration_says(platform: Platform, folder: Path) -> None:
    key = platform.new_tenant("first")
    with Crowd(platform, key, "big", 4) as crowd:
        wait_until(lambda: crowd.words["one"] > 20)
    assert crowd.failures == []
    said = "".join(path.read_text() for path in (platform.data / "logs").glob("engine-big-*.log"))
    assert (
        "'--quantization': 'fp8'" in said and "'--max-num-seqs': '64'" in said and "'--max-model-len': '8192'" in said
    )
    assert "sees 0" in said and "sees 1" in said, "each its own device"
    assert {each["devices"][0] for each in replicas(platform, "big")} == {"local/0", "local/1"}
    (smol,) = replicas(platform, "smol")
    assert smol["devices"] == ["local/4"]
    wait_until(
        lambda: {line["verdict"] for line in platform.reconcile()["replicas"] if "big" in line["replica"]} == {"equal"}
    )


def test_one_that_hangs_is_started_again(platform: Platform, folder: Path) -> None:
    before = set(engines(folder))
    assert len(before) == 2
    hung = before.pop()
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: hung not in engines(folder) and len(engines(folder)) == 2, 40)
    wait_until(lambda: all(each["phase"] == "ready" for each in replicas(platform, "big")), 20)


def test_a_roll_that_nobody_notices_and_that_stays(platform: Platform, folder: Path) -> None:
    key = platform.new_tenant("roller")
    new = weights(folder, "v2", word="two ", interval_ms=2.0, load_s=0.5)
    with Crowd(platform, key, "big") as crowd:
        wait_until(lambda: crowd.words["one"] > 50, 30)
        rolled = platform.cli("model", "roll", "big", "--path", str(new), "--version", "2")
        assert (rolled["state"], rolled["done"], rolled["of"]) == ("done", 2, 2), rolled
        seen = crowd.words["all"]
        wait_until(lambda: crowd.words["all"] > seen + 30, 30)
    assert crowd.failures == []
    assert crowd.words["one"] > 0 and crowd.words["two"] > 0
    assert {each["version"] for each in replicas(platform, "big")} == {"2"}
    lines = [line for line in platform.reconcile()["replicas"] if line["replica"].startswith("big/")]
    assert lines and {line["verdict"] for line in lines} == {"equal"}, lines
    platform.kill9("supervisor")
    wait_until(lambda: not engines(folder), 20)
    platform.start(workers=2)
    assert {each["version"] for each in replicas(platform, "big")} == {"2"}
    with Crowd(platform, key, "big", 2) as crowd:
        wait_until(lambda: crowd.words["all"] > 5, 30)
    assert crowd.words["one"] == 0 and crowd.failures == []


def test_a_version_that_does_not_start_is_taken_back(platform: Platform, folder: Path) -> None:
    key = platform.new_tenant("careful")
    bad = weights(folder, "v3", fails="KeyError: model.layers.61")
    with Crowd(platform, key, "big") as crowd:
        command = [sys.executable, "-m", "tidemill", "model", "roll", "big", "--path", str(bad)]
        done = subprocess.run([*command, "--data", str(platform.data)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "big was not rolled" in done.stderr and "ended with code 1" in done.stderr and "taken back" in done.stderr
    assert crowd.failures == [] and crowd.words["two"] > 0
    assert {each["version"] for each in replicas(platform, "big")} == {"2"}


def test_llama_cpp_is_rolled_beside_itself(platform: Platform, folder: Path) -> None:
    key = platform.new_tenant("small")
    copy = folder / "smol-2.gguf"
    copy.symlink_to(embedded_model("smol"))
    with Crowd(platform, key, "smol") as crowd:
        wait_until(lambda: crowd.words["all"] > 5, 60)
        rolled = platform.cli("model", "roll", "smol", "--path", str(copy))
        assert rolled["state"] == "done", rolled
        seen = crowd.words["all"]
        wait_until(lambda: crowd.words["all"] > seen + 10, 60)
    assert crowd.failures == []
    (smol,) = replicas(platform, "smol")
    assert (smol["name"], smol["version"], smol["devices"]) == ("smol/1", "smol-2", ["local/4"])


def test_what_cannot_be_rolled_says_why(platform: Platform) -> None:
    with platform.admin as admin:
        for body, status, words in (
            ({"model": "nope", "path": "x"}, 404, "no model 'nope'"),
            ({"model": "smol", "path": "/no/such.gguf"}, 400, "there is no file /no/such.gguf"),
            ({"model": "big", "path": ""}, 400, "path"),
            ({"model": "big", "path": "x", "version": "a\nb"}, 400, "version"),
        ):
            answer = admin.post("models/roll", json=body)
            assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text


SLEEPY = """
[nodes.local]
devices = [{{ kind = "H20", count = 1 }}]

[models.big]
engine = "vllm"
path = "{path}/slow"
context = 8192
min_replicas = 0
max_replicas = 1
scale_down_seconds = 2
sleepers = 1

[models.big.launch]
command = ["{python}", "{program}"]

[prices.big]
input = "1.00"
output = "2.00"

[device_prices.h20]
hour = "3.6"
"""


def test_a_replica_sleeps_while_a_job_has_its_device_and_wakes_for_the_next_request(tmp_path: Path) -> None:
    weights(tmp_path, "slow", word="one ", load_s=6.0)
    config = SLEEPY.format(path=tmp_path, python=sys.executable, program=VLLM_LIKE)
    with start_platform(tmp_path, config) as platform:

        def ask() -> float:
            body = {"model": "big", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            headers = {"authorization": f"Bearer {platform.key}"}
            began = time.monotonic()
            answer = httpx.post(f"{platform.url}/chat/completions", json=body, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
            return time.monotonic() - began

        others = set(engines(tmp_path))  # another test's platform may still run
        assert ask() > 5.0, "it is loaded"
        (pid,) = set(engines(tmp_path)) - others
        wait_until(lambda: [each["phase"] for each in replicas(platform, "big")] == ["asleep"], 30)
        wish = {"tenant": "demo", "command": ["sleep", "600"], "devices": 1, "preemptible": True, "grace": "1s"}
        with platform.admin as admin:
            made = admin.post("jobs", json=wish)
            assert made.status_code == 200, made.text
            job = made.json()["id"]

        def show() -> Any:
            return platform.job(job)["state"]

        wait_until(lambda: show() == "running", 30)
        assert ask() < 5.0, "it wakes, and the job gives way"
        assert set(engines(tmp_path)) - others == {pid} and platform.job(job)["history"][0]["outcome"] == "preempted"
        wait_until(lambda: show() == "running", 40)
        assert [each["phase"] for each in replicas(platform, "big")] == ["asleep"]
        assert {line["verdict"] for line in platform.reconcile()["replicas"]} == {"equal"}
