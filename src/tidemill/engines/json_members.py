"""Changing single members of a JSON object whose other bytes shall stay as they are."""

import re
from collections.abc import Mapping

import msgspec

_BEFORE_VALUE = re.compile(rb'[ \t\n\r]*[{,][ \t\n\r]*"(?:[^"\\]|\\.)*"[ \t\n\r]*:[ \t\n\r]*')
_END = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*\Z")

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def with_members(body: bytes, members: Mapping[str, msgspec.Raw], changes: Mapping[str, bytes]) -> bytes:
    """`body`, an object that was decoded to `members`, with the JSON values of some of them replaced.

    No other byte changes. An object that has a name twice is written anew, so that nobody reads it in another way.
    """
    out: list[bytes] = []
    at = kept = 0
    for name, value in members.items():
        found = _BEFORE_VALUE.match(body, at)
        if found is None:
            return _rewritten(members, changes)
        start, at = found.end(), found.end() + memoryview(value).nbytes
        if body[start:at] != bytes(value):
            return _rewritten(members, changes)
        new = changes.get(name)
        if new is not None:
            out += (body[kept:start], new)
            kept = at
    if not _END.match(body, at):
        return _rewritten(members, changes)
    return b"".join((*out, body[kept:]))


def with_member(body: bytes, path: tuple[str, ...], value: bytes) -> bytes:
    """`body` with the JSON value at a path of names replaced, where it is there.

    Raises msgspec.DecodeError.
    """
    members = _decode(body)
    name, *below = path
    if name not in members:
        return body
    new = with_member(bytes(members[name]), tuple(below), value) if below else value
    return with_members(body, members, {name: new})


def _rewritten(members: Mapping[str, msgspec.Raw], changes: Mapping[str, bytes]) -> bytes:
    return _encode({**members, **{name: msgspec.Raw(value) for name, value in changes.items() if name in members}})
