"""A client with bare hands: bytes onto a socket, answers off it, and every way to leave."""

import asyncio
import json
import socket
import struct
from typing import Any

import msgspec


class Answer(msgspec.Struct):
    """One HTTP answer, its chunks put together."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must be in OpenAI's shape and say something."""
        assert list(self.json) == ["error"], self.body
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and len(error["message"]) > 10, error
        assert error["type"], error
        return error

    @property
    def events(self) -> list[str]:
        """The payloads of an event stream."""
        return [block.removeprefix("data: ") for block in self.body.decode().split("\n\n") if block]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The decoded events before `[DONE]`, which must be there and last."""
        *events, done = self.events
        assert done == "[DONE]", self.events[-3:]
        return [json.loads(event) for event in events]

    @property
    def text(self) -> str:
        """What the stream says."""
        return "".join(
            choice["delta"].get("content") or "" for chunk in self.chunks for choice in chunk.get("choices", ())
        )


class Line:
    """An open connection to a server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, *, receive_buffer: int | None = None) -> "Line":
        """Connect. A small `receive_buffer` (bytes) makes a reader that does not read felt soon."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        # A small limit: what the test does not ask for stays in the kernel.
        return cls(*await asyncio.open_connection(sock=sock, limit=64 * 1024))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, *, within_s: float = 60.0, head_only: bool = False) -> Answer:
        """The next whole answer; interim ones (1xx) are passed over."""
        async with asyncio.timeout(within_s):
            while True:
                status, headers = await self.head()
                if status >= 200:
                    break
            if head_only:
                return Answer(status, headers, b"")
            if headers.get("transfer-encoding") == "chunked":
                return Answer(status, headers, b"".join([piece async for piece in self.pieces()]))
            if "content-length" in headers:
                return Answer(status, headers, await self.reader.readexactly(int(headers["content-length"])))
            return Answer(status, headers, await self.reader.read())

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        return int(status), headers

    async def pieces(self) -> "Any":
        """The chunks of a chunked body, as they come."""
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
            assert data.endswith(b"\r\n")
            if size == 0:
                return
            yield data[:-2]

    async def ended(self, within_s: float = 60.0) -> bytes:
        """Wait until the server closes; gives what came before that."""
        async with asyncio.timeout(within_s):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    def close(self) -> None:
        """Leave as a client does: with a FIN."""
        self.writer.close()

    def reset(self) -> None:
        """Leave as a killed client does: with a RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def post(path: str, body: bytes | dict[str, Any], key: str | None = None, headers: bytes = b"") -> bytes:
    """A POST request, whole."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    authorization = b"authorization: Bearer %b\r\n" % key.encode() if key is not None else b""
    return b"POST %b HTTP/1.1\r\nhost: test\r\n%b%bcontent-length: %d\r\n\r\n%b" % (
        path.encode(),
        authorization,
        headers,
        len(data),
        data,
    )


def get(path: str, key: str | None = None) -> bytes:
    """A GET request."""
    authorization = f"authorization: Bearer {key}\r\n" if key is not None else ""
    return f"GET {path} HTTP/1.1\r\nhost: test\r\n{authorization}\r\n".encode()
