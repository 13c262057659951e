"""What the machines cost: each request's fair share of its replica's time, and the margin over a window.

A replica that serves n requests at once works for each of them a n-th of the time (processor sharing). The
shares of a replica's requests add up to its busy time, and busy and idle time to the time that was paid for:
no cost is lost and none is counted twice.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple, NewType

import msgspec

from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import ZERO, Nanos, apportion, round_ratio
from tidemill.ledger.usage import UsageRecord

Ticket = NewType("Ticket", int)
"""A request that is being worked on, from `BusyTimeShares.start` to `BusyTimeShares.finish`."""

NS_PER_HOUR = 3_600_000_000_000

_FINE = 20
"""Virtual time counts in 2**-20 ns, so that dividing by n loses nothing that a nanosecond would show."""
_FINE_MASK = (1 << _FINE) - 1


class BusyTimeShares:
    """Shares one replica's busy time among the requests that it serves at the same time.

    Virtual time advances by dt / n while n requests are active (Parekh and Gallager's fluid model of fair
    queueing), so a request's share is the virtual time between its start and its finish, and each event costs
    O(1) whatever n.

    In integers: what a division leaves over is carried into the next one, and the fraction of a nanosecond
    that a finishing request leaves over goes to the next that finishes. When the last one finishes nothing is
    left, and the shares add up to the busy time exactly. Instants are of any one monotonic clock, in ns; an
    instant before the last one counts as the last one. Not thread-safe: one event loop owns it.
    """

    def __init__(self) -> None:
        self._last_ns = 0
        self._busy_ns = 0
        self._virtual = 0
        self._undivided = 0
        self._fraction = 0
        self._tickets = 0
        self._started: dict[Ticket, int] = {}

    @property
    def active(self) -> int:
        """How many requests are being worked on."""
        return len(self._started)

    def start(self, now_ns: int) -> Ticket:
        """A request begins; keep the ticket for `finish`."""
        self._advance(now_ns)
        self._tickets += 1
        ticket = Ticket(self._tickets)
        self._started[ticket] = self._virtual
        return ticket

    def finish(self, ticket: Ticket, now_ns: int) -> int:
        """The request ends; its share of the time in ns. Raises LedgerError for a ticket not active."""
        if ticket not in self._started:
            raise LedgerError(f"ticket {ticket} is not being worked on; each is finished once")
        self._advance(now_ns)
        share = self._virtual - self._started.pop(ticket) + self._fraction
        self._fraction = share & _FINE_MASK
        return share >> _FINE

    def busy_ns(self, now_ns: int) -> int:
        """For how long at least one request was active, up to `now_ns`."""
        running = max(now_ns - self._last_ns, 0) if self._started else 0
        return self._busy_ns + running

    def _advance(self, now_ns: int) -> None:
        elapsed = now_ns - self._last_ns
        if elapsed > 0:
            self._last_ns = now_ns
        if not self._started:
            return
        elapsed = max(elapsed, 0)
        self._busy_ns += elapsed
        step, self._undivided = divmod((elapsed << _FINE) + self._undivided, len(self._started))
        self._virtual += step


class MarginKey(NamedTuple):
    """Whose revenue and cost."""

    tenant_id: str
    model: str


class MarginLine(msgspec.Struct, frozen=True):
    """Revenue and cost of one tenant's use of one model in a window. Amounts in the currency of the cost."""

    key: MarginKey
    revenue: Nanos
    device_ns: int
    busy_cost: Nanos
    """The device time that it used, at what that costs."""
    idle_cost: Nanos
    """Its share of the time that nobody used, in proportion to the device time that it used."""

    @property
    def contribution(self) -> Nanos:
        """Revenue less the cost of the time used: what one more such request brings in."""
        return Nanos(self.revenue - self.busy_cost)

    @property
    def gross_margin(self) -> Nanos:
        """Revenue less all cost, idle time included."""
        return Nanos(self.revenue - self.busy_cost - self.idle_cost)

    @property
    def ratio(self) -> float | None:
        """Gross margin per revenue, for display; None without revenue."""
        return self.gross_margin / self.revenue if self.revenue else None


