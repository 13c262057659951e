"""Replica selection: the replica with the earliest expected first token.

That moment is told by work, in tokens of prefill: what is in flight at a replica, and what of the prompt its cache
does not hold. So a long prompt goes where its prefix is, a short one to the least loaded, and a crowd with one prefix
spreads as soon as waiting costs more than computing the prefix again; no threshold switches between the two rules.

Sources: Qin et al., "Mooncake", FAST'25, algorithm 1 (least TTFT = queue + prefill of what is not cached); NVIDIA
Dynamo's KV router (prefill blocks not cached + active decode blocks). Figures of a bench: docs/routing.md.
"""

from collections.abc import Sequence
from enum import IntEnum

import msgspec

_MASK = (1 << 64) - 1


class ReplicaHealth(IntEnum):
    """The health of a replica; lower values are preferred."""

    READY = 0
    FULL = 1
    """It works on as many requests as it can at a time; one more waits there for a whole answer to end."""
    AVOID = 2
    """It has just refused for being busy, or fails for most tenants. For when there is nothing better."""
    DOWN = 3
    """Not to be used: starting, unreachable, or gone."""


class ReplicaCandidate(msgspec.Struct, frozen=True, gc=False):
    """The state of one replica when a request comes. All counts in tokens."""

    health: ReplicaHealth = ReplicaHealth.READY
    cached: int = 0
    """Tokens of this prompt that its cache is expected to hold."""
    in_flight: int = 0
    """Work in flight there, see `RequestWork`."""
    held: int = 0
    """How much the index remembers of its cache, in any unit: of equal replicas, the emptier cache takes more in."""
    home: bool = False
    """It is the home of the request's session."""


class RoutingPolicy(msgspec.Struct, frozen=True, gc=False):
    """Weights of the routing decision."""

    decode_weight: int = 5
    """Tokens of prefill that cost a replica as much time as one token of an answer: DeepSeek's nodes did 73.7k of the
    one or 14.8k of the other a second (open-infra-index, day 6)."""
    expected_output: int = 256
    """Tokens that an answer is expected to have, where its limit does not say less."""
    load_weight: float = 0.5
    """How much work in flight counts against computing a prompt anew. At 1 a request would take what is best for
    itself alone; less keeps prefixes together, which serves those to come (bench/routing.py --sweep)."""
    session_tokens: int = 2048
    """A session stays at its home until that has this much more work before it than the best other replica."""


POLICY = RoutingPolicy()


class RequestWork(msgspec.Struct, frozen=True, gc=False):
    """The work that a request adds to a replica.

    `prefill` until its first token, `decode` until its end.
    """

    prefill: int
    decode: int


def work_of(
    prompt: int, cached: int, output_bound: int, choices: int = 1, policy: RoutingPolicy = POLICY
) -> RequestWork:
    """The work of a request with `prompt` tokens, `cached` of them cached.

    It produces at most `output_bound` a choice.
    """
    answer = min(output_bound, policy.expected_output) * choices
    return RequestWork(max(prompt - cached, 0), answer * policy.decode_weight)


def cost(view: ReplicaCandidate, prompt: int, policy: RoutingPolicy = POLICY) -> float:
    """The work before the first token of a request with `prompt` tokens on this replica."""
    own = prompt - min(view.cached, prompt)
    return own + policy.load_weight * view.in_flight - (policy.session_tokens if view.home else 0)


def choose(
    views: Sequence[ReplicaCandidate],
    prompt: int,
    *,
    worst: ReplicaHealth = ReplicaHealth.AVOID,
    policy: RoutingPolicy = POLICY,
) -> int | None:
    """The index of the replica to send a request with `prompt` tokens to.

    None when none stands at `worst` or better.

    A better standing goes first, then the least cost, then the emptier cache, then the earlier replica.
    """
    best: int | None = None
    best_rank: tuple[int, float, int] = (worst + 1, 0.0, 0)
    for index, view in enumerate(views):
        if view.health > worst or view.health > best_rank[0]:
            continue
        rank = (view.health, cost(view, prompt, policy), view.held)
        if rank < best_rank:
            best, best_rank = index, rank
    return best


def mixed(key: int, seat: int) -> int:
    """A 64-bit hash of two 64-bit numbers (the finisher of SplitMix64)."""
    value = (key ^ seat) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def home(session: int, seats: Sequence[int]) -> int:
    """The index of a session's home among the replicas with these `seats`.

    Seats are 64-bit numbers, fixed for each name.

    By rendezvous (Thaler and Ravishankar, 1998): every gateway process comes to the same home without asking the
    others, and a replica more or less moves only the sessions that it gains or had. `seats` must not be empty.
    """
    return max(range(len(seats)), key=lambda index: mixed(session, seats[index]))


def arm(key: int, split: Sequence[tuple[str, float]]) -> str | None:
    """The arm of a weighted split that `key` (64 bits, evenly spread) falls to; None for the model itself.

    `split` gives names with their percentages, at most 100 together. The same key always gets the same arm, and
    raising the last arm's share moves nobody who is in an arm already.
    """
    point = ((key & _MASK) >> 11) / 2**53 * 100.0  # 53 bits, all that a float holds: never quite 100
    edge = 0.0
    for name, percent in split:
        edge += percent
        if point < edge:
            return name
    return None
