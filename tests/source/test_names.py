"""Names: one meaning for each, and nouns for files."""

import re
from pathlib import Path

from tests.source.allowed import PARTICIPLES, TWICE
from tests.source.tree import SOURCE, Source

LIMITS = re.compile(r"MAX_\w+|\w+_BYTES|\w+_S")
PARTICIPLE = re.compile(r"(ing|ed)$")


def classes_defined_twice(source: Source) -> dict[str, list[str]]:
    return {name: files for name, files in source.public_classes().items() if len(files) > 1}


def limits_defined_twice(source: Source) -> dict[str, list[str]]:
    return {name: files for name, files in source.constants().items() if len(files) > 1 and LIMITS.fullmatch(name)}


def participles(source: Source) -> set[str]:
    return {name for name in source.texts if PARTICIPLE.search(Path(name).stem)}


def test_a_public_class_has_a_name_of_its_own() -> None:
    """Else "a Hold" is money here and a device there: rename one after its field's term."""
    assert classes_defined_twice(SOURCE) == {}


def test_a_limit_or_a_time_is_defined_once() -> None:
    """What several modules share stands in one; what is a module's own begins with an underscore."""
    found = limits_defined_twice(SOURCE)
    assert found.keys() == TWICE.keys(), {name: files for name, files in found.items() if name not in TWICE}


def test_a_file_is_named_by_a_noun() -> None:
    """`holds.py`, not `holding.py`: a participle does not say what the file has."""
    assert participles(SOURCE) == PARTICIPLES.keys()


def test_these_rules_can_fail(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/holding.py").write_text("MAX_HOLDS = 1\nWAIT_S: float = 2.0\n_OWN_S = 1\n\nclass Hold: ...\n")
    (tmp_path / "holds.py").write_text("MAX_HOLDS = 2\nWAIT_S = 3.0\n_OWN_S = 2\nclass Hold: ...\nclass _Own: ...\n")
    source = Source(tmp_path)
    assert classes_defined_twice(source) == {"Hold": ["a/holding.py", "holds.py"]}
    assert limits_defined_twice(source).keys() == {"MAX_HOLDS", "WAIT_S"}
    assert participles(source) == {"a/holding.py"}
