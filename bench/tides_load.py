"""Load for `bench/tides.py`: requests made after recorded traces, and streams timed token by token."""

import asyncio
import csv
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

TRACES = Path(__file__).parents[2] / "shared" / "traces"
AZURE = TRACES / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv"
VIDUR = TRACES / "vidur" / "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
WORDS = "tide mill flood gate wheel stone grain night moon river bank water turn slow rise fall work rest".split()


class Ask(NamedTuple):
    """A request that is to be made."""

    at_s: float
    prompt: int
    output: int
    text: str


class Timing(NamedTuple):
    """How one was answered. Times in seconds of one clock."""

    sent_at: float
    ttft_s: float
    tpot_s: float | None
    prompt: int
    output: int


def flood(seconds: float, *, rate: float, shrink: float, seed: int, path: Path = AZURE) -> list[Ask]:
    """Arrivals of the Azure trace, its time scaled to `rate` requests a second and its lengths divided by `shrink`.

    A stretch of the trace that begins at a place which the seed gives, so its bursts are the recorded ones.
    """
    with path.open() as file:
        rows = [
            (_instant(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    chance = random.Random(seed)
    first = chance.randrange(len(rows) // 2)
    recorded = len(rows) / (rows[-1][0] - rows[0][0])
    begin = rows[first][0]
    asks = []
    for at, prompt, output in rows[first:]:
        at_s = (at - begin) * recorded / rate
        if at_s > seconds:
            break
        size = max(round(prompt / shrink), 4)
        asks.append(Ask(at_s, size, max(round(output / shrink), 2), _text(chance, size)))
    return asks


def summaries(count: int, *, shrink: float, seed: int, path: Path = VIDUR) -> list[Ask]:
    """Lines of a batch with the lengths of summarisation requests."""
    with path.open() as file:
        rows = [
            (int(float(row["num_prefill_tokens"])), int(float(row["num_decode_tokens"])))
            for row in csv.DictReader(file)
        ]
    chance = random.Random(seed)
    asks = []
    for _ in range(count):
        prompt, output = chance.choice(rows)
        size = max(round(prompt / shrink), 8)
        asks.append(Ask(0.0, size, max(round(output / shrink), 2), _text(chance, size)))
    return asks


def body_of(ask: Ask, model: str, *, stream: bool) -> dict[str, object]:
    """The request, made so that the answer has just the length that is wanted."""
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": ask.text}],
        "max_tokens": ask.output,
        "ignore_eos": True,
        "temperature": 0,
    }
    return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body


class Client:
    """Streams from the data plane at `port`, each on a connection of its own."""

    def __init__(self, port: int, key: str, model: str) -> None:
        self._port = port
        self._key = key
        self._model = model
        self.failures: list[str] = []

    async def ask(self, ask: Ask) -> Timing | None:
        """One streamed request; None when it failed, which `failures` then says."""
        body = json.dumps(body_of(ask, self._model, stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self._key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        sent_at = time.perf_counter()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            try:
                writer.write(head.encode() + body)
                return await self._read(reader, sent_at)
            finally:
                writer.close()
        except (OSError, ValueError) as error:
            self.failures.append(str(error))
            return None

    async def _read(self, reader: asyncio.StreamReader, sent_at: float) -> Timing | None:
        status = await reader.readline()
        if b" 200 " not in status:
            self.failures.append(
                f"{status.decode(errors='replace').strip()}: {(await reader.read(500)).decode(errors='replace')}"
            )
            return None
        first_at = last_at = 0.0
        usage: dict[str, int] = {}
        done = False
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            event = json.loads(line[6:])
            if any(choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
                last_at = time.perf_counter()
                first_at = first_at or last_at
            usage = event.get("usage") or usage
        if not done or not first_at:
            self.failures.append("the stream broke off")
            return None
        output = usage.get("completion_tokens", 0)
        tpot_s = (last_at - first_at) / (output - 1) if output > 1 else None
        return Timing(sent_at, first_at - sent_at, tpot_s, usage.get("prompt_tokens", 0), output)


async def send_flood(asks: Sequence[Ask], ask: Callable[[Ask], Awaitable[Timing | None]]) -> list[Timing]:
    """Send each at its time, whatever the others do; gives how they were answered."""
    began = time.perf_counter()
    tasks = []
    for each in asks:
        await asyncio.sleep(max(began + each.at_s - time.perf_counter(), 0.0))
        tasks.append(asyncio.ensure_future(ask(each)))
    return [timing for timing in await asyncio.gather(*tasks) if timing is not None]


async def send_always(
    asks: Sequence[Ask], ask: Callable[[Ask], Awaitable[Timing | None]], at_a_time: int
) -> list[Timing]:
    """Keep so many in flight until cancelled; the list grows meanwhile."""
    answered: list[Timing] = []
    waiting = iter(asks)

    async def one() -> None:
        for each in waiting:
            timing = await ask(each)
            if timing is not None:
                answered.append(timing)

    workers = [asyncio.create_task(one()) for _ in range(at_a_time)]
    try:
        await asyncio.gather(*workers)
    except asyncio.CancelledError:
        for worker in workers:
            worker.cancel()
    return answered


def _instant(text: str) -> float:
    return datetime.fromisoformat(text[:26]).timestamp()


def _text(chance: random.Random, tokens: int) -> str:
    """About so many tokens; the beginnings differ, so that no cache answers."""
    head = f"{chance.randrange(10**6)} "
    return head + " ".join(chance.choice(WORDS) for _ in range(max(tokens - 12, 1)))
