"""How many examples Hypothesis makes: a profile says it for all tests, and a test says what it needs of that.

`make test` takes the profile `usual`, `make test-fast` takes `fast`; `--hypothesis-profile=thorough` is for a night.
"""

from typing import Any

from hypothesis import HealthCheck, settings

PROFILES = {"fast": 20, "usual": 100, "thorough": 2000}
"""Examples for each test."""
FEWEST = 5

_BUSY = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
"""The first draw takes long where others work, too; and a store or a platform may see many examples."""


def register_profiles() -> None:
    """Make the profiles known to Hypothesis, and `usual` the one that holds."""
    for name, count in PROFILES.items():
        settings.register_profile(name, max_examples=count, deadline=None, suppress_health_check=_BUSY)
    settings.load_profile("usual")


def examples(times: float, **more: Any) -> settings:
    """So many times the profile's number of examples, for a test of which one costs little, or much."""
    return settings(max_examples=max(round(times * settings().max_examples), FEWEST), **more)
