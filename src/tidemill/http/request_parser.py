"""Parses a connection's bytes into exchanges: llhttp's callbacks, and bounds of head and body.

What an attacker may send raises: the connection answers with `refusal`, or 400, and closes.
"""

from collections.abc import Collection
from typing import Protocol
from urllib.parse import unquote_to_bytes

import httptools

from tidemill.http.exchange import ClientConnection, Exchange
from tidemill.http.request_body import BodySource, RequestBody

MAX_HEAD_BYTES = 32 * 1024
"""Request line and headers together."""
MAX_PIPELINED = 16
"""Requests that a client may send ahead while its first is worked on."""
EARLY_BYTES = 16 * 1024
"""A longer body, or one of unknown length, is not taken before it is known who sends it."""
HEAD_TOO_LARGE = (431, "The request's headers are too large.")

_OFFER = (b"upgrade", b"connection", b"http2-settings")


class ParserRules(Protocol):
    """The server's limits and callbacks for requests."""

    max_body_bytes: int
    too_large_message: str
    crowded_message: str
    streamed: Collection[tuple[bytes, bytes]]

    def new_request_id(self) -> str: ...

    def lets_in(self, exchange: Exchange) -> bool:
        """True if the headers alone justify reading a large body."""
        ...


class ParserOwner(ClientConnection, BodySource, Protocol):
    """The connection whose bytes are parsed."""

    crowded: bool
    """It is beyond the limit of connections, and answered with 503."""

    @property
    def idle(self) -> bool:
        """True if no exchange is open."""
        ...

    @property
    def sent_ahead(self) -> int:
        """Number of pipelined requests that wait."""
        ...

    def received(self, exchange: Exchange) -> None:
        """Called with an exchange that is complete, or whose handler reads the body (`Exchange.incoming`)."""
        ...

    def body_received(self, exchange: Exchange) -> None:
        """Called when a body that a handler reads itself is complete."""
        ...


class RequestParser:
    """The parser of the request that a connection is receiving."""

    def __init__(self, owner: ParserOwner, rules: ParserRules) -> None:
        self._owner = owner
        self._rules = rules
        self._parser = httptools.HttpRequestParser(self)
        self.receiving: Exchange | None = None
        """Its head is whole."""
        self.latest: Exchange | None = None
        """The last one that was whole; its reader forgets it."""
        self.messages = 0
        self.between = True
        """Nothing of a request has come since the last one was whole."""
        self.in_head = True
        self.refusal: tuple[int, str] | None = None
        """Status and message of what was refused, where 400 does not say it."""
        self.invites = False
        """The client is to be told to send the body, when what came before it has been answered."""
        self._fed_in_head = 0
        self._head_bytes = 0
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: bytes | bytearray = b""
        self._body_bytes = 0

    def feed(self, data: bytes) -> None:
        """Parse more bytes; complete exchanges go to the owner. Raises HttpParserError."""
        before, data_bytes = (self.messages, self.in_head), len(data)
        while data:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_offer(data[upgrade.args[0] :])
        if self.in_head and before == (self.messages, True):  # all of it belongs to a head that had begun before
            self._fed_in_head += data_bytes
            if self._fed_in_head > MAX_HEAD_BYTES:
                self.refusal = HEAD_TOO_LARGE
                raise httptools.HttpParserError("head too large")

    def _without_offer(self, rest: bytes) -> bytes:
        """The head again without its `Upgrade` offer, and the bytes after it.

        Such as Java's `Upgrade: h2c`.

        The offer may be ignored (RFC 9110, 7.8), but the parser has stopped behind the head.
        """
        method = self._parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserError("not a proxy")
        self._parser = httptools.HttpRequestParser(self)
        lines = [b"%b %b HTTP/1.1" % (method, self._url)]
        lines += [b"%b: %b" % header for header in self._headers.items() if header[0] not in _OFFER]
        return b"\r\n".join(lines) + b"\r\n\r\n" + rest

    def close(self) -> None:
        """Break reference cycles: the collector is late for objects as old as a long stream."""
        del self._parser, self._owner

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._owner.sent_ahead >= MAX_PIPELINED:
            self.refusal = (400, f"A connection may have at most {MAX_PIPELINED} pipelined requests.")
            raise ValueError("too many requests ahead")
        self.receiving = None
        self.messages += 1
        self.between = self.invites = False
        self.in_head = True
        self._head_bytes = self._fed_in_head = self._body_bytes = 0
        self._url = b""
        self._headers = {}
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + 4)
        if self.in_head:  # else a trailer, which must not change what the head has said
            self._headers[name.lower()] = value

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refusal = HEAD_TOO_LARGE
            raise ValueError("head too large")

    def on_headers_complete(self) -> None:
        parser, owner, rules = self._parser, self._owner, self._rules
        if parser.should_upgrade():
            return
        self.in_head = False
        headers = self._headers
        path, _, query = self._url.partition(b"?")
        if b"%" in path:
            path = unquote_to_bytes(path)
        exchange = Exchange(
            owner, parser.get_method(), path, rules.new_request_id(), headers, parser.should_keep_alive()
        )
        if query:
            exchange.query = query
        if parser.get_http_version() == "1.0":
            exchange.chunked = False
        self.receiving = exchange
        if owner.crowded:
            self.refusal = (503, rules.crowded_message)
            raise ValueError("too many connections")  # it gets to read why, see `ServerConnection.finished`
        length = int(headers.get(b"content-length", b"0"))
        streamed = (exchange.method, path) in rules.streamed
        if length > rules.max_body_bytes and not streamed:
            self._too_large()
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        weighty = waits or length > EARLY_BYTES or b"transfer-encoding" in headers
        if streamed or (weighty and not rules.lets_in(exchange)):
            exchange.incoming = RequestBody(owner, waits=waits, limit=None if streamed else rules.max_body_bytes)
            owner.received(exchange)
        elif waits and owner.idle:
            owner.invite_body()
        else:
            self.invites = waits

    def on_body(self, body: bytes) -> None:
        if self.receiving is not None and self.receiving.incoming is not None:
            self.receiving.incoming.feed(body)
            return
        if not self._body:
            self._body = body
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += body  # a list of pieces would let chunks of one byte take thirty times their room
        self._body_bytes += len(body)
        if self._body_bytes > self._rules.max_body_bytes:
            self._too_large()

    def _too_large(self) -> None:
        self.refusal = (413, self._rules.too_large_message)
        raise ValueError("body too large")

    def on_message_complete(self) -> None:
        exchange = self.receiving
        if exchange is None:
            return  # see `_without_offer`
        self.between = True
        self.invites = False
        self.receiving = None
        self.in_head = True
        self._fed_in_head = 0
        if exchange.incoming is None:
            if self._body:
                exchange.body = bytes(self._body)
                self._body = b""
            self.latest = exchange
            self._owner.received(exchange)
            return
        exchange.incoming.end()
        self._owner.body_received(exchange)
