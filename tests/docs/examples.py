"""Reading and running the code blocks of a page, in order, as a reader would type them.

What a block is for follows from its language; comments before it, which a reader never sees, say the rest:

    ```sh                                    run, all such blocks of a page in one shell
    ```python                                run with the platform's Python
    ```text                                  what the block before it prints
    ```toml  after <!-- file: NAME -->       saved under that name
    ```sh    after <!-- keeps running -->    its first line runs in a terminal of its own, beside the rest
    <!-- Ctrl-C -->                          stops that one

In an expected output `...` stands for anything, and ids, keys, dates and times for any other of their kind. After
<!-- figures vary --> so do numbers, and the order of the words does not matter.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

WITHIN_S = 120.0

_FENCE = re.compile(
    r"^```(\w*)\n(.*?)^```$|^<!-- (file: \S+|keeps running|figures vary|Ctrl-C) -->$", re.DOTALL | re.MULTILINE
)
_KINDS = {
    r"\b(ten|key|txn|prc|req)_[0-9a-z]+": r"\1_ID",
    r"sk-tm-\S+": "KEY",
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?Z?": "INSTANT",
    r"\d{4}-\d\d-\d\d": "DAY",
    r"\d{4}-\d\d\b": "MONTH",
    r"(January|February|March|April|May|June|July|August|September|October|November|December) \d{4}": "MONTH",
    r"\(life [0-9a-f]{8}": "(life LIFE",
}


class Step(NamedTuple):
    """One block, or one comment that asks for something."""

    line: int
    kind: str
    text: str


def steps_of(page: Path) -> list[Step]:
    """The blocks of a page and the comments between them, in order."""
    text = page.read_text(encoding="utf-8")
    steps = []
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        steps.append(Step(line, found[3] or found[1], found[2] or ""))
    return steps


def pattern_of(expected: str, *, vary: bool = False) -> re.Pattern[str]:
    """What an output, made `normal`, must look like to be the expected one; `vary`: with other figures."""
    parts = [re.escape(part) for part in normal(expected, vary=vary).split("...")]
    return re.compile(".*".join(parts), re.DOTALL)


def normal(text: str, *, vary: bool = False) -> str:
    """An output with the names of kinds for what is different each time."""
    for kind, name in _KINDS.items():
        text = re.sub(kind, name, text)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    if vary:
        words = (word for line in lines for word in re.sub(r"[-+]?\b\d[\d,.]*%?", "N", line).split())
        return " ".join(sorted(words))
    return "\n".join(lines)


class Reader:
    """Somebody who works through a page in `directory`, on other ports than those that the page names."""

    def __init__(self, directory: Path, *, port: int, control_port: int) -> None:
        self._directory = directory
        self._ports = {"8080": str(port), "8081": str(control_port)}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
        self._environment = {**environment, "CURL_HOME": str(directory), "PYTHONIOENCODING": "utf-8"}
        # At a terminal, curl shows no progress either.
        (directory / ".curlrc").write_text("silent\nshow-error\n")
        self._shell = subprocess.Popen(
            ["bash", "--norc"],
            cwd=directory,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._beside: subprocess.Popen[bytes] | None = None
        self._beside_output = directory / "beside.log"

    def work_through(self, page: Path) -> int:
        """Run a page; returns how many blocks were run. Fails with the line of the block that went wrong."""
        steps = steps_of(page)
        done = 0
        output = ""
        running = vary = False
        name = ""
        for step in steps:
            where = f"{page.name}, line {step.line}"
            text = self._elsewhere(step.text)
            if step.kind == "Ctrl-C":
                self._stop()
            elif step.kind == "keeps running":
                running = True
                continue
            elif step.kind == "figures vary":
                vary = True
                continue
            elif step.kind.startswith("file: "):
                name = step.kind.removeprefix("file: ")
                continue
            elif step.kind == "text":
                self._compare(output, text, where, vary=vary, beside=output == "")
            elif name:
                (self._directory / name).write_text(text, encoding="utf-8")
            elif step.kind == "sh" and running:
                lasting, _, others = text.partition("\n")
                self._start(lasting, where)
                if others:
                    self._run(others, where)
                output = ""
            elif step.kind in ("sh", "python"):
                output = self._run(text if step.kind == "sh" else _python(text), where) or "\n"
            else:
                raise AssertionError(f"{where}: nobody knows what to do with a block of {step.kind or 'no language'}")
            running, vary, name = False, False, ""
            done += bool(step.text)
        return done

    def close(self) -> None:
        """End everything that was started."""
        self._stop()
        self._shell.kill()
        self._shell.wait()

    def _elsewhere(self, text: str) -> str:
        """The block with this test's ports for the page's."""
        for named, ours in self._ports.items():
            text = re.sub(rf"\b{named}\b", ours, text)
        ports = "--port {} --control-port {}".format(*self._ports.values())
        # Not to install anything anew: -o takes the installation for what it is.
        text = re.sub(
            r'^make up(?: ARGS="(.*)")?(?=$| +#)',
            lambda found: f'make -o .venv/.tidemill-installed up ARGS="{found[1] or ""} {ports}"',
            text,
            flags=re.MULTILINE,
        )
        # Nor to run the tests in the tests: -n prints what would be done.
        return re.sub(r"^make test(?=$| )", "make -n test", text, flags=re.MULTILINE)

    def _run(self, commands: str, where: str) -> str:
        assert self._shell.stdin is not None and self._shell.stdout is not None
        watched = f"trap 'echo \"<failed: $BASH_COMMAND>\"' ERR\n{commands}\ntrap - ERR\n"
        self._shell.stdin.write(watched + "printf '\\n<end>\\n'\n")
        self._shell.stdin.flush()
        lines: list[str] = []
        while (line := self._shell.stdout.readline()) != "<end>\n":
            assert line, f"{where}: the shell ended:\n{''.join(lines)}"
            lines.append(line)
        output = "".join(lines)
        assert "<failed: " not in output, f"{where}: a command failed:\n{output}"
        return output

    def _compare(self, output: str, expected: str, where: str, *, vary: bool, beside: bool) -> None:
        pattern = pattern_of(expected, vary=vary)
        if not beside:
            same = pattern.fullmatch(normal(output, vary=vary))
            assert same, f"{where}: it printed\n{output}\nand not\n{expected}"
            return
        deadline = time.monotonic() + WITHIN_S
        while not pattern.search(normal(self._beside_output.read_text(encoding="utf-8"))):
            ended = self._beside is None or self._beside.poll() is not None
            said = self._beside_output.read_text(encoding="utf-8")
            assert time.monotonic() < deadline and not ended, f"{where}: it printed\n{said}\nand not\n{expected}"
            time.sleep(0.05)

    def _start(self, command: str, where: str) -> None:
        assert self._beside is None or self._beside.poll() is not None, f"{where}: something runs beside already"
        with self._beside_output.open("wb") as output:
            self._beside = subprocess.Popen(
                ["bash", "--norc", "-c", f"exec {command}"],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _stop(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole group of processes."""
        if self._beside is None or self._beside.poll() is not None:
            return
        os.killpg(self._beside.pid, signal.SIGINT)
        try:
            self._beside.wait(WITHIN_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._beside.pid, signal.SIGKILL)
            self._beside.wait()
            raise


def _python(text: str) -> str:
    return f".venv/bin/python - <<'__PYTHON__'\n{text}__PYTHON__"
