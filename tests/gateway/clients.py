"""The official clients, set on a data plane of the test's own."""

import ssl

import anthropic as anthropic_sdk
import openai as openai_sdk
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.support.plane import Plane

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Each client would read the certificates of the whole world, which takes longer than most of these tests."""


def anthropic(plane: Plane, key: str | None = None) -> AsyncAnthropic:
    client = anthropic_sdk.DefaultAsyncHttpxClient(verify=NO_TLS)
    url = f"http://127.0.0.1:{plane.port}"
    return AsyncAnthropic(api_key=key or plane.key, base_url=url, max_retries=0, http_client=client)


def openai(plane: Plane, key: str | None = None) -> AsyncOpenAI:
    client = openai_sdk.DefaultAsyncHttpxClient(verify=NO_TLS)
    url = f"http://127.0.0.1:{plane.port}/v1"
    return AsyncOpenAI(api_key=key or plane.key, base_url=url, max_retries=0, http_client=client)
