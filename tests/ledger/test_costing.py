from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.ledger.values import PRICES, record, version
from tests.support.examples import examples
from tidemill.ledger.costing import (
    NS_PER_HOUR,
    BusyTimeShares,
    MarginKey,
    Ticket,
    margin,
    revenue_and_device_time,
)
from tidemill.ledger.errors import LedgerError
from tidemill.ledger.money import Nanos, parse_amount

START = datetime(2026, 11, 24, tzinfo=UTC)


def test_two_requests_share_the_time_they_overlap() -> None:
    clock = BusyTimeShares()
    one = clock.start(1000)
    two = clock.start(1600)
    assert clock.active == 2
    assert clock.finish(one, 2000) == 600 + 200
    assert clock.finish(two, 2300) == 200 + 300
    assert clock.busy_ns(9000) == 1300
    three = clock.start(9000)
    assert clock.busy_ns(9007) == 1307
    assert clock.finish(three, 9010) == 10


def test_a_ticket_is_finished_once() -> None:
    clock = BusyTimeShares()
    ticket = clock.start(0)
    clock.finish(ticket, 1)
    for unknown in (ticket, Ticket(99)):
        with pytest.raises(LedgerError, match="finished once"):
            clock.finish(unknown, 2)


def test_time_that_goes_back_counts_as_none() -> None:
    clock = BusyTimeShares()
    one = clock.start(100)
    two = clock.start(50)
    assert clock.busy_ns(10) == 0
    assert clock.finish(one, 90) == 0
    assert clock.finish(two, 130) == 30


class Sharing(RuleBasedStateMachine):
    """Against exact fractions: shares add up to the busy time whenever it is idle, and each is fair."""

    @initialize(now=st.integers(0, 2**62))
    def begin(self, now: int) -> None:
        self.clock, self.now = BusyTimeShares(), now
        self.exact: dict[Ticket, Fraction] = {}
        self.given, self.busy, self.events, self.most = 0, 0, 0, 0

    def pass_time(self, elapsed: int) -> None:
        self.now += elapsed
        if self.exact:
            self.busy += elapsed
            for ticket in self.exact:
                self.exact[ticket] += Fraction(elapsed, len(self.exact))
        self.events += 1

    elapsed = st.one_of(st.integers(0, 20), st.integers(0, 10**13))

    @rule(elapsed=elapsed)
    def start(self, elapsed: int) -> None:
        self.pass_time(elapsed)
        ticket = self.clock.start(self.now)
        assert ticket not in self.exact
        self.exact[ticket] = Fraction(0)
        self.most = max(self.most, len(self.exact))

    @precondition(lambda self: self.exact)
    @rule(elapsed=elapsed, data=st.data())
    def finish(self, elapsed: int, data: st.DataObject) -> None:
        self.pass_time(elapsed)
        ticket = data.draw(st.sampled_from(sorted(self.exact)))
        share = self.clock.finish(ticket, self.now)
        fair = self.exact.pop(ticket)
        assert share >= 0
        assert abs(share - fair) < 1 + Fraction(self.events * self.most, 2**20)
        self.given += share

    @invariant()
    def adds_up(self) -> None:
        assert self.clock.active == len(self.exact)
        assert self.clock.busy_ns(self.now) == self.busy
        assert self.clock.busy_ns(self.now + 5) == self.busy + (5 if self.exact else 0)
        if not self.exact:
            assert self.given == self.busy

    def teardown(self) -> None:
        if hasattr(self, "clock"):
            for ticket in sorted(self.exact):
                self.given += self.clock.finish(ticket, self.now)
            assert self.given == self.busy == self.clock.busy_ns(self.now)


TestSharing = Sharing.TestCase
TestSharing.settings = examples(0.6, stateful_step_count=40)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=30))
def test_any_schedule_adds_up_to_the_union_of_its_intervals(intervals: list[tuple[int, int]]) -> None:
    spans = [(begin, begin + length) for begin, length in intervals]
    events = sorted(
        [(begin, 1, n) for n, (begin, _) in enumerate(spans)] + [(end, 2, n) for n, (_, end) in enumerate(spans)]
    )
    clock, tickets, shares = BusyTimeShares(), {}, 0
    for at, what, n in events:
        if what == 1:
            tickets[n] = clock.start(at)
        else:
            shares += clock.finish(tickets[n], at)
    edges = sorted({edge for span in spans for edge in span})
    union = sum(
        after - before
        for before, after in pairwise(edges)
        if any(begin <= before and after <= end for begin, end in spans)
    )
    assert shares == clock.busy_ns(2 * 10**6) == union


