"""Replicas of a model: address, health and load."""

import asyncio
import hashlib
import time

import msgspec

from tidemill.gateway.routing.circuit_breaker import CircuitBreaker
from tidemill.gateway.routing.prefix_index import Keys, PrefixIndex
from tidemill.gateway.routing.shared_state import MAX_REPLICAS, SharedReplicaState
from tidemill.http.client import ConnectionPool, EngineAddress
from tidemill.ledger.costing import BusyTimeShares, Ticket
from tidemill.tides.routing import ReplicaHealth, work_of


class ReplicaSpec(msgspec.Struct, frozen=True):
    """One replica, as the supervisor announces it."""

    name: str
    base_url: str
    ready: bool
    incarnation: str = msgspec.field(default="", name="life")
    """Changes each time the engine is started anew; it names the engine's own counters (see meter.reconcile)."""
    batch_only: bool = False
    """Lent to batches: only their lines go there."""


def spread_key(text: bytes) -> int:
    """A 64-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class RoutedReplica:
    """A replica in use: its connections, its health, and how its time is shared among requests."""

    def __init__(self, spec: ReplicaSpec, address: EngineAddress, loop: asyncio.AbstractEventLoop) -> None:
        self._spec = spec
        self.pool = ConnectionPool(address, loop)
        self.clock = BusyTimeShares()
        self.breaker = CircuitBreaker()
        self.prefix = PrefixIndex()
        self.seat = spread_key(spec.name.encode())
        """Its place in `tides.routing.home`; it outlives restarts."""
        self.in_flight = 0
        """Work in flight from this gateway process, in tokens of prefill."""
        self.filler = 0
        """Lines of batches in flight from here."""
        self.done = 0
        """Work that has ended here since the last report, in tokens of prefill."""
        self.label = f"{spec.name}#{spec.incarnation}" if spec.incarnation else spec.name
        """The name that usage records carry: the replica and its incarnation."""
        self.board_id = spread_key(self.label.encode())
        self._board: SharedReplicaState | None = None
        self._row = 0

    def share(self, board: SharedReplicaState | None, row: int) -> None:
        """Share this replica's load with the machine's other gateway processes, in a row of shared memory."""
        self._board = board if row < MAX_REPLICAS else None
        self._row = row
        self._tell_load()

    def add_work(self, tokens: int) -> None:
        """Add to the work in flight from this process; negative work is subtracted."""
        self.in_flight += tokens
        if self._board is not None:
            self._tell_load()

    def _tell_load(self) -> None:
        if self._board is not None:
            self._board.tell_load(self._row, self.board_id, self.in_flight, self.clock.active)

    def note(self, keys: Keys) -> None:
        """Note a prompt with these keys, sent to this replica."""
        self.prefix.note(keys)
        if self._board is not None:
            self._board.tell_prompt(self.board_id, keys)

    def load(self) -> tuple[int, int]:
        """The work and requests in flight at the replica, of all gateway processes of this machine."""
        if self._board is None:
            return self.in_flight, self.clock.active
        work, active = self._board.others_load(self._row, self.board_id)
        return self.in_flight + work, self.clock.active + active

    @property
    def spec(self) -> ReplicaSpec:
        return self._spec

    @spec.setter
    def spec(self, spec: ReplicaSpec) -> None:
        """The supervisor's word; a probe of its that got through ends the wait of a breaker that is open."""
        if spec.ready and not self._spec.ready:
            self.breaker.reached()
        self._spec = spec

    def health(self, now: float, slots: int | None, active: int = 0) -> ReplicaHealth:
        """The replica's health now; `active` of its `slots` concurrent requests are in use."""
        if not self._spec.ready:
            return ReplicaHealth.DOWN
        if not self.breaker.calm:
            health = self.breaker.health(now)
            if health is not ReplicaHealth.READY:
                return health
        return ReplicaHealth.FULL if slots is not None and active >= slots else ReplicaHealth.READY


class ReplicaAttempt:
    """One attempt of a request, on one replica: its share of the replica's time, and its load there.

    Attempts follow one another, and most requests need only one; a hedged request has two at a time
    (`gateway.proxy.hedge`). `keys` are the prompt's, where there was a choice; `filler`: it is a batch's line.
    """

    __slots__ = ("_cached", "_decode", "_keys", "_prefill", "_prompt", "_ticket", "filler", "replica")

    def __init__(
        self,
        replica: RoutedReplica,
        prompt_tokens: int,
        cached_tokens: int = 0,
        keys: Keys = (),
        *,
        filler: bool = False,
    ) -> None:
        self.replica = replica
        self.filler = filler
        self._prompt = prompt_tokens
        self._cached = cached_tokens
        self._keys = keys
        self._prefill = self._decode = 0
        self._ticket: Ticket | None = None

    def start(self, now: float, output_bound: int, choices: int) -> None:
        """Note that the request is sent; `now` is the loop's time."""
        replica = self.replica
        work = work_of(self._prompt, self._cached, output_bound, choices)
        self._prefill, self._decode = work.prefill, work.decode
        if self._keys:
            replica.note(self._keys)
        if not replica.breaker.calm:
            replica.breaker.begun(now)
        self._ticket = replica.clock.start(time.monotonic_ns())
        replica.filler += self.filler
        replica.add_work(work.prefill + work.decode)

    @property
    def started(self) -> bool:
        """True if the request was sent and the attempt is not over."""
        return self._ticket is not None

    @property
    def work(self) -> int:
        """The attempt's work in flight, in tokens of prefill."""
        return self._prefill + self._decode

    def first_token(self) -> None:
        """Note the first token: the prompt is computed, the answer is left."""
        self.replica.add_work(-self._prefill)
        self._prefill = 0

    def finish(self) -> int:
        """End the attempt; returns its share of the replica's time, in ns."""
        assert self._ticket is not None
        replica = self.replica
        ticket, self._ticket = self._ticket, None
        device_ns = replica.clock.finish(ticket, time.monotonic_ns())
        replica.filler -= self.filler
        replica.add_work(-self._prefill - self._decode)
        return device_ns
