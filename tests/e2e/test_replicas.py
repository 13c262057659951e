"""Two replicas of the real model on this machine: work is spread, and the death of one is survived."""

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.platform import Platform, start_platform, wait_until

CONFIG = """
[models.smol]
engine = "llamacpp"
replicas = 2
parallel = 4
context = 1024
aliases = ["smol-latest"]

[prices.smol]
input = "1.00"
output = "2.00"
"""
TOKENS = 100


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with start_platform(tmp_path_factory.mktemp("replicas"), CONFIG) as platform:
        yield platform


class Talk(threading.Thread):
    """One streamed chat; afterwards `tokens` and `error` say how it went."""

    def __init__(self, platform: Platform, key: str, number: int, tokens: int) -> None:
        super().__init__()
        self._asked = tokens
        self._url = f"{platform.url}/chat/completions"
        self._key = key
        self._number = number
        self.status = 0
        self.tokens = 0
        self.error: dict[str, Any] | None = None
        self.done = False

    def run(self) -> None:
        messages = [{"role": "user", "content": f"Count from {self._number} upwards, and do not stop."}]
        body = {"model": "smol-latest", "messages": messages, "max_tokens": self._asked, "stream": True}
        body |= {"ignore_eos": True}
        headers = {"authorization": f"Bearer {self._key}"}
        with httpx.stream("POST", self._url, json=body, headers=headers, timeout=60) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    self.error = chunk.get("error") or self.error
                    self.tokens += bool(chunk.get("choices") and chunk["choices"][0]["delta"].get("content"))


def talks(platform: Platform, key: str, count: int, tokens: int = TOKENS) -> list[Talk]:
    started = [Talk(platform, key, number, tokens) for number in range(count)]
    for each in started:
        each.start()
    return started


def test_both_work(platform: Platform) -> None:
    assert len(platform.pids("engine")) == 2
    key = platform.new_tenant("both")
    for each in talks(platform, key, 6, 20):
        each.join()
        assert (each.status, each.error, each.done) == (200, None, True)
    records = platform.record("both", 6) and platform.usage("both")["records"]
    assert Counter(each["replica"].partition("#")[0] for each in records) == {"smol/0": 3, "smol/1": 3}
    assert {each["model"] for each in records} == {"smol"}
    lines = {line["replica"]: line for line in platform.reconcile()["replicas"]}
    assert set(lines) == {"smol/0", "smol/1"}, "each has a line of its own"
    assert {line["verdict"] for line in lines.values()} == {"equal"}


def test_a_conversation_finds_its_prefix_again(platform: Platform) -> None:
    key = platform.new_tenant("talker")
    headers = {"authorization": f"Bearer {key}"}
    words = " ".join(f"word{number}" for number in range(60))
    messages = []
    for turn in range(4):
        messages.append({"role": "user", "content": f"Turn {turn}: {words}"})
        body = {"model": "smol", "messages": messages, "max_tokens": 1}
        assert httpx.post(f"{platform.url}/chat/completions", json=body, headers=headers, timeout=60).is_success
    platform.record("talker", 4)
    records = platform.usage("talker")["records"]
    assert len({each["replica"] for each in records}) == 1
    later = [each for each in records if each["prompt_tokens"] > min(e["prompt_tokens"] for e in records)]
    assert len(later) == 3
    assert all(each["cached_tokens"] > each["prompt_tokens"] * 0.4 for each in later), records


def test_one_is_killed_in_the_middle_of_streams(platform: Platform) -> None:
    key = platform.new_tenant("unlucky")
    before = platform.pids("engine")
    early = talks(platform, key, 6)
    wait_until(lambda: all(each.tokens >= 2 for each in early), 30, every_s=0.01)
    os.kill(before[0], signal.SIGKILL)
    late = talks(platform, key, 3, 10)
    for each in early + late:
        each.join()
    broken = [each for each in early if each.error is not None]
    assert 1 <= len(broken) <= 3, [(each.tokens, each.error) for each in early]  # a quick one may have been done
    assert all(each.error is not None and each.error["code"] == "engine_lost" for each in broken)
    assert all(each.done and 0 < each.tokens < TOKENS for each in broken), "with [DONE], so that clients end"
    for each in [each for each in early if each.error is None] + late:
        assert (each.status, each.error, each.done) == (200, None, True)
    platform.record("unlucky", 9)
    records = platform.usage("unlucky")["records"]
    lost = [each for each in records if each["status"] == "engine_lost"]
    assert len(lost) == len(broken) and len({each["replica"] for each in lost}) == 1
    assert sum(each["status"] == "ok" for each in records) == 9 - len(broken)
    assert all(0 < each["completion_tokens"] < TOKENS for each in lost), "what they were sent is billed"
    # It comes back, as another life, with counters of its own.
    wait_until(lambda: len(set(platform.pids("engine")) - set(before)) == 1, 20)
    dead = lost[0]["replica"].partition("#")[0]
    deadline = time.monotonic() + 30
    while True:
        for each in talks(platform, key, 2, 2):
            each.join()
        lives = {r["replica"] for r in platform.usage("unlucky")["records"] if r["replica"].startswith(dead + "#")}
        if len(lives) == 2:
            break
        assert time.monotonic() < deadline, lives
    alive = next(line for line in platform.reconcile()["replicas"] if line["replica"] != dead)
    assert alive["verdict"] == "equal"


def test_a_replica_that_is_stopped_is_asked_no_more_and_the_data_is_kept(tmp_path: Path, platform: Platform) -> None:
    """Both gone at once: an error that says so, and afterwards all is well."""
    key = platform.new_tenant("patient")
    platform.kill9("engine")
    body = {"model": "smol", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    headers = {"authorization": f"Bearer {key}"}
    statuses = []

    def answered() -> bool:
        answer = httpx.post(f"{platform.url}/chat/completions", json=body, headers=headers, timeout=60)
        statuses.append(answer.status_code)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
        return answer.is_success

    wait_until(answered, 30)
    assert set(statuses) <= {200, 502, 503}
