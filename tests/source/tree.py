"""The source as data: what the rules of tests/source ask of it, from parsed files. Nothing is imported or run."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

GENERATED = "store/migrations/versions"
"""Migrations are never edited, so no rule is asked of them."""


class Function(NamedTuple):
    file: str
    name: str
    lines: int


class Source:
    """Python files below a directory; names of files are relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def texts(self) -> dict[str, str]:
        files = sorted(self.root.rglob("*.py"))
        named = {file.relative_to(self.root).as_posix(): file for file in files}
        return {
            name: file.read_text(encoding="utf-8") for name, file in named.items() if not name.startswith(GENERATED)
        }

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        return {name: ast.parse(text) for name, text in self.texts.items()}

    def public_classes(self) -> dict[str, list[str]]:
        """The files that define each public class at their top."""
        found: dict[str, list[str]] = defaultdict(list)
        for file, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(file)
        return found

    def constants(self) -> dict[str, list[str]]:
        """The files that define each public constant at their top."""
        found: dict[str, list[str]] = defaultdict(list)
        for file, tree in self.trees.items():
            for node in tree.body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                for target in targets:
                    if isinstance(target, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]*", target.id):
                        found[target.id].append(file)
        return found

    def functions(self) -> Iterator[Function]:
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield Function(file, node.name, (node.end_lineno or node.lineno) - node.lineno + 1)

    def first_lines(self) -> Iterator[tuple[str, str]]:
        """The first line of each docstring, with its file."""
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node)
                    if text:
                        yield file, text.splitlines()[0]

    def calls(self, attribute: str) -> Iterator[tuple[str, int]]:
        """Where `something.ATTRIBUTE` stands: file and line."""
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and node.attr == attribute:
                    yield file, node.lineno


SOURCE = Source(ROOT / "src/tidemill")
