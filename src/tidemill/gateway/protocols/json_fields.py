"""Readers for the members of a JSON object that is left undecoded.

One pass, and only what is asked for is decoded.

Each reader raises BadRequest, which names the parameter.
"""

from collections.abc import Callable
from typing import TypeVar

import msgspec

from tidemill.gateway.errors import BadRequest, UnsupportedParameter

MAX_SCALAR_BYTES = 4096
"""A longer value is no number, flag or model's name, and is not decoded to find out."""

Fields = dict[str, msgspec.Raw]
T = TypeVar("T")

_decode_object = msgspec.json.Decoder(Fields).decode
_decode_any = msgspec.json.Decoder().decode

_NULL = b"null"


def parse_object(body: bytes) -> Fields:
    """The top-level members of a JSON object. Raises BadRequest."""
    if not body:
        raise BadRequest("The request body is empty.", hint="Send a JSON object.")
    try:
        return _decode_object(body)
    except msgspec.ValidationError as error:
        raise BadRequest("The request body must be a JSON object.", hint="Send {...}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.", hint="Check it with a linter.") from error


def read_object(body: bytes, read: Callable[[Fields], T]) -> T:
    """Parse a body with `read`. Raises BadRequest, also for invalid UTF-8."""
    return read_fields(parse_object(body), read)


def read_fields(fields: Fields, read: Callable[[Fields], T]) -> T:
    """Parse top-level members with `read`. Raises BadRequest, also for invalid UTF-8."""
    try:
        return read(fields)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise BadRequest(f"The request body is not valid UTF-8 text: {error}.", hint="Send UTF-8.") from error


def kind(value: msgspec.Raw) -> int:
    """The first byte of a JSON value, which tells its type."""
    return memoryview(value)[0]


def is_filled_list(value: msgspec.Raw) -> bool:
    """True for a non-empty JSON array, judged by its first two characters without a copy."""
    view = memoryview(value)
    if view[0] != ord("["):
        return False
    at = 1
    while view[at] in b" \n\t\r":  # valid JSON, so the bracket that closes it is there
        at += 1
    return view[at] != ord("]")


def given(fields: Fields, name: str) -> bool:
    """True if the member exists and is not null."""
    value = fields.get(name)
    return value is not None and bytes(value) != _NULL


def scalar(fields: Fields, name: str) -> object:
    """The decoded value, or the raw one if it is long; None if it is missing."""
    value = fields.get(name)
    if value is None or memoryview(value).nbytes > MAX_SCALAR_BYTES:
        return value
    try:
        return _decode_any(value)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"'{name}' is not valid: {error}.", param=name) from error


def string(fields: Fields, name: str) -> str:
    """A required, non-empty string. Raises BadRequest."""
    value = scalar(fields, name)
    if not isinstance(value, str) or not value:
        what = "is missing" if name not in fields else "must be a non-empty string"
        raise BadRequest(f"'{name}' {what}.", hint="GET /v1/models lists the models.", param=name)
    return value


def boolean(fields: Fields, name: str) -> bool:
    """A boolean; false if it is missing. Raises BadRequest."""
    value = scalar(fields, name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise BadRequest(f"'{name}' must be true or false.", param=name)
    return value


def integer(fields: Fields, name: str, *, low: int, high: int) -> int | None:
    """An integer within bounds; None if it is missing. Raises BadRequest."""
    value = scalar(fields, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"'{name}' must be an integer.", hint=f"Send an integer from {low} to {high}.", param=name)
    if not low <= value <= high:
        raise BadRequest(f"'{name}' is {value}, but must be from {low} to {high}.", param=name)
    return value


def word(fields: Fields, name: str, path: str) -> str:
    """An optional string; "" if it is missing. `path` is its name in errors."""
    value = _decode_any(fields[name]) if name in fields else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRequest(f"'{path}' must be a string.", param=path)
    return value


def object_of(fields: Fields, name: str) -> Fields:
    """The members of an object; empty if it is missing. Raises BadRequest."""
    if not given(fields, name):
        return {}
    try:
        return _decode_object(fields[name])
    except msgspec.DecodeError as error:
        raise BadRequest(f"'{name}' must be an object.", param=name) from error


def refuse_all_but(harmless: dict[str, tuple[object, ...]], fields: Fields) -> None:
    """Raise UnsupportedParameter for a parameter of the table with another value than those listed.

    The table has the values that ask for nothing; null always does.
    """
    for name in harmless.keys() & fields.keys():
        value = _decode_any(fields[name])
        if value is not None and value not in harmless[name]:
            raise UnsupportedParameter(f"'{name}' is not supported.", hint="Leave it out.", param=name)
