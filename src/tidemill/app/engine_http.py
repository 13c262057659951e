"""Small questions to engines, by the gateway's own client: is it well, what has it counted."""

import asyncio
from collections.abc import Mapping

from tidemill.http.client import ConnectionPool, EngineAddress, EngineLost

Headers = Mapping[str, str]
"""Beyond those of every request, such as the one with the API key."""

PAGE_BYTES = 4 * 1024 * 1024
"""A page that is longer is not read."""


async def get(base_url: str, path: bytes, timeout_s: float, headers: Headers | None = None) -> bytes | None:
    """GET a small page from an engine; None when it does not answer with 200 in time."""
    answer = await fetch(base_url, path, timeout_s, headers)
    return answer[1] if answer is not None and answer[0] == 200 else None


async def status_of(base_url: str, path: bytes, timeout_s: float, headers: Headers) -> int | None:
    """The status that an engine answers a GET with; None when it does not answer in time."""
    answer = await fetch(base_url, path, timeout_s, headers)
    return answer[0] if answer is not None else None


async def post(base_url: str, path: bytes, timeout_s: float) -> bool:
    """Tell an engine of one's own something; whether it says 200 in time."""
    answer = await fetch(base_url, path, timeout_s, None, method=b"POST", body=b"{}")
    return answer is not None and answer[0] == 200


async def fetch(
    base_url: str, path: bytes, timeout_s: float, headers: Headers | None, *, method: bytes = b"GET", body: bytes = b""
) -> tuple[int, bytes] | None:
    """Ask for a small page: status and body; None when it does not come in time."""
    pool = ConnectionPool(EngineAddress(base_url, headers), asyncio.get_running_loop())
    try:
        async with asyncio.timeout(timeout_s):
            connection = await pool.request(path, body, timeout_s, method=method)
            try:
                return connection.status, await connection.body(PAGE_BYTES)
            finally:
                connection.abort()
    except (EngineLost, TimeoutError):
        return None
