"""Identifiers that nobody can guess or collide with.

A prefix says what the thing is; letters follow.
"""

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, lower case: no i, l, o, u to misread."""


def new_id(prefix: str) -> str:
    """A fresh identifier such as `ten_7k3m...`: 80 random bits."""
    return prefix + "_" + "".join(_ALPHABET[byte & 31] for byte in secrets.token_bytes(16))


def new_ids_in_order(prefix: str, count: int) -> list[str]:
    """Fresh identifiers that sort as they were made, at most a million of them, each of 29 characters at most.

    For rows that are many: in an index they come behind one another, where random ones are all over it. The time in
    milliseconds, then 50 random bits for all of them, then their number.
    """
    now = time.time_ns() // 1_000_000
    moment = "".join(_ALPHABET[now >> shift & 31] for shift in range(45, -5, -5))
    base = prefix + "_" + moment + "".join(_ALPHABET[byte & 31] for byte in secrets.token_bytes(10))
    return [f"{base}{number:05x}" for number in range(count)]
