"""Identifiers that nobody can guess or collide with.

A prefix says what the thing is; random letters follow.
"""

import secrets

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, lower case: no i, l, o, u to misread."""


def new_id(prefix: str) -> str:
    """A fresh identifier such as `ten_7k3m...`: 80 random bits."""
    return prefix + "_" + "".join(_ALPHABET[byte & 31] for byte in secrets.token_bytes(16))
