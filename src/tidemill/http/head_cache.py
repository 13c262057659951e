"""A cache of parsed request heads.

A client sends the same head with each request, an engine with each answer, but for the length of the body and, once a
second, the date.

A head that httptools has parsed is kept as the bytes before and behind the digits of its Content-Length. A message on
the same connection that begins with the same bytes, other digits in between, is the same head with another length,
and is not parsed again. Whatever differs in a byte goes through the parser.
"""

import re

_LENGTH = re.compile(rb"\r\ncontent-length: ?([0-9]{1,9})\r\n", re.IGNORECASE)
_END = b"\r\n\r\n"
_UNUSUAL = (b"transfer-encoding", b"upgrade", b"expect", b"trailer")
"""With these a head means more than its length."""
MAX_DIGITS = 9


class KnownHead:
    """A parsed head, and how to recognize a message that begins with it."""

    __slots__ = ("_after", "_before", "_digits", "headers")

    def __init__(self, before: bytes, digits: bytes, after: bytes, headers: dict[bytes, bytes]) -> None:
        self._before = before
        self._digits = digits
        self._after = after
        self.headers = headers
        """Those of the message that was last taken apart by `body_of`."""

    @classmethod
    def of(cls, message: bytes, headers: dict[bytes, bytes]) -> "KnownHead | None":
        """The head of a whole message, of which the parser has found `headers`.

        None for one that is not plain.
        """
        for name in _UNUSUAL:
            if name in headers:
                return None
        end = message.find(_END)
        found = _LENGTH.search(message, 0, end + 2)
        if found is None or found[1] != headers.get(b"content-length") or int(found[1]) != len(message) - end - 4:
            return None
        if _LENGTH.search(message, found.end() - 2, end + 2) is not None:
            return None
        return cls(message[: found.start(1)], found[1], message[found.end(1) : end + 4], headers)

    def body_of(self, data: bytes) -> bytes | None:
        """The body, if `data` is exactly one message with this head, and `headers` are then its headers.

        Else None.
        """
        before, after = self._before, self._after
        if not data.startswith(before):
            return None
        start = len(before)
        end = data.find(b"\r", start, start + MAX_DIGITS + 1)
        if end < 0 or not data.startswith(after, end):
            return None
        digits = data[start:end]
        body_at = end + len(after)
        if digits != self._digits:
            if not digits.isdigit():
                return None
            self.headers = {**self.headers, b"content-length": digits}  # an exchange may still have the old ones
            self._digits = digits
        if int(digits) != len(data) - body_at:
            return None
        return data[body_at:]