def key(name: str) -> MarginKey:
    return MarginKey(name, "smollm2")


def test_a_margin_by_hand() -> None:
    report = margin(
        {key("a"): parse_amount("9"), key("b"): parse_amount("1")},
        {key("a"): NS_PER_HOUR, key("b"): NS_PER_HOUR // 2},
        cost_per_device_hour=parse_amount("2"),
        devices=2,
        start=START,
        end=START + timedelta(hours=2),
    )
    a, b = report.lines
    assert (a.busy_cost, a.idle_cost) == (parse_amount("2"), parse_amount("3.333333333"))
    assert (b.busy_cost, b.idle_cost) == (parse_amount("1"), parse_amount("1.666666667"))
    assert a.contribution == parse_amount("7")
    assert a.gross_margin == parse_amount("3.666666667")
    assert a.ratio == pytest.approx(3.666666667 / 9)
    assert b.ratio == pytest.approx(-1.666666667)
    assert (report.cost, report.gross_margin) == (parse_amount("8"), parse_amount("2"))
    assert (report.fill, report.ratio) == (0.375, 0.2)


keys = st.builds(MarginKey, st.sampled_from("abc"), st.sampled_from(["m1", "m2"]))


@given(
    st.dictionaries(keys, st.integers(0, 10**15).map(Nanos)),
    st.dictionaries(keys, st.integers(0, 10**16)),
    st.integers(0, 10**13).map(Nanos),
    st.integers(0, 64),
    st.integers(0, 31 * 86_400 * 10**6),
)
def test_costs_add_up_to_what_the_fleet_costs(
    revenue: dict[MarginKey, Nanos],
    device_ns: dict[MarginKey, int],
    rate: Nanos,
    devices: int,
    window_us: int,
) -> None:
    report = margin(
        revenue,
        device_ns,
        cost_per_device_hour=rate,
        devices=devices,
        start=START,
        end=START + timedelta(microseconds=window_us),
    )
    assert 2 * abs(report.cost * NS_PER_HOUR - rate * devices * window_us * 1000) <= NS_PER_HOUR
    assert sum(line.busy_cost for line in report.lines) == report.busy_cost
    assert sum(line.idle_cost for line in report.lines) + report.unallocated == report.idle_cost
    assert sum(line.gross_margin for line in report.lines) - report.unallocated == report.gross_margin
    assert sum(line.revenue for line in report.lines) == report.revenue == sum(revenue.values())
    assert sum(line.device_ns for line in report.lines) == report.busy_ns
    assert [line.key for line in report.lines] == sorted(revenue.keys() | device_ns.keys())
    for line in report.lines:
        assert line.busy_cost >= 0
        assert line.idle_cost >= 0
        assert line.device_ns or not line.busy_cost + line.idle_cost
    if report.busy_ns >= report.owned_ns and report.busy_ns:
        assert report.idle_cost == 0
    if not report.busy_ns:
        assert report.unallocated == report.cost


def test_no_revenue_has_no_ratio_and_no_devices_no_fill() -> None:
    report = margin({}, {}, cost_per_device_hour=Nanos(1), devices=0, start=START, end=START)
    assert (report.ratio, report.fill, report.lines, report.cost) == (None, None, (), 0)


def test_bad_windows_are_refused() -> None:
    def attempt(
        *,
        start: datetime = START,
        end: datetime = START,
        devices: int = 1,
        used: dict[MarginKey, int] | None = None,
    ) -> None:
        margin({}, used or {}, cost_per_device_hour=Nanos(1), devices=devices, start=start, end=end)

    with pytest.raises(LedgerError, match="not a window"):
        attempt(end=START - timedelta(1))
    with pytest.raises(LedgerError, match="not a window"):
        attempt(start=datetime(2026, 11, 24), end=datetime(2026, 11, 24))
    with pytest.raises(LedgerError, match="negative"):
        attempt(devices=-1)
    with pytest.raises(LedgerError, match="device time may not be negative"):
        attempt(used={key("a"): -1})


def test_revenue_and_device_time_of_records() -> None:
    month = [record("r1"), record("r2", device_ns=5), record("r3", tenant_id="b", price=PRICES["prc_free"])]
    revenue, device_ns = revenue_and_device_time(month)
    assert revenue == {key("acme"): 2 * month[0].charge, MarginKey("b", "tiny"): 0}
    assert device_ns == {key("acme"): 1_000_005, MarginKey("b", "tiny"): 1_000_000}
    with pytest.raises(LedgerError, match="r4 is in USD, others in CNY"):
        revenue_and_device_time([record(), record("r4", price=version("p", "smollm2", "1 1 1", currency="USD"))])
