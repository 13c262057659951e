"""A mock OpenAI-compatible engine, as cheap as Python gets: asyncio protocols, httptools, uvloop.

    python bench/mock_engine.py --port 9000 [--chunks 16] [--ttft-ms 0] [--chunk-interval-ms 0] [--cached 0]

Serves /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /health and /metrics (vLLM's names, true
counts of what was written). How a request is answered, it may choose: see `mock_answers.Behaviour`.
`POST /mock` changes the defaults of the running mock, `GET /mock/last` shows the last completion
request as it arrived.
"""

import argparse
import asyncio
import itertools
import signal
from collections import deque
from typing import NamedTuple, cast

import httptools
import msgspec
import uvloop

from mock_answers import Behaviour, Plan, Planner, decode_behaviour, embeddings, error_json
from mock_streams import Clock, Counters, Stream

LISTEN_BACKLOG = 4096
JSON = b"application/json"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
REASONS = {200: b"OK", 400: b"Bad Request", 404: b"Not Found", 429: b"Too Many Requests"}


class Request(NamedTuple):
    method: bytes
    path: bytes
    headers: list[tuple[bytes, bytes]]  # names in lower case
    body: bytes
    keep_alive: bool


class Engine:
    """What all connections share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, defaults: Behaviour, batch: int) -> None:
        self.loop = loop
        self.clock = Clock(loop, batch)
        self.planner = Planner(defaults)
        self.counters = Counters()
        self.last: Request | None = None
        self.asleep = False
        """As vLLM's sleep mode: it answers, but has nothing to answer with."""
        self.wakes = True
        self._numbers = itertools.count(1)

    def next_ident(self) -> bytes:
        return b"%016x" % next(self._numbers)

    def plain(self, request: Request) -> tuple[int, bytes, bytes]:
        """Status, content type and body for everything that isn't a completion."""
        match request.method, request.path:
            case b"GET", b"/health" | b"/healthz":
                return 200, b"text/plain", b""
            case b"GET", b"/metrics":
                return 200, b"text/plain; version=0.0.4", self.counters.text()
            case b"GET", b"/v1/models":
                return (
                    200,
                    JSON,
                    b'{"object":"list","data":[{"id":"mock","object":"model","owned_by":"mock"}]}',
                )
            case b"POST", b"/mock":
                try:
                    self.planner.set_defaults(decode_behaviour(request.body))
                except msgspec.DecodeError as wrong:
                    return 400, JSON, error_json(str(wrong), 400)
                return 200, JSON, msgspec.json.encode(self.planner.defaults)
            case b"POST", b"/v1/embeddings":
                try:
                    answer, tokens = embeddings(request.body)
                except msgspec.DecodeError as wrong:
                    return 400, JSON, error_json(str(wrong), 400)
                self.counters.requests += 1
                self.counters.prompt_tokens += tokens
                return 200, JSON, answer
            case b"POST", b"/sleep":
                self.asleep = True
                return 200, JSON, b""
            case b"POST", b"/wake_up":
                self.asleep = self.asleep and not self.wakes
                return (500 if self.asleep else 200), JSON, b""
            case b"POST", b"/mock/wakes-no-more":
                self.wakes = False
                return 200, JSON, b""
            case b"GET", b"/mock/last":
                return 200, JSON, self._last_json()
        return 404, JSON, error_json("the mock engine has no such page", 404)

    def _last_json(self) -> bytes:
        if self.last is None:
            return b"null"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.last.headers}
        path, body = self.last.path.decode("latin-1"), self.last.body.decode("utf-8", "replace")
        return msgspec.json.encode({"path": path, "headers": headers, "body": body})


