"""Changing a member of a JSON object, and not another byte."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.engines.json_members import with_member, with_members

decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
space = st.text(" \n\t\r", max_size=3)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('amodel"\\,:{}', max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.data(), st.dictionaries(st.text('max_odel"\\,:{é', min_size=1, max_size=8), values, max_size=5))
def test_all_other_bytes_stay(data: Any, members: dict[str, Any]) -> None:
    names = [*members, "model"]
    members["model"] = "theirs"
    escape = data.draw(st.booleans())
    pieces = {name: json.dumps(value, ensure_ascii=escape) for name, value in members.items()}
    spaces = data.draw(st.lists(space, min_size=4 * len(names) + 2, max_size=4 * len(names) + 2))

    def written(model: str) -> bytes:
        gap = iter(spaces)
        body = ",".join(
            f"{next(gap)}{json.dumps(name, ensure_ascii=escape)}{next(gap)}:{next(gap)}"
            f"{model if name == 'model' else pieces[name]}{next(gap)}"
            for name in members
        )
        return f"{next(gap)}{{{body}}}{next(gap)}".encode()

    body = written('"theirs"')
    assert with_members(body, decode(body), {"model": b'"ours, and longer"'}) == written('"ours, and longer"')
    assert with_members(body, decode(body), {}) == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"cheap","x":1,"model":"dear"}',
        b'{"model":"dear","x":1,"model":"cheap"}',
        b'{"model":"a","model":"a","x":"a"}',
        b'{"x":"a","x":"a","model":"a"}',
        b'{"x":"\\",\\"model\\":\\"b","model":"a","x":"c"}',
    ],
)
def test_a_name_that_is_there_twice_is_left_once(body: bytes) -> None:
    changed = with_members(body, decode(body), {"model": b'"ours"'})
    assert changed.count(b'"model":') == 1 and json.loads(changed)["model"] == "ours"


def test_a_member_within_a_member() -> None:
    body = b'{"content": [{"model": "a"}], "message" : { "id":1,"model":"a" } , "model": "a"}'
    assert with_member(body, ("message", "model"), b'"b"') == body.replace(b'"id":1,"model":"a"', b'"id":1,"model":"b"')
    assert with_member(body, ("nothing",), b"1") == body
    with pytest.raises(msgspec.DecodeError):
        with_member(b"[1]", ("model",), b'"b"')
