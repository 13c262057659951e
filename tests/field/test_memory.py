"""Memory under many long streams, with the code of `make soak`, which does the same for five minutes.

Peers: a gateway grows to 20 to 40 GiB (BerriAI/litellm 38193, 27954), or keeps whole streamed outputs to count them
(QuantumNous/new-api 6731).
"""

import asyncio
import gc
import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.support.data_plane import Start, start
from tests.support.paths import ROOT
from tests.support.upstream import DONE, LAST_CHUNK, STREAM_HEAD, Asked, Caller, finish, role, usage, word

__all__ = ["start"]

SOAK = ROOT / "bench" / "soak.py"
STREAMS = 400
SECONDS = 12.0
BYTES_PER_STREAM = 10 * 1024
"""Growth after the warm-up. Meanwhile a stream carries 28 KB of text."""


@pytest.mark.slow
def test_memory_stays_flat_over_long_streams() -> None:
    """litellm 38193, 27954, new-api 6731: four hundred streams open at once, of which half never end and the others
    are replaced as they end. Each comes whole, and after the warm-up the gateway keeps nothing of what has passed."""
    command = [sys.executable, str(SOAK), "--json", "--seconds", str(SECONDS), "--streams", str(STREAMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == {} and found["ended"] > STREAMS / 2
    assert min(sample["open"] for sample in found["samples"]) > 0.95 * STREAMS
    assert found["gateway_mib"]["bytes_per_stream"] < BYTES_PER_STREAM, found


async def test_what_has_ended_leaves_nothing_for_the_collector(start: Start) -> None:
    """litellm 38193, 27954: objects in a ring live until the collector looks at them, and at old ones, such as those of
    a long stream, it looks after millions of others. So neither a connection nor a request may leave such a ring,
    however it ends."""

    async def script(asked: Asked, caller: Caller) -> None:
        await caller.send(STREAM_HEAD)
        await caller.chunk(role() + word("a"))
        how = asked.json["messages"][0]["content"]
        if how == "engine dies":
            caller.reset()
        elif how == "client leaves":
            await caller.hangs_up()
        else:
            for each in (word("b"), finish(), usage(10, 2), DONE):
                await caller.chunk(each)
            await caller.send(LAST_CHUNK)
            if how == "engine hangs up":
                caller.close()

    plane, _ = await start(script, owned=True)

    async def one(how: str) -> None:
        line = await plane.line()
        await line.send(plane.request(stream=True, messages=[{"role": "user", "content": how}]))
        if how == "client leaves":
            await line.reader.readuntil(b'"a"')
            line.reset()
        else:
            assert (await line.answer()).status == 200
            line.close()

    async def all_ways() -> None:
        for how in ("ends", "engine hangs up", "engine dies", "client leaves"):
            for _ in range(10):
                await one(how)
        await plane.settled()
        for _ in range(5):
            await asyncio.sleep(0.01)

    await all_ways()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        await all_ways()
        left = alive() - before
    finally:
        gc.enable()
    found = {name: count for name, count in left.items() if count >= 10}
    assert not found, str(found)


def alive() -> "Counter[str]":
    """How many objects of the gateway's own types, and of its parsers, there are."""
    names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    return Counter(name for name in names if name.startswith(("tidemill.", "httptools.")))
