"""The official clients, set on a data plane of the test's own."""

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.support.plane import Plane


def anthropic(plane: Plane, key: str | None = None) -> AsyncAnthropic:
    return AsyncAnthropic(api_key=key or plane.key, base_url=f"http://127.0.0.1:{plane.port}", max_retries=0)


def openai(plane: Plane, key: str | None = None) -> AsyncOpenAI:
    return AsyncOpenAI(api_key=key or plane.key, base_url=f"http://127.0.0.1:{plane.port}/v1", max_retries=0)
