"""Does it pay to send a request where its prefix is? Three policies on a recorded trace, over simulated replicas.

    .venv/bin/python bench/routing.py [--trace conversation_trace.jsonl] [--replicas 8] [--cache-tokens 600000]

The trace is Mooncake's (Qin et al., FAST'25; kvcache-ai/Mooncake, FAST25-release/traces): arrivals, lengths, and
hashes of 512-token blocks. A simulated replica prefills one prompt after the other at a fixed rate, decodes beside
it at a fixed pace, and keeps the least recently used blocks of what it has computed up to its capacity. The router
sees none of that: it decides by `tidemill.tides.routing` from what it has sent, as the gateway does.
"""

import argparse
import heapq
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tidemill.gateway.routing.prefix_index import PrefixIndex
from tidemill.tides.routing import POLICY, ReplicaCandidate, RoutingPolicy, choose, work_of

BLOCK_TOKENS = 512
TRACE = Path(__file__).parents[2] / "shared" / "traces" / "mooncake" / "conversation_trace.jsonl"


class Request(NamedTuple):
    at_s: float
    prompt: int
    output: int
    blocks: tuple[int, ...]


class Known:
    """What one gateway process knows of one replica: what it has sent there itself."""

    def __init__(self, index_blocks: int) -> None:
        self.in_flight = 0
        self.index = PrefixIndex(index_blocks)


