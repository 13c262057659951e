"""Concurrency limits over several processes."""

import random

import pytest

from tidemill.ledger.slots import LEASE_S, SlotGrant, SlotReport, SlotShare, grant


def test_a_process_gets_what_waits_or_a_slice_of_what_is_free() -> None:
    assert grant(10, [], SlotReport(0, 0, need=1, want=1), 0).granted == 1
    assert grant(80, [], SlotReport(0, 0, need=1, want=30), 0).granted == 10
    assert grant(10, [(8, 8)], SlotReport(0, 0, need=5), 0).granted == 2
    denied = grant(10, [(7, 4), (3, 3)], SlotReport(0, 0, need=5), 0)
    assert (denied.granted, denied.free, denied.elsewhere) == (0, 0, 3)


def test_a_lowered_limit_lets_nothing_begin_until_enough_has_ended() -> None:
    share = SlotShare()
    share.renewed(SlotGrant(5, 1000, 0, 0))
    for _ in range(5):
        assert share.take(1)
    share.renewed(grant(3, [], share.report(2), 2))
    share.leave()
    share.leave()
    assert not share.take(3)
    share.leave()
    assert share.take(3)


def test_slots_are_not_used_beyond_their_lease() -> None:
    share = SlotShare()
    share.renewed(grant(4, [], share.report(0, need=2), 0))
    assert share.take(LEASE_S) and share.take(LEASE_S) and not share.take(LEASE_S + 1)
    share.leave()
    assert share.report(LEASE_S + 1).keep == 1, "what runs goes on counting"


def test_what_was_not_used_goes_back() -> None:
    share = SlotShare()
    share.renewed(SlotGrant(6, 1000, 0, 0))
    share.take(1)
    share.take(1)
    share.leave()
    assert share.report(2).keep == 2, "as many as were used at a time"
    assert share.report(3).keep == 1


@pytest.mark.parametrize("seed", range(20))
def test_never_more_requests_at_a_time_than_the_limit_and_all_of_it_can_be_had(seed: int) -> None:
    """Processes that begin and end requests, lose reports and answers, and die; the store forgets the dead at once."""
    chance = random.Random(seed)
    limit = chance.randint(1, 6)
    shares = [SlotShare() for _ in range(3)]
    rows: list[tuple[int, int]] = [(0, 0)] * 3

    def report(name: int, need: int) -> None:
        said = shares[name].report(0, need=need, want=need)
        if chance.random() < 0.1:
            return
        others = [row for other, row in enumerate(rows) if other != name]
        answer = grant(limit, others, said, 0)
        rows[name] = (said.keep + answer.granted, said.used)
        if chance.random() < 0.9:
            shares[name].renewed(answer)

    for _ in range(3000):
        name = chance.randrange(3)
        match chance.choice(["begin", "begin", "end", "report", "die"] if chance.random() < 0.1 else ["begin", "end"]):
            case "begin":
                if not shares[name].take(0):
                    report(name, 1)
                    shares[name].take(0)
            case "end" if shares[name].used:
                shares[name].leave()
            case "report":
                report(name, 0)
            case "die":
                shares[name], rows[name] = SlotShare(), (0, 0)
        assert sum(share.used for share in shares) <= limit
        assert all(share.leased <= row[0] for share, row in zip(shares, rows, strict=True))
    shares = [SlotShare() for _ in shares]
    rows = [(0, 0)] * 3
    chance.random = lambda: 0.5  # type: ignore[method-assign]
    report(0, limit)
    assert all(shares[0].take(0) for _ in range(limit))
