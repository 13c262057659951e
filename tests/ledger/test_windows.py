"""Limits per minute over several processes: the invariant under lost answers, deaths, skewed clocks and outages."""

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.support.examples import examples
from tidemill.ledger.windows import (
    AHEAD_S,
    RATE_WINDOW_S,
    RateGrant,
    RateReport,
    RateShare,
    booked_of,
    grant,
    in_force,
)


def ask(limit: int, need: int = 1, *, others: tuple[dict[int, int], ...] = (), second: int = 1000) -> RateGrant:
    return grant(limit, others, RateReport({}, 0, need=need, least=need, want=need), second)


def test_a_permit_counts_for_its_minute_and_no_longer() -> None:
    assert in_force({100: 7}, 100) == 7
    assert in_force({100: 7}, 160) == 7, "one of second 100 may be as late as 100.999, 59.001 s ago"
    assert in_force({100: 7}, 161) == 0


def test_one_that_asks_alone_gets_all_there_is() -> None:
    assert ask(100, 100).granted == 100
    assert ask(100, 40).free == 60
    assert ask(3, 1).granted == 1


def test_a_wish_without_a_need_is_met_by_a_slice() -> None:
    assert grant(100, [], RateReport({}, 0, want=90), 1000).granted == 25
    assert grant(100, [{1000: 80}], RateReport({}, 0, want=90), 1000).granted == 5
    assert grant(100, [{1000: 100}], RateReport({}, 0, want=90), 1000).granted == 0


def test_what_does_not_suffice_is_left_to_others_and_the_time_is_told() -> None:
    denied = ask(100, 30, others=({950: 50, 970: 30},))
    assert (denied.granted, denied.free) == (0, 20)
    assert denied.frees_in == 950 + RATE_WINDOW_S + 1 - 1000
    assert ask(100, 71, others=({950: 50, 970: 30},)).frees_in == 970 + RATE_WINDOW_S + 1 - 1000
    assert ask(100, 20, others=({950: 50, 970: 30},)).frees_in == 0


def test_what_others_hold_is_told_from_what_they_have_spent() -> None:
    assert ask(100, 30, others=({990: 50, 1000 + AHEAD_S: 40},)).elsewhere == 40


def test_a_lowered_limit_takes_back_what_is_held() -> None:
    share = RateShare()
    share.renewed(RateGrant(50, 1030, 50, 0, 0))
    answer = grant(20, [], share.report(1000, 0.0, reserve_s=1.0, cushion=50), 1000)
    share.renewed(answer)
    assert share.held == 20


def test_what_was_refunded_is_not_spent_before_the_store_knows() -> None:
    share = RateShare()
    share.renewed(RateGrant(10, 1030, 0, 0, 0))
    assert share.take(10, 1000)
    share.refund(4, 1000)
    assert not share.take(1, 1000)
    report = share.report(1001, 1.0, need=1)
    assert report.spent == {1000: 6}
    assert grant(10, [], report, 1001).granted == 1


def test_permits_run_out_with_their_lease() -> None:
    share = RateShare()
    share.renewed(RateGrant(10, 1030, 0, 0, 0))
    assert share.at_hand(1030) == 10 and share.at_hand(1031) == 0
    assert not share.take(1, 1031)
    assert share.report(1031, 0.0, cushion=10).held == 0


def test_an_idle_process_gives_back_what_it_does_not_need() -> None:
    share = RateShare()
    share.renewed(RateGrant(100, 1030, 0, 0, 0))
    share.take(20, 1000)
    assert share.report(1001, 1.0, reserve_s=2.0).held == 40  # twice the last second's use
    assert share.report(1001, 1.5, reserve_s=2.0).held == 4
    assert share.report(1002, 2.0, reserve_s=2.0).held == 0
    assert share.report(1003, 3.0, reserve_s=2.0, cushion=2).want == 2


