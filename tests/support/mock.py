"""The benchmark's mock engine as a process of its own. What it can be told is in bench/mock_answers.py."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

SCRIPT = Path(__file__).parents[2] / "bench" / "mock_engine.py"


class Mock:
    """A running mock engine. Its tokenizer: a token is a word."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--port", "0", *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        found = re.search(r":(\d+)$", said.strip())
        assert found, f"the mock engine does not start: {said!r}"
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def config(self, name: str = "mock", **model: str | float) -> str:
        """Its part of a configuration file, with the prices of the issue."""
        lines = [f"[models.{name}]", 'engine = "openai"', f'base_url = "{self.url}"']
        lines += [
            f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in model.items()
        ]
        prices = [f"[prices.{name}]", 'input = "4.00"', 'cached_input = "1.00"', 'output = "16.00"']
        return "\n".join(lines + prices) + "\n"

    def counter(self, name: str) -> int:
        """A counter of its metrics page, such as `mock_aborted_total`."""
        page = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        found = re.search(rf"^{name}(?:{{.*}})? (\d+)$", page, re.MULTILINE)
        assert found, page
        return int(found[1])

    def behave(self, **behaviour: Any) -> None:
        """Change how it answers from now on."""
        httpx.post(f"http://127.0.0.1:{self.port}/mock", json=behaviour).raise_for_status()

    def kill9(self) -> None:
        """`kill -9`, in the middle of whatever it does."""
        self._process.kill()
        self._process.wait(10)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def __enter__(self) -> "Mock":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
