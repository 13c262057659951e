"""The ledger's errors: what a caller handed in that the rules of money do not allow."""


class LedgerError(ValueError):
    """A value that breaks a rule of the ledger. The message says which value, which rule and what to do."""