def test_seconds_before_a_clock_was_put_back_do_not_block() -> None:
    share = RateShare()
    share.renewed(RateGrant(10, 5030, 0, 0, 0))
    share.take(10, 5000)
    report = share.report(1000, 0.0)
    assert report.spent == {1000: 10}
    assert in_force({5000: 10}, 1000) == 0


class World:
    """Processes, and a store that keeps what they reported. Time goes in tenths of a second.

    Each process takes the time for up to half a second later than it is, as one that measured the store's clock over
    a slow network does.
    """

    def __init__(self, limit: int, skews: list[int]) -> None:
        self.limit = limit
        self.now = 10_000
        self.skews = skews
        self.shares = [RateShare() for _ in skews]
        self.rows: dict[int, dict[int, int]] = {}
        self.names = list(range(len(skews)))
        self.under_way: dict[int, RateGrant] = {}
        self.cut_off: set[int] = set()
        self.admitted: list[tuple[int, int]] = []
        """When and by which process, within the last minute."""

    def second(self, process: int, at: int | None = None) -> int:
        return ((self.now if at is None else at) + self.skews[process]) // 10

    def wait(self, tenths: int) -> None:
        self.now += tenths

    def report(self, process: int, need: int = 0, reserve_s: float = 0.0, answered: bool = True) -> None:
        """Tell the store; the answer is then under way."""
        if process in self.under_way:
            return
        share, name = self.shares[process], self.names[process]
        report = share.report(self.second(process), self.now / 10, need=need, least=max(need, 1), reserve_s=reserve_s)
        if process in self.cut_off:
            return
        others = [row for other, row in self.rows.items() if other != name]
        answer = grant(self.limit, others, report, self.now // 10)
        self.rows[name] = booked_of(RateReport(report.spent, report.held + answer.granted), answer.valid)
        if answered:
            self.under_way[process] = answer

    def answer_arrives(self, process: int) -> None:
        if process in self.under_way:
            self.shares[process].renewed(self.under_way.pop(process))

    def requests_come(self, process: int, count: int, helped: bool) -> None:
        """Admit as many as there are permits for; with `helped`, the store is asked for one that is missing."""
        for _ in range(count):
            if not self.shares[process].take(1, self.second(process)):
                if not helped:
                    return
                self.report(process, 1)
                self.answer_arrives(process)
                if not self.shares[process].take(1, self.second(process)):
                    return
            self.admitted.append((self.now, process))
            self.check()

    def one_is_refunded(self, process: int) -> None:
        for at, who in reversed(self.admitted):
            if who == process and self.second(process, at) in self.shares[process].spent:
                self.shares[process].refund(1, self.second(process, at))
                self.admitted.remove((at, who))
                return

    def loses_or_finds_the_store(self, process: int) -> None:
        self.cut_off ^= {process}

    def dies(self, process: int) -> None:
        """And another begins."""
        self.shares[process] = RateShare()
        self.under_way.pop(process, None)
        self.names[process] = max(self.names) + 1
        self.admitted = [(at, -1 if who == process else who) for at, who in self.admitted]

    def check(self) -> None:
        """No minute holds more than the limit."""
        self.admitted = [(at, who) for at, who in self.admitted if at > self.now - 600]
        assert len(self.admitted) <= self.limit

    def is_free_after_silence(self) -> None:
        """Liveness: whatever was lost or died before, one process can have all of the limit."""
        self.under_way.clear()
        self.wait(10 * (RATE_WINDOW_S + AHEAD_S + 2))
        for process, share in enumerate(self.shares):
            report = share.report(self.second(process), self.now / 10)
            assert (report.spent, report.held) == ({}, 0)
        answer = grant(self.limit, self.rows.values(), RateReport({}, 0, need=self.limit), self.now // 10)
        assert answer.granted == self.limit


PROCESS = st.integers(0, 1)


class Machine(RuleBasedStateMachine):
    """Any order of what can happen, so that a failure comes back as short as it can be."""

    @initialize(limit=st.integers(1, 6), skews=st.lists(st.integers(0, 5), min_size=2, max_size=2))
    def begin(self, limit: int, skews: list[int]) -> None:
        self.world = World(limit, skews)

    @rule(tenths=st.sampled_from([1, 9, 290, 310, 330, 601]))
    def time_passes(self, tenths: int) -> None:
        self.world.wait(tenths)

    @rule(process=PROCESS, count=st.integers(1, 6), helped=st.booleans())
    def requests_come(self, process: int, count: int, helped: bool) -> None:
        self.world.requests_come(process, count, helped)

    @rule(process=PROCESS, arrives=st.booleans(), answered=st.booleans())
    def a_process_asks_ahead(self, process: int, arrives: bool, answered: bool) -> None:
        self.world.report(process, self.world.limit, 30.0, answered)
        if arrives:
            self.world.answer_arrives(process)

    @rule(process=PROCESS)
    def a_slow_answer_arrives(self, process: int) -> None:
        self.world.answer_arrives(process)

    @rule(process=PROCESS)
    def a_request_used_less_than_was_taken(self, process: int) -> None:
        self.world.one_is_refunded(process)

    @rule(process=PROCESS)
    def a_process_loses_or_finds_the_store(self, process: int) -> None:
        self.world.loses_or_finds_the_store(process)

    @rule(process=PROCESS)
    def a_process_dies(self, process: int) -> None:
        self.world.dies(process)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.is_free_after_silence()


Machine.TestCase.settings = examples(1, stateful_step_count=30)
TestMachine = Machine.TestCase


@pytest.mark.parametrize("seed", range(24))
def test_a_long_life_with_every_kind_of_trouble(seed: int) -> None:
    """What a rare order of events would break: hours of a life in which trouble is frequent."""
    chance = random.Random(seed)
    world = World(chance.randint(1, 5), [chance.randint(0, 5) for _ in range(chance.randint(2, 3))])
    trouble = chance.choice([0.0, 0.05, 0.3])
    for _ in range(4000):
        process = chance.randrange(len(world.shares))
        world.wait(chance.choice([1, 3, 30, 100, 290, 310, 330]) if chance.random() < 0.5 else 0)
        match chance.choices(
            ["come", "ahead", "arrive", "report", "refund", "cut", "die", "silence"],
            [6, 3, 3, 2, 1, 4 * trouble, trouble, 0.05],
        )[0]:
            case "come":
                world.requests_come(process, chance.randint(1, world.limit), chance.random() < 0.5)
            case "ahead":
                world.report(process, world.limit, 30.0, answered=chance.random() >= trouble)
                if chance.random() < 0.7:
                    world.answer_arrives(process)
            case "arrive":
                world.answer_arrives(process)
            case "report":
                world.report(process, 0, 30.0)
                world.answer_arrives(process)
            case "refund":
                world.one_is_refunded(process)
            case "cut":
                world.loses_or_finds_the_store(process)
            case "die":
                world.dies(process)
            case "silence":
                world.is_free_after_silence()


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_that_ask_as_fast_as_they_can_share_all_of_it(processes: int) -> None:
    shares = [RateShare() for _ in range(processes)]
    rows: dict[int, dict[int, int]] = {}
    admitted: list[int] = []
    for tick in range(3000):  # five minutes
        second = 1000 + tick // 10
        for name, share in enumerate(shares):
            if not share.take(1, second):
                report = share.report(second, tick / 10, need=1, reserve_s=2.0)
                others = [row for other, row in rows.items() if other != name]
                answer = grant(100, others, report, second)
                rows[name] = booked_of(RateReport(report.spent, report.held + answer.granted), answer.valid)
                share.renewed(answer)
                if not share.take(1, second):
                    continue
            admitted.append(tick)
    for end in range(0, 3000, 7):
        assert sum(end - 600 < tick <= end for tick in admitted) <= 100
    assert len(admitted) >= 100 * 5 * 0.95, "a limit of 100 a minute lets nearly 100 a minute through"
