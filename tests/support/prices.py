"""Prices to test with."""

from tidemill.ledger.pricing import Price


def token_price(input_rate: int, cached_rate: int, output_rate: int) -> Price:
    """A price for tokens alone, in nanos per million."""
    return Price.of(input=input_rate, cached_input=cached_rate, output=output_rate)
