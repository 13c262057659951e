"""Tables of TOML as structs.

Unknown keys are refused with the nearest right name, values with their key.
"""

import re
from typing import Any, TypeVar

import msgspec

from tidemill.errors import ConfigError
from tidemill.suggestions import nearest

_TWICE = re.compile(r"Cannot declare \((.+?),?\) twice (.*)")
_TERMS = {
    "Object missing": "missing",
    "required field": "key",
    "enum value": "choice",
    "`object`": "a table",
    "`array`": "a list",
    "`str`": "a string",
    "`int`": "an integer",
    "`float`": "a number",
}
"""msgspec's words, and TOML's."""

T = TypeVar("T")


def toml_message(text: str) -> str:
    """What tomllib says of a file, in words."""
    twice = _TWICE.fullmatch(text)
    if twice:
        return f"[{twice[1].replace(chr(39), '').replace(', ', '.')}] is declared twice {twice[2]}."
    return f"is not valid TOML: {text}."


def tables(value: Any, key: str) -> list[tuple[str, dict[str, Any]]]:
    """The tables below a key, by name. Raises ConfigError for anything else."""
    if value is None:
        return []
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a table of tables.", hint=f"Write [{key}.NAME].")
    for name, table in value.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{key}.{name} must be a table.", hint=f"Write [{key}.{name}] and its keys below it.")
    return list(value.items())


def refuse_unknown(table: dict[str, Any], struct: type[msgspec.Struct], prefix: str) -> None:
    """Raises ConfigError for a key that the struct does not have."""
    known = struct.__struct_fields__
    for key in table:
        if key not in known:
            near = nearest(key, known)
            if (
                isinstance(table[key], dict)
                and not near
                and prefix.startswith(("models.", "prices.", "device_prices."))
            ):
                room, _, name = prefix.rstrip(".").partition(".")
                raise ConfigError(
                    f"unknown key {prefix}{key}.", hint=f'Quote a name that has a dot: [{room}."{name}.{key}"].'
                )
            hint = f"Did you mean {prefix}{near}?" if near else f"Known keys: {', '.join(known)}."
            raise ConfigError(f"unknown key {prefix}{key}.", hint=hint)


def convert(value: Any, kind: type[T], key: str) -> T:
    """A table as a struct. Raises ConfigError with the key of what is wrong."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).replace("`str | null`", "`str`").partition(" - at `$")
        field = path.rstrip("`").strip(".")
        where = ".".join(part for part in (key, field) if part)
        hint = ""
        if "xpected `str`, got" in message:
            hint = 'Strings and amounts are written in quotes, such as "4.00".'
        elif "enum value" in message:
            hint = f"Choose one of: {', '.join(_choices(kind, field))}."
        for theirs, ours in _TERMS.items():
            message = message.replace(theirs, ours)
        message = f"{message[:1].lower()}{message[1:]}"
        raise ConfigError(f"{where}: {message}." if where else f"{message}.", hint=hint) from error


def _choices(kind: Any, path: str) -> list[str]:
    """What may stand at a path of keys, such as `launch.dtype`."""
    from msgspec import inspect  # only errors need it

    found: Any = inspect.type_info(kind)
    for key in path.replace("[", ".[").split("."):
        if isinstance(found, inspect.UnionType):
            found = next(each for each in found.types if not isinstance(each, inspect.NoneType))
        if isinstance(found, inspect.StructType):
            found = next(field.type for field in found.fields if field.encode_name == key)
        else:
            found = found.value_type if isinstance(found, inspect.DictType) else found.item_type
    options = found.types if isinstance(found, inspect.UnionType) else (found,)
    return [str(value) for each in options if isinstance(each, inspect.LiteralType) for value in each.values]