class Replica:
    """A simulated engine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._capacity = args.cache_tokens // BLOCK_TOKENS
        self._prefill_rate = args.prefill_rate
        self._tpot_s = args.tpot_ms / 1000
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._free_at_s = 0.0

    def serve(self, request: Request) -> tuple[int, float, float]:
        """Cached tokens, and the moments of the first and the last token."""
        hit = 0
        for block in request.blocks:
            if block not in self._cache:
                break
            hit += 1
        for block in reversed(request.blocks):  # the beginning is used last, so that it outlives the end
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        cached = min(hit * BLOCK_TOKENS, request.prompt)
        self._free_at_s = max(self._free_at_s, request.at_s) + (request.prompt - cached) / self._prefill_rate
        return cached, self._free_at_s, self._free_at_s + request.output * self._tpot_s


Choose = Callable[[list[Known], Request], int]


def prefix_aware(policy: RoutingPolicy) -> Choose:
    def pick(replicas: list[Known], request: Request) -> int:
        views = [
            ReplicaCandidate(
                cached=replica.index.match(request.blocks) * BLOCK_TOKENS,
                in_flight=replica.in_flight,
                held=len(replica.index),
            )
            for replica in replicas
        ]
        chosen = choose(views, request.prompt, policy=policy)
        assert chosen is not None
        return chosen

    return pick


def least_loaded(replicas: list[Known], request: Request) -> int:
    chosen = choose([ReplicaCandidate(in_flight=replica.in_flight) for replica in replicas], request.prompt)
    assert chosen is not None
    return chosen


def at_random(seed: int) -> Choose:
    chance = random.Random(seed)
    return lambda replicas, request: chance.randrange(len(replicas))


class Contestant(NamedTuple):
    pick: Choose
    policy: RoutingPolicy = POLICY


class Outcome(NamedTuple):
    hit_rate: float
    ttft_mean_s: float
    ttft_p95_s: float
    busiest: float  # the most tokens computed by one replica, by the mean
    decide_us: float


def simulate(requests: list[Request], contestant: Contestant, args: argparse.Namespace) -> Outcome:
    replicas = [Replica(args) for _ in range(args.replicas)]
    gateways = [[Known(2 * args.cache_tokens // BLOCK_TOKENS) for _ in replicas] for _ in range(args.processes)]
    chance = random.Random(2)
    pending: list[tuple[float, int, int, int]] = []  # when, gateway, replica, work that is then done
    computed = [0] * len(replicas)
    prompt = cached = 0
    ttft = []
    spent = 0.0
    for request in requests:
        while pending and pending[0][0] <= request.at_s:
            _, gateway, at, done = heapq.heappop(pending)
            gateways[gateway][at].in_flight -= done
        gateway = chance.randrange(args.processes)
        began = time.perf_counter()
        chosen = contestant.pick(gateways[gateway], request)
        spent += time.perf_counter() - began
        known = gateways[gateway][chosen]
        expected = known.index.match(request.blocks) * BLOCK_TOKENS
        # The router knows the limit of an answer, not the length to come.
        work = work_of(request.prompt, expected, 4096, policy=contestant.policy)
        known.index.note(request.blocks)
        known.in_flight += work.prefill + work.decode
        hit, first_s, last_s = replicas[chosen].serve(request)
        heapq.heappush(pending, (first_s, gateway, chosen, work.prefill))
        heapq.heappush(pending, (last_s, gateway, chosen, work.decode))
        prompt += request.prompt
        cached += hit
        computed[chosen] += request.prompt - hit
        ttft.append(first_s - request.at_s)
    ttft.sort()
    return Outcome(
        hit_rate=cached / prompt,
        ttft_mean_s=sum(ttft) / len(ttft),
        ttft_p95_s=ttft[int(0.95 * len(ttft))],
        busiest=max(computed) / (sum(computed) / len(computed)),
        decide_us=spent / len(requests) * 1e6,
    )


def load(path: Path, speed: float) -> list[Request]:
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [
        Request(row["timestamp"] / 1000 / speed, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--cache-tokens", type=int, default=600_000, help="KV cache of a replica")
    parser.add_argument("--prefill-rate", type=float, default=8_000, help="tokens a second of a replica")
    parser.add_argument("--tpot-ms", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=1, help="gateway processes, none of which knows the others")
    parser.add_argument("--speed", type=float, default=1.0, help="arrivals, times as fast as recorded")
    parser.add_argument("--sweep", action="store_true", help="other weights of the policy too")
    args = parser.parse_args()
    if not args.trace.is_file():
        parser.error(f"{args.trace} is not there; get it from kvcache-ai/Mooncake, FAST25-release/traces")

    requests = load(args.trace, args.speed)
    contestants = {
        "random": Contestant(at_random(1)),
        "least loaded": Contestant(least_loaded),
        "prefix-aware": Contestant(prefix_aware(POLICY)),
    }
    if args.sweep:
        others = [RoutingPolicy(load_weight=weight) for weight in (0.25, 0.5, 1.0, 2.0)]
        others += [RoutingPolicy(decode_weight=weight) for weight in (0, 1, 20)]
        for policy in others:
            name = f"  load {policy.load_weight}, decode {policy.decode_weight}"
            contestants[name] = Contestant(prefix_aware(policy), policy)
    tokens = sum(request.prompt for request in requests)
    span = requests[-1].at_s - requests[0].at_s
    endless = argparse.Namespace(replicas=1, cache_tokens=10**12, prefill_rate=1e12, tpot_ms=0.0, processes=1)
    ideal = simulate(requests, Contestant(lambda replicas, request: 0), endless)
    print(
        f"{len(requests):,} requests, {tokens / 1e6:,.1f} M prompt tokens in {span:,.0f} s; {args.replicas} replicas,"
    )
    print(f"{args.cache_tokens:,} tokens of cache and {args.prefill_rate:,.0f} tokens/s of prefill each")
    print(f"{'':22}{'hit rate':>10}{'TTFT mean':>12}{'p95':>10}{'busiest':>10}{'decision':>12}")
    for name, contestant in contestants.items():
        out = simulate(requests, contestant, args)
        print(
            f"{name:22}{out.hit_rate:>10.1%}{out.ttft_mean_s:>10.2f} s{out.ttft_p95_s:>8.2f} s"
            f"{out.busiest:>9.2f}x{out.decide_us:>9.1f} us"
        )
    print(f"{'one endless cache':22}{ideal.hit_rate:>10.1%}")


if __name__ == "__main__":
    main()
