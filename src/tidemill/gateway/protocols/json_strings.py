"""JSON strings that pass from one API's form to another's undecoded.

Told apart, joined and quoted again.

A text that an engine or a client has written is valid JSON already. Taking it apart to put it together again would
cost a copy and an escape of each chunk; between its quotation marks it can stay as it is.
"""

from collections.abc import Iterable

import msgspec

_encode = msgspec.json.Encoder().encode

NULL = msgspec.Raw(b"null")
EMPTY = msgspec.Raw(b'""')
LINE_BREAK = b"\\n"
"""A line break as JSON writes it."""


def is_string(value: msgspec.Raw) -> bool:
    """True for a JSON string."""
    return memoryview(value)[0] == 0x22


def says_something(value: msgspec.Raw) -> bool:
    """True for a non-empty JSON string."""
    view = memoryview(value)
    return view[0] == 0x22 and view.nbytes > 2


def is_null(value: msgspec.Raw) -> bool:
    return memoryview(value)[0] == 0x6E


def inside(value: msgspec.Raw) -> bytes:
    """The content of a JSON string without its quotation marks, still escaped."""
    return bytes(value)[1:-1]


def joined(strings: Iterable[msgspec.Raw], between: bytes = LINE_BREAK) -> msgspec.Raw:
    """One JSON string out of several."""
    return msgspec.Raw(b'"' + between.join(inside(each) for each in strings) + b'"')


def prefixed(start: str, value: msgspec.Raw) -> msgspec.Raw:
    """A JSON string with a text before it."""
    return msgspec.Raw(_encode(start)[:-1] + bytes(value)[1:])


def quoted(text: str | bytes) -> msgspec.Raw:
    """Encode a text, or JSON sent as text, as a JSON string. Bytes must be UTF-8."""
    return msgspec.Raw(_encode(text if isinstance(text, str) else text.decode()))


def plain(value: msgspec.Raw) -> str:
    """The text of a JSON string; "" for anything else."""
    found = msgspec.json.decode(value)
    return found if isinstance(found, str) else ""
