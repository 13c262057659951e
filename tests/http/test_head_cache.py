"""A head that was seen before is taken for what the parser would make of it, or it is parsed."""

import httptools
from hypothesis import given
from hypothesis import strategies as st

from tidemill.http.head_cache import KnownHead

NAMES = st.sampled_from(
    [b"Host", b"Authorization", b"content-type", b"X-Trace", b"Content-Length", b"Accept", b"Expect"]
)
VALUES = st.sampled_from([b"a", b"Bearer sk-1", b"12", b"", b"x: y", b"100-continue", b"chunked"])
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=5)


class Parsed:
    """What httptools makes of a message: headers, body, and whether it is whole."""

    def __init__(self, data: bytes) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.complete = 0
        httptools.HttpRequestParser(self).feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete += 1


def message(headers: list[tuple[bytes, bytes]], body: bytes, name: bytes = b"content-length", at: int = 0) -> bytes:
    lines = [b"%b: %b" % each for each in headers]
    lines.insert(min(at, len(lines)), b"%b: %d" % (name, len(body)))
    return b"POST /x HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


@given(
    HEADERS,
    st.binary(max_size=40),
    st.binary(max_size=1200),
    st.sampled_from([b"content-length", b"Content-Length", b"CONTENT-LENGTH"]),
    st.integers(0, 5),
    st.data(),
)
def test_it_says_what_the_parser_says(
    headers: list[tuple[bytes, bytes]], first: bytes, second: bytes, name: bytes, at: int, data: st.DataObject
) -> None:
    one = message(headers, first, name, at)
    try:
        parsed = Parsed(one)
    except httptools.HttpParserError:
        return
    if not parsed.complete:
        return
    known = KnownHead.of(one, parsed.headers)
    if known is None:
        return
    assert known.body_of(one) == first
    other = bytearray(message(headers, second, name, at))
    for _ in range(data.draw(st.integers(0, 2))):  # now and then, something is wrong with it
        other[data.draw(st.integers(0, len(other) - 1))] = data.draw(st.integers(0, 255))
    body = known.body_of(bytes(other))
    if body is not None:
        again = Parsed(bytes(other))
        assert (again.complete, again.body, again.headers) == (1, body, known.headers)
    elif bytes(other) == message(headers, second, name, at):
        raise AssertionError("a plain message with a known head was not known")


def known_of(head: bytes, body: bytes) -> KnownHead | None:
    parsed = Parsed(head + body)
    return KnownHead.of(head + body, parsed.headers)


def test_what_means_more_than_its_length_is_not_remembered() -> None:
    head = b"POST /x HTTP/1.1\r\n%bcontent-length: 2\r\n\r\n"
    assert known_of(head % b"", b"hi") is not None
    assert known_of(head % b"expect: 100-continue\r\n", b"hi") is None
    assert known_of(head % b"trailer: x\r\n", b"hi") is None


def test_parts_and_more_than_one_message_are_for_the_parser() -> None:
    known = known_of(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n", b"hi")
    assert known is not None
    again = b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n"
    assert known.body_of(again + b"you") == b"you"
    assert known.headers[b"content-length"] == b"3"
    for wrong in (b"", b"yo", b"you!", b"youPOST /x"):
        assert known.body_of(again + wrong) is None
    for digits in (b"", b"-3", b"+3", b"3 ", b"0x3", b"3, 3", b"0000000003", "٣".encode()):
        assert known.body_of(again.replace(b" 3", b" " + digits) + b"you") is None
    assert known.body_of(again.replace(b"host: a", b"host: b") + b"you") is None