class Connection(asyncio.Protocol):
    """One client's connection: HTTP/1.1, keep-alive, pipelined requests answered in turn."""

    def __init__(self, engine: Engine) -> None:
        self.paused = False
        self._engine = engine
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._waiting: deque[Request] = deque()
        self._answering = False
        self._keep_alive = True
        self._chunked = True
        self._stream: Stream | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._split = False
        self._slow: deque[int | str] = deque()  # bytes that leave one by one, then "cut" or "close"

    # asyncio calls these
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._keep_alive = False
            self._answer(400, JSON, error_json("this is not HTTP", 400))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._stream is not None:
            self._stream.resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._waiting.clear()
        self._slow.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._stream is not None:
            self._stream.over = True
        if self._answering:
            self._engine.counters.aborted += 1
            self._over("abort")

    # httptools calls these
    def on_url(self, url: bytes) -> None:
        self._url = url
        self._headers = []
        self._body = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if (b"expect", b"100-continue") in self._headers and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        path = self._url.partition(b"?")[0]
        parser = self._parser
        request = Request(parser.get_method(), path, self._headers, body, parser.should_keep_alive())
        if self._answering:
            self._waiting.append(request)
        else:
            self._handle(request)

    # the way of a request
    def _handle(self, request: Request) -> None:
        self._keep_alive = request.keep_alive
        if request.path == b"/v1/chat/completions" and request.method == b"POST":
            self._complete(request, chat=True)
        elif request.path == b"/v1/completions" and request.method == b"POST":
            self._complete(request, chat=False)
        else:
            self._answer(*self._engine.plain(request))

    def _complete(self, request: Request, chat: bool) -> None:
        engine = self._engine
        if engine.asleep:
            self._answer(500, JSON, error_json("the mock engine sleeps", 500))
            return
        engine.last = request
        engine.counters.requests += 1
        wish = b""
        for name, value in request.headers:
            if name == b"x-mock":
                wish = value
        try:
            plan = engine.planner.plan(chat, request.body, wish)
        except msgspec.DecodeError as wrong:
            self._answer(400, JSON, error_json(str(wrong), 400))
            return
        how = plan.behaviour
        self._answering = True
        engine.counters.running += 1
        if how.hang:
            return
        if how.die_after == -1:
            self.cut()
            return
        self._split = bool(how.split_bytes)
        if plan.status != 200:
            extra = b"retry-after: %d\r\n" % how.retry_after if how.retry_after is not None else b""
            self._answer(plan.status, JSON, plan.error, extra, "error")
        elif plan.stream:
            self._begin_stream(plan)
        else:
            delay_ms = (how.ttft_ms or 0) + (how.interval_ms or 0) * plan.completion_tokens
            if delay_ms:
                self._timer = engine.loop.call_later(delay_ms / 1000, self._whole, plan)
            else:
                self._whole(plan)

    def _begin_stream(self, plan: Plan) -> None:
        engine, how = self._engine, plan.behaviour
        self._chunked = not how.close
        if how.close:
            self._keep_alive = False
            self.write(STREAM_HEAD + b"connection: close\r\n\r\n")
        else:
            self.write(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        self._stream = Stream(self, engine.clock, engine.counters, plan, engine.next_ident())
        if how.ttft_ms:
            self._timer = engine.loop.call_later(how.ttft_ms / 1000, self._stream.start)
        else:
            self._stream.start()

    def _whole(self, plan: Plan) -> None:
        how, counters = plan.behaviour, self._engine.counters
        if how.hang_after is not None:
            return
        if how.error_after is not None:
            self._answer(500, JSON, plan.error, b"", "error")
            return
        counters.prompt_tokens += plan.prompt_tokens
        counters.cached_tokens += plan.cached_tokens
        counters.generation_tokens += plan.stops_after * plan.choices
        body = self._engine.next_ident().join(plan.opening)
        if how.die_after is not None:
            self.write(_head(200, JSON, len(body), b"") + body[: len(body) // 2])
            self.cut()
            return
        self._answer(200, JSON, body, b"", plan.finish_reason)

    def _answer(self, status: int, kind: bytes, body: bytes, extra: bytes = b"", reason: str = "") -> None:
        if not self._keep_alive:
            extra += b"connection: close\r\n"
        self.write(_head(status, kind, len(body), extra) + body)
        self._over(reason)

    def _over(self, reason: str) -> None:
        """The answer is written (or lost); the next pipelined request may come."""
        if self._answering:
            self._answering = False
            self._engine.counters.running -= 1
            self._engine.counters.finished[reason] += 1
        self._stream = None
        self._timer = None
        if self._transport is None:
            return
        if not self._keep_alive:
            self._shut("close")
        elif self._waiting:
            self._engine.loop.call_soon(self._next)

    def _next(self) -> None:
        if self._waiting and not self._answering:
            self._handle(self._waiting.popleft())

    # what a Stream calls
    def framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def write(self, data: bytes) -> None:
        if self._split:
            if not self._slow:
                self._engine.loop.call_soon(self._write_one)
            self._slow.extend(data)
        elif self._transport is not None:
            self._transport.write(data)

    def end(self, data: bytes, reason: str) -> None:
        """The last bytes of a stream."""
        last = self.framed(data) if data else b""
        self.write(last + b"0\r\n\r\n" if self._chunked else last)
        self._over(reason)

    def cut(self) -> None:
        """Breaks the connection as a dying engine does, after the bytes already written."""
        if self._answering:
            self._answering = False
            self._engine.counters.running -= 1
            self._engine.counters.finished["error"] += 1
        self._shut("cut")

    def _shut(self, how: str) -> None:
        if self._slow:
            self._slow.append(how)
        elif self._transport is not None:
            self._transport.close()

    def _write_one(self) -> None:
        if not self._slow or self._transport is None:
            return
        item = self._slow.popleft()
        if isinstance(item, str):
            self._transport.close()
            return
        self._transport.write(b"%c" % item)
        if self._slow:
            self._engine.loop.call_soon(self._write_one)


def _head(status: int, kind: bytes, length: int, extra: bytes) -> bytes:
    reason = REASONS.get(status, b"Error")
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n" % (
        status,
        reason,
        kind,
        length,
        extra,
    )


async def serve(host: str, port: int, defaults: Behaviour, batch: int) -> None:
    """Serves until SIGTERM or SIGINT; prints the address (port 0 chooses a free one)."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = Engine(loop, defaults, batch)
    server = await loop.create_server(lambda: Connection(engine), host, port, backlog=LISTEN_BACKLOG)
    bound = server.sockets[0].getsockname()
    print(f"mock engine on http://{bound[0]}:{bound[1]}", flush=True)
    await stop.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="a mock OpenAI-compatible engine")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000, help="0 chooses a free one, which is printed")
    parser.add_argument("--chunks", type=int, default=16, help="tokens when the request sets no limit")
    parser.add_argument("--ttft-ms", type=float, default=0.0)
    parser.add_argument("--chunk-interval-ms", type=float, default=0.0)
    parser.add_argument("--cached", type=int, default=0, help="prompt tokens to report as cache hits")
    parser.add_argument("--token", help="the text of each token")
    parser.add_argument("--batch", type=int, default=64, help="streams whose tokens come in one step")
    args = parser.parse_args()
    defaults = Behaviour(
        chunks=args.chunks,
        ttft_ms=args.ttft_ms,
        interval_ms=args.chunk_interval_ms,
        cached=args.cached,
        token=args.token,
    )
    uvloop.run(serve(args.host, args.port, defaults, args.batch))


if __name__ == "__main__":
    main()
