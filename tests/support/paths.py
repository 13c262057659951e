"""Where things lie in this repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GATEWAY_CONTRACTS = ROOT / "tests/gateway/contracts"
"""Streams of real engines and APIs, recorded."""
ANTHROPIC_CONTRACTS = ROOT / "tests/engines/contracts/anthropic"
"""Answers of Anthropic's API, written after its reference."""
