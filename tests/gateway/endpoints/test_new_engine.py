"""A new engine is a file of its own and a row of the registry (decision 0022): one that speaks like no other."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.data_plane import Start
from tests.support.upstream import Asked, Caller
from tidemill.engines.kind import EngineKind
from tidemill.engines.openai import OpenAIEngine
from tidemill.engines.protocol import Ask, TokenCounts
from tidemill.engines.registry import ENGINES


class ToyEngine(OpenAIEngine):
    """Takes a prompt at a path of its own, with a key in a header of its own, and counts in words of its own."""

    kind = "toy"

    def auth_headers(self, key: str | None) -> Mapping[str, str]:
        return {"X-Toy": f"key={key}"}

    def path(self, ask: Ask) -> bytes:
        return b"/play"

    def headers(self, ask: Ask) -> bytes:
        return b"x-toy-turn: 1\r\n"

    def body(self, ask: Ask, *, model: str, output_cap: int) -> bytes:
        return json.dumps({"toy": model, "say": json.loads(bytes(ask.fields["messages"])), "most": output_cap}).encode()

    def usage(self, body: bytes) -> TokenCounts | None:
        heard, said = json.loads(body)["words"]
        return TokenCounts(heard, 0, said)

    def answer(self, ask: Ask, body: bytes) -> bytes:
        message = {"role": "assistant", "content": json.loads(body)["said"]}
        return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


async def test_a_new_engine_is_served_and_billed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "toy", EngineKind(name="toy", engine=lambda options: ToyEngine(owned=options.owned)))

    async def script(asked: Asked, caller: Caller) -> None:
        assert (
            asked.head.startswith(b"POST /v1/play ") and b"X-Toy: key=upstream-key\r\nx-toy-turn: 1\r\n" in asked.head
        )
        assert b"uthorization" not in asked.head
        assert asked.json == {"toy": "mock-upstream", "say": [{"role": "user", "content": "hi"}], "most": 9}
        await caller.whole({"said": "toot", "words": [3, 2]})

    plane, _ = await start(script, engine="toy")
    hi: Any = [{"role": "user", "content": "hi"}]
    answer = await plane.ask(messages=hi, max_tokens=9)
    assert answer.json["choices"][0]["message"]["content"] == "toot"
    record = await plane.record()
    assert (record.prompt, record.completion, record.estimated) == (3, 2, False)
