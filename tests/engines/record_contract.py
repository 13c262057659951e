"""Records what the real vLLM or SGLang accepts, as JSON that the tests of our launch lines are held against.

Run it with the Python of an environment that has the engine (no accelerator is needed, only its packages):

    python -m venv engine && engine/bin/pip install vllm==0.33.0
    VLLM_TARGET_DEVICE=cpu engine/bin/python tests/engines/record_contract.py vllm > tests/engines/contracts/vllm.json
    engine/bin/python tests/engines/record_contract.py sglang > tests/engines/contracts/sglang.json

It takes the engine's own argument parser apart: each option with its type, choices and number of values. And the
fields of its request classes, and the routes and metrics that `Control` names, as far as its sources tell.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

OURS = {
    "vllm": re.compile(r"/(health|metrics|sleep|wake_up|is_sleeping)$"),
    "sglang": re.compile(r"/(health|health_generate|release_memory_occupation|resume_memory_occupation)$"),
}


def options(parser: argparse.ArgumentParser) -> Iterator[dict[str, Any]]:
    """Each option once, with all the flags that it goes by, also those that help does not show."""
    flags: dict[int, list[str]] = {}
    for flag, action in parser._option_string_actions.items():
        flags.setdefault(id(action), []).append(flag)
    for action in parser._actions:
        choices = action.choices if action.choices is not None else action.metavar
        yield {
            "flags": sorted(flags.get(id(action), [])),
            "dest": action.dest,
            "takes": _takes(action),
            "type": _type_name(action.type),
            "choices": [str(each) for each in choices] if isinstance(choices, list | tuple) else None,
            "required": action.required,
        }


def _takes(action: argparse.Action) -> str:
    """How many values: `none`, `one`, `some` (one or more), `maybe` (none or one), `any`."""
    if action.nargs == 0:
        return "none"
    named = {None: "one", 1: "one", "+": "some", "?": "maybe", "*": "any"}
    return named.get(action.nargs, str(action.nargs))


def _type_name(kind: Any) -> str:
    """The type's name; of vLLM's `optional_type(int)`, the name of what is optional."""
    if kind is None:
        return "str"
    for cell in getattr(kind, "__closure__", None) or ():
        if callable(cell.cell_contents):
            return _type_name(cell.cell_contents)
    return str(getattr(kind, "__name__", kind))


def vllm_contract() -> dict[str, Any]:
    import vllm
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    root = Path(vllm.__file__).parent
    return {
        "options": list(options(make_arg_parser(FlexibleArgumentParser(prog="vllm serve")))),
        "request_fields": {
            "chat": sorted(ChatCompletionRequest.model_fields),
            "completion": sorted(CompletionRequest.model_fields),
        },
        "routes": _routes(root / "entrypoints", "vllm") + ["/metrics"],
        "metrics": _metrics(root / "v1" / "metrics", "vllm"),
    }


def sglang_contract() -> dict[str, Any]:
    import sglang
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    root = Path(sglang.__file__).parent / "srt"
    return {
        "options": list(options(parser)),
        "request_fields": {
            "chat": sorted(ChatCompletionRequest.model_fields),
            "completion": sorted(CompletionRequest.model_fields),
        },
        "routes": _routes(root / "entrypoints", "sglang") + ["/metrics"],
        "metrics": _metrics(root / "observability", "sglang"),
    }


def _routes(folder: Path, engine: str) -> list[str]:
    """The routes of ours that its sources declare."""
    found = set()
    for file in folder.rglob("*.py"):
        for route in re.findall(r'@\w+\.(?:get|post|api_route)\(\s*"([^"]+)"', file.read_text(encoding="utf-8")):
            if OURS[engine].fullmatch(route):
                found.add(route)
    return sorted(found)


def _metrics(folder: Path, engine: str) -> list[str]:
    """The names in its sources. The Prometheus client shows a counter with `_total` behind it."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        found |= set(re.findall(rf'"({engine}:[a-z_]+)"', file.read_text(encoding="utf-8")))
    return sorted(found)


def main() -> None:
    engine = sys.argv[1]
    contract = {"vllm": vllm_contract, "sglang": sglang_contract}[engine]()
    head = {
        "engine": engine,
        "version": version(engine),
        "recorded": "by tests/engines/record_contract.py from the installed package's own argument parser and sources",
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    sys.stdout.write("{\n" + ",\n".join(_lines({**head, **contract})) + "\n}\n")


def _lines(contract: dict[str, Any]) -> Iterator[str]:
    """A line for each key, and for each option, so that a new version shows in a diff what it changed."""
    for key, value in contract.items():
        if key == "options":
            value = ",\n".join(json.dumps(option) for option in sorted(value, key=lambda each: each["dest"]))
            yield f'"options": [\n{value}\n]'
        else:
            yield f"{json.dumps(key)}: {json.dumps(value)}"


if __name__ == "__main__":
    main()