class MarginReport(msgspec.Struct, frozen=True):
    """The margin of a window. busy_cost + idle_cost is what the devices cost in it, to the nano."""

    start: datetime
    end: datetime
    owned_ns: int
    """Device time that was paid for: devices x window."""
    busy_ns: int
    """Device time that requests used, as attributed."""
    revenue: Nanos
    busy_cost: Nanos
    idle_cost: Nanos
    """Includes `unallocated`."""
    unallocated: Nanos
    """Idle cost that no line bears, because no device time was used at all."""
    lines: tuple[MarginLine, ...]
    """In order of tenant and model."""

    @property
    def cost(self) -> Nanos:
        return Nanos(self.busy_cost + self.idle_cost)

    @property
    def gross_margin(self) -> Nanos:
        return Nanos(self.revenue - self.cost)

    @property
    def ratio(self) -> float | None:
        """Gross margin per revenue, for display; None without revenue."""
        return self.gross_margin / self.revenue if self.revenue else None

    @property
    def fill(self) -> float | None:
        """Busy per owned device time; above 1 when more was attributed than owned; None without devices."""
        return self.busy_ns / self.owned_ns if self.owned_ns else None


def margin(
    revenue: Mapping[MarginKey, Nanos],
    device_ns: Mapping[MarginKey, int],
    *,
    cost_per_device_hour: Nanos,
    devices: int,
    start: datetime,
    end: datetime,
) -> MarginReport:
    """Set revenue against the cost of `devices` devices from `start` to `end` (aware).

    The cost of the fleet is rounded once; what of it was busy is rounded once; both are then split by largest
    remainder, so the lines add up to the fleet's cost exactly. When more device time was attributed than
    owned (the clocks of several gateways overlap), the whole cost is busy cost and is split in proportion.
    """
    if devices < 0 or cost_per_device_hour < 0:
        raise LedgerError("neither the number of devices nor their cost may be negative")
    if start.utcoffset() is None or end.utcoffset() is None or end < start:
        raise LedgerError(f"{start} to {end} is not a window; give two instants with time zones, the earlier first")
    if min(device_ns.values(), default=0) < 0:
        raise LedgerError("device time may not be negative")
    keys = sorted(revenue.keys() | device_ns.keys())
    weights = [device_ns.get(key, 0) for key in keys]
    owned = devices * ((end - start) // timedelta(microseconds=1)) * 1_000
    busy = sum(weights)
    cost = round_ratio(cost_per_device_hour * owned, NS_PER_HOUR)
    busy_cost = round_ratio(cost_per_device_hour * min(busy, owned), NS_PER_HOUR)
    idle_cost = cost - busy_cost
    busy_shares = apportion(busy_cost, weights) if busy else [0] * len(keys)
    idle_shares = apportion(idle_cost, weights) if busy else [0] * len(keys)
    return MarginReport(
        start=start,
        end=end,
        owned_ns=owned,
        busy_ns=busy,
        revenue=Nanos(sum(revenue.values())),
        busy_cost=Nanos(busy_cost),
        idle_cost=Nanos(idle_cost),
        unallocated=ZERO if busy else Nanos(idle_cost),
        lines=tuple(
            MarginLine(key, revenue.get(key, ZERO), weight, Nanos(busy_share), Nanos(idle_share))
            for key, weight, busy_share, idle_share in zip(keys, weights, busy_shares, idle_shares, strict=True)
        ),
    )


def revenue_and_device_time(
    records: Iterable[UsageRecord],
) -> tuple[dict[MarginKey, Nanos], dict[MarginKey, int]]:
    """The two inputs of `margin` from usage records of one currency, by tenant and model."""
    revenue: dict[MarginKey, Nanos] = {}
    device_ns: dict[MarginKey, int] = {}
    currency: str | None = None
    for record in records:
        if currency is not None and record.currency != currency:
            raise LedgerError(f"record {record.request_id} is in {record.currency}, others in {currency}")
        currency = record.currency
        key = MarginKey(record.tenant_id, record.model)
        revenue[key] = Nanos(revenue.get(key, 0) + record.charge)
        device_ns[key] = device_ns.get(key, 0) + record.device_ns
    return revenue, device_ns
