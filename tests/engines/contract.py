"""A parser made from what the real engine's parser was recorded to accept (tests/engines/record_contract.py)."""

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "contracts"

_NARGS = {"one": None, "some": "+", "maybe": "?", "any": "*"}
_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "human_readable_int": int,
    "human_readable_int_or_auto": int,
    "loads": json.loads,
}


class NotAccepted(Exception):
    """The engine would have refused its command line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise NotAccepted(message)


@cache
def contract(engine: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{engine}.json").read_text(encoding="utf-8"))
    return found


@cache
def parser_of(engine: str) -> argparse.ArgumentParser:
    """Accepts what the engine's own parser accepts; the namespace says which values it would have got."""
    parser = _Parser(prog=engine, add_help=False, allow_abbrev=False)
    for option in contract(engine)["options"]:
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        if option["takes"] == "none":
            settings |= {"action": "store_const", "const": True}
        else:
            settings |= {"nargs": _NARGS[option["takes"]], "type": _TYPES.get(option["type"], str)}
            if option["choices"] is not None and option["type"] == "str":
                settings["choices"] = option["choices"]
        if option["flags"]:
            parser.add_argument(*option["flags"], dest=option["dest"], required=option["required"], **settings)
        else:
            parser.add_argument(option["dest"], **settings)
    return parser


def accepted(engine: str, argv: list[str]) -> dict[str, Any]:
    """What the engine would make of its arguments. Raises NotAccepted."""
    return vars(parser_of(engine).parse_args(argv))
