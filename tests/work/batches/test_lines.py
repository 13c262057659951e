"""Reading and checking a batch's input file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.work.conftest import CHAT, RULES, line
from tidemill.store.batches import LineError
from tidemill.work.batches.lines import MAX_CUSTOM_ID, MAX_ERRORS, InvalidBatchInput, LineRules, decode_line, read_index


def written(path: Path, *lines: Any, end: bytes = b"\n", before: bytes = b"") -> Path:
    texts = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines]
    path.write_bytes(before + b"".join(text + end for text in texts))
    return path


def errors(path: Path, rules: LineRules = RULES, models: Any = ("mock",)) -> tuple[LineError, ...]:
    with pytest.raises(InvalidBatchInput) as refused:
        read_index(path, CHAT, rules, models)
    return tuple(refused.value.errors)


def read_all(path: Path) -> list[bytes]:
    index = read_index(path, CHAT, RULES)
    fd = os.open(path, os.O_RDONLY)
    try:
        return [index.read(fd, place) for place in range(len(index))]
    finally:
        os.close(fd)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n  \t\n"])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n\n"])
def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path, end: bytes, before: bytes) -> None:
    path = written(tmp_path / "in", line("a"), line("ü"), end=end, before=before)
    assert [decode_line(text)[0] for text in read_all(path)] == ["a", "ü"]


def test_the_last_line_needs_no_end(tmp_path: Path) -> None:
    path = written(tmp_path / "in", line("a"), line("b"))
    path.write_bytes(path.read_bytes()[:-1])
    assert [decode_line(text)[0] for text in read_all(path)] == ["a", "b"]


def test_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    index = read_index(written(tmp_path / "in", b"", line("a"), b"", line("b", model="x")), CHAT, RULES)
    assert list(index.numbers) == [2, 4]
    assert [index.model(place) for place in range(2)] == ["mock", "x"]
    index.rename({"x": "mock"})
    assert index.model(1) == "mock"


def test_the_body_stays_as_it_was(tmp_path: Path) -> None:
    text = b'{"body": { "model":"mock",  "x": 1.0e5 }, "url": "/v1/chat/completions", "custom_id":"a", "method":"POST"}'
    (read,) = read_all(written(tmp_path / "in", text))
    assert bytes(decode_line(read)[2]) == b'{ "model":"mock",  "x": 1.0e5 }'


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"null", "invalid_type", None),
        (b"[]", "invalid_type", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (b'{"a": ' * 5000, "invalid_json_line", None),
        ({}, "missing_required_parameter", "custom_id"),
        ({**line("a"), "custom_id": None}, "invalid_type", "custom_id"),
        ({**line("a"), "custom_id": ""}, "invalid_custom_id", "custom_id"),
        ({**line("a"), "custom_id": "a" * (MAX_CUSTOM_ID + 1)}, "invalid_custom_id", "custom_id"),
        ({**line("a"), "method": "post"}, "invalid_method", "method"),
        ({**line("a"), "url": "/v1/chat/completions/"}, "invalid_url", "url"),
        ({**line("a"), "body": "x"}, "invalid_type", "body"),
        ({**line("a"), "body": {}}, "missing_required_parameter", "body.model"),
        ({**line("a"), "body": {"model": 5}}, "invalid_type", "body.model"),
        ({**line("a"), "body": {"model": ""}}, "missing_required_parameter", "body.model"),
        (line("a", model="other"), "model_not_found", "body.model"),
        (line("a", text="x" * 200_000), "line_too_long", None),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path: Path, text: Any, code: str, param: str | None) -> None:
    path = written(tmp_path / "in", line("first"), text, line("last"))
    (error,) = errors(path)
    assert (error.line, error.code, error.param) == (2, code, param) and error.message[-1] == "."


def test_a_model_that_is_gone_does_not_end_a_batch_that_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "in", line("a", model="gone"))
    assert errors(path)[0].code == "model_not_found"
    assert len(read_index(path, CHAT, RULES)) == 1


def test_all_errors_are_found_and_many_are_counted(tmp_path: Path) -> None:
    found = errors(written(tmp_path / "in", *[b"{"] * (MAX_ERRORS + 500)), LineRules(10_000, 1000))
    assert [error.line for error in found[:-1]] == list(range(1, MAX_ERRORS + 1))
    assert found[-1] == LineError("too_many_errors", "500 more lines have errors.")


def test_the_file_as_a_whole(tmp_path: Path) -> None:
    assert [error.code for error in errors(written(tmp_path / "empty"))] == ["empty_file"]
    assert [error.code for error in errors(written(tmp_path / "blank", b"", b" "))] == ["empty_file"]
    many = written(tmp_path / "many", *[line(str(number)) for number in range(4)])
    assert [error.code for error in errors(many, LineRules(3, 1000))] == ["too_many_lines"]
    assert len(read_index(many, CHAT, LineRules(4, 1000))) == 4


@given(st.lists(st.sampled_from([b"{", b"\n", b"\r\n", b"\xef\xbb\xbf", b"}", b'"', b"\0", b"\xff", b"a"])))
def test_no_file_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "in"
    good = json.dumps(line("good")).encode()
    path.write_bytes(b"".join(pieces) + b"\n" + good)
    try:
        index = read_index(path, CHAT, LineRules(1000, 64))
    except InvalidBatchInput as refused:
        assert refused.errors
    else:
        assert len(index) == 1
