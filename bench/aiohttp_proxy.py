# mypy: disable-error-code="import-not-found"
"""The obvious Python proxy: aiohttp server, aiohttp client, bytes straight through. A peer in the benchmark.

python bench/aiohttp_proxy.py --port 9100 --upstream http://127.0.0.1:9000
"""

import argparse
import asyncio
from typing import Any

from aiohttp import ClientSession, TCPConnector, web

SESSION = web.AppKey("session", ClientSession)
HOP_HEADERS = {"host", "connection", "content-length", "transfer-encoding", "keep-alive"}


def make_app(upstream: str) -> web.Application:
    async def proxy(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_HEADERS}
        session = request.app[SESSION]
        async with session.request(request.method, upstream + request.path_qs, data=body, headers=headers) as answer:
            if answer.content_length is not None:
                kept = {"content-type": answer.headers.get("content-type", "application/json")}
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
            out = web.StreamResponse(status=answer.status, headers={"content-type": answer.content_type})
            await out.prepare(request)
            async for chunk in answer.content.iter_any():
                await out.write(chunk)
            await out.write_eof()
            return out

    async def session_life(app: web.Application) -> Any:
        app[SESSION] = ClientSession(connector=TCPConnector(limit=0), auto_decompress=False)
        yield
        await app[SESSION].close()

    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", proxy)
    app.cleanup_ctx.append(session_life)
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    args = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        loop = asyncio.new_event_loop()
    else:
        loop = uvloop.new_event_loop()
    web.run_app(
        make_app(args.upstream),
        host="127.0.0.1",
        port=args.port,
        loop=loop,
        access_log=None,
        print=None,
        backlog=4096,
    )


if __name__ == "__main__":
    main()
