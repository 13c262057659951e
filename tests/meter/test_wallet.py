"""A wallet: what is held and spent is never more than the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.ledger.money import Nanos
from tidemill.meter.wallet import LeasedBalance


def test_a_hold_is_all_or_nothing() -> None:
    wallet = LeasedBalance()
    assert not wallet.hold(1)
    assert wallet.hold(0)
    wallet.grant(100)
    assert wallet.hold(60)
    assert not wallet.hold(41)
    assert (wallet.available, wallet.held, wallet.holds) == (40, 60, 2)
    wallet.settle(60, Nanos(25))
    assert (wallet.available, wallet.held, wallet.spent, wallet.holds) == (75, 0, 25, 1)


def test_a_hold_grows_only_within_the_budget() -> None:
    wallet = LeasedBalance()
    wallet.grant(100)
    assert wallet.hold(60)
    assert not wallet.extend(41)
    assert wallet.extend(40)
    wallet.settle(100, Nanos(100))
    assert (wallet.available, wallet.spent) == (0, 100)


@pytest.mark.parametrize("charge", [-1, 61])
def test_a_charge_lies_within_its_hold(charge: int) -> None:
    wallet = LeasedBalance()
    wallet.grant(100)
    wallet.hold(60)
    with pytest.raises(ValueError, match="its hold of 60"):
        wallet.settle(60, Nanos(charge))
    assert (wallet.held, wallet.spent, wallet.holds) == (60, 0, 1)


def test_a_hold_is_not_negative() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        LeasedBalance().hold(-1)


amounts = st.integers(0, 1000)
steps = st.lists(
    st.tuples(st.sampled_from(["grant", "hold", "settle", "extend", "take_back"]), amounts, st.floats(0, 1)),
    max_size=60,
)


@given(steps)
def test_whatever_happens_the_sum_fits(steps: list[tuple[str, int, float]]) -> None:
    wallet, holds = LeasedBalance(), []
    for what, amount, share in steps:
        before = (wallet.budget, wallet.spent, wallet.held, wallet.holds)
        match what:
            case "grant":
                wallet.grant(amount)
            case "hold":
                fits = amount <= wallet.available
                assert wallet.hold(amount) is fits
                if fits:
                    holds.append(amount)
                else:
                    assert before == (wallet.budget, wallet.spent, wallet.held, wallet.holds)
            case "extend" if holds:
                if wallet.extend(amount):
                    holds[-1] += amount
            case "settle" if holds:
                hold = holds.pop()
                wallet.settle(hold, Nanos(int(hold * share)))
            case "take_back":
                available = wallet.available
                assert wallet.take_back(amount) == max(available - amount, 0)
        assert 0 <= wallet.spent and wallet.held == sum(holds) and wallet.holds == len(holds)
        assert wallet.spent + wallet.held <= wallet.budget
        assert wallet.available >= 0
