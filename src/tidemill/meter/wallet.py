"""A tenant's wallet in one gateway process: leased, held and spent amounts.

    available = budget - spent - held

The store has set the budget aside for this process (`store.balance_leases`), so a hold is a comparison and an addition:
no lock, no round trip, and no burst of parallel requests can promise the same money twice.
"""

from tidemill.ledger.money import Nanos


class LeasedBalance:
    """Budget, holds and spending of one tenant in this process; all amounts in nanos.

    Invariant: 0 <= spent and 0 <= held and spent + held <= budget.
    """

    __slots__ = ("budget", "held", "holds", "spent")

    def __init__(self) -> None:
        self.budget = 0
        self.spent = 0
        self.held = 0
        self.holds = 0

    @property
    def available(self) -> int:
        return self.budget - self.spent - self.held

    def hold(self, amount: int) -> bool:
        """Set `amount` aside for a request; False (and nothing changes) when the budget does not allow it."""
        if amount < 0:
            raise ValueError(f"a hold must not be negative, got {amount}")
        if amount > self.budget - self.spent - self.held:
            return False
        self.held += amount
        self.holds += 1
        return True

    def extend(self, amount: int) -> bool:
        """Add `amount` to an existing hold; False (and nothing changes) when the budget does not allow it."""
        if amount > self.available:
            return False
        self.held += amount
        return True

    def settle(self, hold: int, charge: Nanos) -> None:
        """Turn a hold into a charge of at most that much; the rest is available again."""
        if not 0 <= charge <= hold:
            raise ValueError(f"a charge must be from 0 to its hold of {hold}, got {charge}")
        self.held -= hold
        self.holds -= 1
        self.spent += charge

    def grant(self, amount: int) -> None:
        """Add `amount` that the store has leased to this process."""
        self.budget += amount

    def take_back(self, keep: int = 0) -> int:
        """Take what is available beyond `keep` off the budget, to return it to the store; the amount."""
        surplus = max(self.available - keep, 0)
        self.budget -= surplus
        return surplus
